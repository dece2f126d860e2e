"""Tables and plots of the paths of SAM and ASAM in a valley."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from .. import plots
from ..study import Figure, Outcome, Table
from .toy_descent import LOW, STARTS, TARGET, Settings, name

OUTCOMES = {"does not get to low loss": "#475569", "low loss": "#fbbf24", "low loss, flat end": "#4ade80"}


def tables(settings: Settings, outcomes: Mapping[str, Outcome]) -> list[Table]:
    """Where the paper's starts and those of the grid end."""
    paths = []
    for method, rho in (("SGD", 0.0), *zip(("SAM", "ASAM"), settings.shown, strict=True)):
        outcome = outcomes[name(method, rho)]
        for start, end, step in zip(STARTS, outcome["end"], outcome["arrived"], strict=False):
            paths.append((name(method, rho), _point(start), _point(end), _count(step or math.inf)))
    by_rho = [("0 (SGD)", *_summary(outcomes["SGD"]) * 2)]
    for rho in settings.rhos:
        by_rho.append((f"{rho:g}", *_summary(outcomes[name("SAM", rho)]), *_summary(outcomes[name("ASAM", rho)])))
    columns = ("low loss", "flat end", "frozen", "median steps")
    headings = ("rho", *(f"{method}: {column}" for method in ("SAM", "ASAM") for column in columns))
    return [
        Table(
            "The starts of the paper", ("method", "start", f"after {settings.steps} steps", "at the flat end"), paths
        ),
        Table(f"{settings.side**2} starts, after {settings.steps} steps", headings, by_rho),
    ]


def _summary(outcome: Outcome) -> tuple[str, ...]:
    shares = [f"{np.mean(outcome[key][len(STARTS) :]):.0%}" for key in ("low", "flat", "stuck")]
    return (*shares, _count(float(np.median([step or math.inf for step in outcome["arrived"][len(STARTS) :]]))))


def figures(settings: Settings, outcomes: Mapping[str, Outcome]) -> list[Figure]:
    """The paths from the paper's starts, and a map of what becomes of all."""
    names = [name(method, rho) for method, rho in zip(("SAM", "ASAM"), settings.shown, strict=True)]
    mapped = settings.rhos[::2]
    cells = {
        method: {rho: _cells(outcomes[name(method, rho)], settings.side) for rho in mapped}
        for method in ("SAM", "ASAM")
    }
    size = (1.15 * len(mapped), 3.3)
    return [
        Figure(
            "paths",
            "Paths from the starts of the paper",
            "The loss, light where it is low; the valley is dotted, and the diamond is around its flat end. A circle "
            "is a start, a square where the path is in the end.",
            plots.svg(
                lambda *axes: _draw_paths(axes, {title: outcomes[title] for title in names}), (9, 4.4), columns=2
            ),
        ),
        Figure(
            "map",
            "What becomes of every start",
            f"A cell a start, w1 to the right and w2 upwards, both from 0 to {settings.widest:g}; the line is the "
            f"valley. After {settings.steps} steps.",
            plots.svg(lambda *axes: _draw_maps(axes, settings, cells), size, columns=len(mapped), rows=2),
        ),
    ]


def notes(settings: Settings) -> tuple[str, ...]:
    """How to read it."""
    return (
        f"At the flat end: a loss below {LOW:g} and w1 / w2 between 2/3 and 3/2. Steps of SGD with learning rate "
        f"{settings.lr:g}, eta {settings.eta:g} in ASAM. Frozen: the gradient after the ascent is exactly 0, for ever.",
        "SGD's own steps across the valley take it to the flat end as well; so both methods get there with a rho "
        "near 0, slowly, and a range of rho has to be measured against the speed of SGD.",
        "The rho of SAM and of ASAM are in different units: that ASAM bears a larger one is no merit in itself.",
        f"Intervals are over the {settings.side**2} starts: t of paired differences, bootstrap for ranges of rho. They "
        "tell what other starts would give, on this one loss. The fastest rho is chosen on the same starts.",
    )


def _draw_paths(axes: Sequence[Axes], runs: Mapping[str, Outcome]) -> None:
    x, y = np.linspace(0.08, 0.34, 80), np.linspace(0, 0.26, 80)
    grid = np.abs(np.outer(y, x) - TARGET)
    for panel, (title, outcome) in zip(axes, runs.items(), strict=True):
        panel.contourf(x, y, grid, 9, colors=[str(shade) for shade in np.linspace(0.98, 0.72, 9)])
        panel.plot(x, TARGET / x, color="#0f172a", linestyle=":", linewidth=1.2)
        panel.plot(TARGET**0.5, TARGET**0.5, "D", color="none", markeredgecolor="#0f172a", markersize=13, zorder=3)
        for start, path, end, step, color in zip(
            STARTS,
            outcome["paths"],
            outcome["end"],
            outcome["arrived"],
            (plots.PALETTE[3], plots.PALETTE[0]),
            strict=False,
        ):
            panel.plot(*np.array([*path, end]).T, color=color, linewidth=0.7)
            panel.plot(*start, "o", color=color, markersize=6)
            label = f"from {_point(start)}: " + (f"{step} steps to the flat end" if step else "never there")
            panel.plot(*end, "s", color=color, markersize=5, markeredgecolor="white", linestyle="-", label=label)
        panel.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal", xlabel="w1", ylabel="w2")
        panel.grid(visible=False)
        panel.set_title(title, loc="left", fontsize=10)
        panel.legend(loc="upper right", fontsize=8)


def _draw_maps(axes: Sequence[Axes], settings: Settings, cells: Mapping[str, Mapping[float, np.ndarray]]) -> None:
    edges = np.linspace(0, settings.widest, settings.side + 1)
    valley = np.linspace(TARGET / settings.widest, settings.widest, 50)
    colors = ListedColormap(list(OUTCOMES.values()))
    panels = iter(axes)
    for method, by_rho in cells.items():
        for i, (rho, kinds) in enumerate(by_rho.items()):
            panel = next(panels)
            panel.pcolormesh(edges, edges, kinds, cmap=colors, vmin=-0.5, vmax=2.5, linewidth=0.3, edgecolor="white")
            panel.plot(valley, TARGET / valley, color="#0f172a", linewidth=0.8)
            panel.set(xlim=(0, settings.widest), ylim=(0, settings.widest), aspect="equal", xticks=[], yticks=[])
            panel.set_title(f"{rho:g}" if i else f"rho = {rho:g}", fontsize=9)
            panel.set_ylabel("" if i else method)
    handles = [Patch(color=color, label=label) for label, color in OUTCOMES.items()]
    columns = 3 if len(next(iter(cells.values()))) > 4 else 1  # the figure is as wide as the maps
    axes[0].figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _cells(outcome: Outcome, side: int) -> np.ndarray:
    """0, 1, 2 as in OUTCOMES, w2 by row and w1 by column."""
    low, flat = (np.array(outcome[key][len(STARTS) :], dtype=int).reshape(side, side).T for key in ("low", "flat"))
    kinds: np.ndarray = low + flat
    return kinds


def _point(w: Sequence[float]) -> str:
    return f"({w[0]:.3g}, {w[1]:.3g})"


def _count(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "never"
