"""Tables and plots of the correlation study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from ...measure import granulated_kendall, kendall
from .. import plots
from ..study import Figure, Table

if TYPE_CHECKING:
    from .correlation import Ranking

NAMES = {"batch_size": "batch size", "lr": "learning rate", "weight_decay": "weight decay", "dropout": "dropout"}


def table_one(ranking: Ranking, chosen: Mapping[str, int], rhos: Mapping[str, Sequence[float]]) -> Table:
    """Kendall's tau and the granulated psi of every measure at the rho that was chosen for it."""
    names = [name for name, values in ranking.hyperparameters.items() if len(set(values)) > 1]
    rows = []
    for measure, index in chosen.items():
        values = ranking.of(measure, index)
        tau = kendall(values, ranking.gaps)
        try:
            psi = granulated_kendall(values, ranking.gaps, {name: ranking.hyperparameters[name] for name in names})
            fine = [_interval(psi.psi[name], psi.intervals[name]) for name in names] + [
                _interval(psi.Psi, psi.interval)
            ]
        except ValueError:  # no two networks differ in one hyper-parameter only
            fine = ["-"] * (len(names) + 1)
        edge = " (edge)" if index in (0, len(rhos[measure]) - 1) else ""
        rows.append((measure, f"{rhos[measure][index]:g}{edge}", _interval(tau.tau_b, tau.interval_b), *fine))
    headings = ("measure", "rho", "tau", *(f"psi, {NAMES[name]}" for name in names), "Psi")
    return Table("Rank correlation with the generalization gap", headings, rows)


def table_rho(ranking: Ranking, rhos: Mapping[str, Sequence[float]]) -> Table:
    """Kendall's tau over rho, with the gap in error and with the gap in loss."""
    rows = []
    for measure, sizes in rhos.items():
        for index, rho in enumerate(sizes):
            values = ranking.of(measure, index)
            taus = (kendall(values, gaps) for gaps in (ranking.gaps, ranking.loss_gaps))
            rows.append((measure, f"{rho:g}", *(_interval(tau.tau_b, tau.interval_b) for tau in taus)))
    return Table("Kendall's tau over rho", ("measure", "rho", "gap in error", "gap in loss"), rows)


def figures(ranking: Ranking, chosen: Mapping[str, int], rhos: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Gap over sharpness for the ascents, colored by learning rate; and tau over rho."""
    measures = [name for name in chosen if name.endswith("ascent")]
    lrs = np.array(ranking.hyperparameters["lr"])

    def scatter(*axes: Axes) -> None:
        for panel, measure in zip(axes, measures, strict=True):
            values = np.array(ranking.of(measure, chosen[measure]))
            for i, lr in enumerate(sorted(set(lrs))):
                color = plots.PALETTE[i]
                panel.scatter(
                    values[lrs == lr],
                    np.array(ranking.gaps)[lrs == lr],
                    s=16,
                    color=color,
                    alpha=0.8,
                    label=f"lr {lr:g}",
                )
            tau = kendall(list(values), ranking.gaps)
            panel.set_title(f"{measure.rsplit(',', 1)[0]}: tau {tau.tau_b:.2f}", loc="left", fontsize=9)
            panel.set_xlabel(f"rise of the loss, rho = {rhos[measure][chosen[measure]]:g}")
            if values.min() > 0:
                panel.set_xscale("log")
                panel.xaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel("generalization gap (points)")
        axes[2].set_ylabel("generalization gap (points)")
        axes[0].legend(frameon=False, fontsize=8)

    def over_rho(axes: Axes) -> None:
        for i, (measure, sizes) in enumerate(rhos.items()):
            taus = [kendall(ranking.of(measure, index), ranking.gaps) for index in range(len(sizes))]
            style = "-" if measure.endswith("ascent") else "--"
            color = plots.PALETTE[i // 2]
            axes.plot(sizes, [tau.tau_b for tau in taus], style, color=color, marker="o", markersize=4, label=measure)
        axes.axhline(0, color="#475569", linewidth=0.8)
        plots.logarithmic(axes)
        axes.set_xlabel("rho")
        axes.set_ylabel("Kendall's tau")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return [
        Figure(
            "correlation",
            "Generalization gap over sharpness",
            "A dot a network, at the rho that was chosen on other networks.",
            plots.svg(scatter, (8, 6.4), columns=2, rows=2),
        ),
        Figure("tau", "Kendall's tau over rho", "All measures; dashed: one step.", plots.svg(over_rho, (8, 3.8))),
    ]


def _interval(value: float, interval: tuple[float, float]) -> str:
    return "-" if value != value else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
