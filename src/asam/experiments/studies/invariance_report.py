"""Tables and plots of the invariance study."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .. import plots
from ..study import Figure, Outcome, Table
from .invariance_scalings import KINDS, MODELS

DRAWN = {
    "none, any eta, bias unscaled": "none (SAM)",
    "elementwise, eta = 0, bias scaled": "elementwise",
    "elementwise, eta = 0, bias fixed": "elementwise, bias fixed",
    "elementwise, eta = 0, bias unscaled": "elementwise, bias unscaled",
    "elementwise, eta = 0.01, bias scaled": "elementwise, eta = 0.01",
    "filterwise, eta = 0, bias scaled": "filterwise",
    "layerwise, eta = 0, bias scaled": "layerwise",
}


def table(outcomes: Mapping[str, Outcome], dtype: str, geometries: Sequence[str]) -> Table:
    """The worst change of all networks of a kind, by geometry and kind of rescaling."""
    columns = [(model, kind) for model, kinds in MODELS.items() for kind in kinds]
    rows = []
    for label in geometries:
        normalization, eta, bias = label.split(", ")
        worst = [max(_values(outcomes, dtype, kind, label, model)) for model, kind in columns]
        rows.append(
            (
                normalization,
                eta.replace("eta", "").strip(" ="),
                bias.removeprefix("bias "),
                *(f"{x:.1e}" for x in worst),
            )
        )
    headings = ("normalization", "eta", "bias", *(f"{model}: {KINDS[kind]}" for model, kind in columns))
    return Table(f"Worst relative change of sharpness in {dtype}", headings, rows)


def figure(outcomes: Mapping[str, Outcome], draws: int) -> Figure:
    """Every network's worst change, by geometry and kind of rescaling."""
    return Figure(
        "invariance",
        "How much sharpness changes though the function does not",
        f"The worst relative change over {draws} random rescalings of each kind, a dot a network. eta = 0 and biases "
        "scaled, but where a row says otherwise. Changes below 1e-16 are drawn there.",
        plots.svg(lambda *axes: _draw(axes, outcomes), (10.5, 4), columns=len(KINDS)),
    )


def _values(outcomes: Mapping[str, Outcome], dtype: str, kind: str, geometry: str, model: str = "") -> list[float]:
    found = [outcome["changes"][dtype] for name, outcome in outcomes.items() if name.startswith(model)]
    return [by[kind][geometry] for by in found if kind in by]


def _draw(axes: Sequence[Axes], outcomes: Mapping[str, Outcome]) -> None:
    colors = {"float64": plots.PALETTE[0], "float32": plots.PALETTE[1]}
    for panel, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for row, label in enumerate(reversed(DRAWN)):
            for shift, (dtype, color) in zip((0.14, -0.14), colors.items(), strict=True):
                values = np.maximum(_values(outcomes, dtype, kind, label), 1e-16)
                panel.scatter(values, np.full(len(values), row + shift), s=18, color=color, alpha=0.6, linewidths=0)
        panel.set_xscale("log")
        panel.set_xlim(2e-17, 1e3)
        panel.set_xticks([1e-15, 1e-10, 1e-5, 1])
        panel.minorticks_off()
        panel.set_ylim(-0.6, len(DRAWN) - 0.4)
        panel.set_yticks(range(len(DRAWN)), [label if panel is axes[0] else "" for label in reversed(DRAWN.values())])
        panel.set_xlabel("relative change of sharpness")
        panel.set_title(title, loc="left", fontsize=10)
    handles = [Line2D([], [], color=color, marker="o", linestyle="", label=dtype) for dtype, color in colors.items()]
    axes[0].figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
