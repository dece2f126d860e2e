"""An interactive page of loss surfaces in three dimensions, side by side on one scale."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from .landscape import LossLine, LossPlane
from .plots import METHODS, log_ticks, styles

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#0f172a;background:#f8fafc;margin:0}
main{max-width:1280px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 4px} h2{font-size:1.15rem;margin:28px 0 8px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:16px}
.card{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:8px;min-width:0}
.card h3{font-size:.95rem;margin:4px 8px} .small{color:#475569;font-size:.88rem}
"""


def landscape_page(
    planes: Mapping[str, LossPlane],
    lines: Mapping[str, LossLine] | None = None,
    interpolations: Mapping[str, LossLine] | None = None,
    *,
    title: str = "Loss landscapes",
    mean: str = "loss",
) -> str:
    """The page as HTML. It holds everything it needs and loads nothing.

    All surfaces share one logarithmic scale, and turn together. What is not finite is a hole. Needs plotly.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 5)
        >>> page = landscape_page({"a network": LossPlane(x, x, {"loss": x[:, None] ** 2 + x**2})})
        >>> "a network" in page, "<script src" in page
        (True, False)
    """
    from plotly.offline import get_plotlyjs

    figures: list[Any] = []

    def place(figure: Any, kind: str) -> str:
        figures.append(figure)
        return f'<div class="plot {kind}" style="height:{figure.layout.height}px"></div>'

    surfaces = [_surface(plane, mean) for plane in planes.values()]
    seen = [value for z in surfaces for row in z for value in row if value is not None]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    cards = "".join(
        f'<div class="card"><h3>{escape(name)}</h3>{place(_surface_plot(plane, z, low, high, mean), "surface")}</div>'
        for (name, plane), z in zip(planes.items(), surfaces, strict=True)
    )
    sections = f'<div class="grid">{cards}</div>'
    for heading, axis, found, methods in (
        ("Along the first direction", "position along the direction", lines, METHODS),
        ("On the straight way from one to the next", "from the first, 0, to the second, 1", interpolations, {}),
    ):
        if found:  # a way from one method to another has the color of neither
            plot = place(_lines_plot(found, axis, mean, methods), "lines")
            sections += f'<h2>{heading}</h2><div class="card">{plot}</div>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="small">The {escape(mean)} over a plane of two random directions through '
        "the weights, which are at (0, 0). Each direction has, filter by filter, the norm of the weights. Height and "
        f"color are the {escape(mean)}, logarithmic and the same for all. Drag to turn, scroll to zoom, hover for "
        "values. A picture of two directions out of very many: flat here does not mean flat.</p>"
        f"{sections}</main><script>const figures=[{','.join(figure.to_json() for figure in figures)}];{DRAW}</script>"
        "</body></html>\n"
    )


# drawn when the page is laid out, so that every plot knows its width; one camera for all surfaces
DRAW = """
document.querySelectorAll('.plot').forEach((place,i)=>Plotly.newPlot(place,figures[i].data,figures[i].layout,
{responsive:true,displayModeBar:false}));
const surfaces=[...document.querySelectorAll('.surface')];let turning=false;
surfaces.forEach(one=>one.on('plotly_relayout',change=>{const camera=change['scene.camera'];
if(turning||!camera)return;turning=true;
Promise.all(surfaces.filter(s=>s!==one).map(s=>Plotly.relayout(s,{'scene.camera':camera})))
.then(()=>{turning=false})}));
"""


def _surface(plane: LossPlane, mean: str) -> list[list[float | None]]:
    """log10 of the values, a row for each y; None where it is not finite."""
    values = plane.values[mean].T.log10()
    return [[value if abs(value) < float("inf") else None for value in row] for row in values.tolist()]


def _surface_plot(plane: LossPlane, z: list[list[float | None]], low: float, high: float, mean: str) -> Any:
    import plotly.graph_objects as go

    ticks = log_ticks(10**low, 10**high)
    margin = 0.15 * (high - low) or 0.1  # the lowest label is not to meet that of the corner
    axis = {
        "title": {"text": ""},  # it would be cut: it stands left of the labels
        "range": [low - margin, high + (margin if low == high else 0)],
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": list(ticks.values()),
    }
    surface = go.Surface(
        x=plane.x.tolist(),
        y=plane.y.tolist(),
        z=z,
        customdata=plane.values[mean].T.tolist(),
        cmin=low,
        cmax=high,
        colorscale="Viridis",
        showscale=False,
        contours={
            "z": {
                "show": True,
                "color": "rgba(15, 23, 42, 0.45)",  # usecolormap gave a flat surface those of the highest color
                "project": {"z": True},
                "start": low,
                "end": high,
                "size": (high - low) / 15,
            }
        },
        hovertemplate=f"x %{{x:.3g}}<br>y %{{y:.3g}}<br>{mean} %{{customdata:.4g}}<extra></extra>",
    )
    figure = go.Figure(surface)
    figure.update_layout(
        height=380,
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        scene={
            "xaxis": {"title": {"text": "first"}},
            "yaxis": {"title": {"text": "second"}},
            "zaxis": axis,
            # so far away that the labels stay inside the narrowest card
            "aspectmode": "cube",
            "camera": {"eye": {"x": 1.75, "y": -2.05, "z": 1.15}, "center": {"x": 0, "y": 0, "z": -0.1}},
        },
    )
    return figure


def _lines_plot(lines: Mapping[str, LossLine], axis: str, mean: str, methods: Mapping[str, str]) -> Any:
    import plotly.graph_objects as go

    styled = styles(lines, methods)
    seen = [value for line in lines.values() for value in line.values[mean].tolist() if 0 < value < float("inf")]
    decade = bool(seen) and 8 * min(seen) < max(seen) < 100 * min(seen)
    figure = go.Figure(
        [
            go.Scatter(
                x=line.positions.tolist(),
                y=[value if abs(value) < float("inf") else None for value in line.values[mean].tolist()],
                name=escape(name),
                line={"color": styled[name][0], "dash": ("solid", "dash", "dot", "dashdot")[styled[name][1]]},
                hovertemplate="%{x:.3g}: %{y:.4g}",
            )
            for name, line in lines.items()
        ]
    )
    figure.update_layout(
        height=360,
        margin={"l": 60, "r": 16, "t": 16, "b": 48},
        template="plotly_white",
        hovermode="x unified",
        xaxis={"title": {"text": axis}},
        # plotly writes 2 for 0.2 and, of a single decade, 7, 8 and 9 over each other
        yaxis={"title": {"text": mean}, "type": "log", "tickformat": ".12~g", "nticks": 3 if decade else 6},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        showlegend=True,
    )
    return figure
