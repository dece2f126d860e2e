"""How sensitive is the test error to rho, for each normalization and bias policy?

Each has its own grid, since rho is measured in other units. What can be compared is the width of the window in which
rho does well: the ratio of its ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

import numpy as np

from .. import plots
from ..data import load
from ..run import Run
from ..statistics import pair
from ..study import Figure, Findings, Outcome, Study, Table, finding
from .tuned import TOGETHER, trained

RESAMPLES = 2000
BASE = "ASAM, elementwise, unscaled"


@dataclass(frozen=True)
class Settings:
    """Digits with label noise and the small multilayer perceptron. A grid: its first value, and how many by sqrt 2."""

    seeds: int = 6
    epochs: int = 60
    noise: float = 0.4
    tolerance: float = 2.0  # points of test error above the best that still do well
    fixed: tuple[float, int] = (0.05, 9)
    elementwise: tuple[float, int] = (0.5, 10)
    filterwise: tuple[float, int] = (0.1, 8)
    layerwise: tuple[float, int] = (0.0125, 8)


def grid(first: float, count: int) -> list[float]:
    """A logarithmic grid in steps of the square root of 2."""
    return [float(f"{first * 2 ** (i / 2):.3g}") for i in range(count)]


def _variants(settings: Settings) -> dict[str, tuple[Run, list[float]]]:
    base = Run("asam").but(epochs=settings.epochs, noise=settings.noise)
    variants = {"SAM": (base.but(method="sam"), grid(*settings.fixed))}
    for normalization in ("elementwise", "filterwise", "layerwise"):
        for bias in ("unscaled", "scaled", "fixed"):
            run = base.but(normalization=normalization, bias=bias)
            variants[f"ASAM, {normalization}, {bias}"] = (run, grid(*getattr(settings, normalization)))
    return variants


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return {
        f"{label}/rho={rho:g}/seed{seed}": run.but(rho=rho, seed=seed)
        for label, (run, rhos) in _variants(settings).items()
        for rho in rhos
        for seed in range(settings.seeds)
    }


def window(rhos: Sequence[float], errors: Sequence[float], tolerance: float) -> float:
    """How wide rho may be chosen: log2 of the ratio of the ends of the window around the best rho.

    The error is interpolated over log rho, and the window ends where it leaves the best by more than the tolerance, or
    with the grid.

    Example:
        >>> window([1.0, 2.0, 4.0, 8.0], [12.0, 10.0, 10.0, 12.0], tolerance=1.0)
        2.0
    """
    best = int(np.argmin(errors))
    limit = errors[best] + tolerance

    def end(indices: Sequence[int]) -> float:
        inside = log2(rhos[best])
        for before, after in pairwise(indices):
            if errors[after] > limit:
                share = (limit - errors[before]) / (errors[after] - errors[before])
                return log2(rhos[before]) + share * (log2(rhos[after]) - log2(rhos[before]))
            inside = log2(rhos[after])
        return inside

    return end(range(best, len(rhos))) - end(range(best, -1, -1))


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    variants = _variants(settings)
    errors = {
        label: np.array(
            [
                [outcomes[f"{label}/rho={rho:g}/seed{seed}"]["test_error"] for seed in range(settings.seeds)]
                for rho in rhos
            ]
        )
        for label, (_, rhos) in variants.items()
    }
    # the same seeds are drawn for all variants, so that differences are paired
    drawn = np.random.default_rng(0).integers(settings.seeds, size=(RESAMPLES, settings.seeds))

    def width(label: str, seeds: Sequence[int] | np.ndarray) -> float:
        return window(variants[label][1], list(errors[label][:, seeds].mean(axis=1)), settings.tolerance)

    everything = range(settings.seeds)
    resampled = {label: np.array([width(label, seeds) for seeds in drawn]) for label in variants}
    widths = {label: width(label, everything) for label in variants}
    findings = []
    for label in variants:
        if label != "SAM":
            low, high = np.quantile(resampled[label] - resampled["SAM"], (0.025, 0.975))
            known = settings.seeds > 1  # a single seed has no interval, though its resamples have quantiles
            findings.append(
                finding(
                    f"{label}: the window of good rho is wider than SAM's",
                    "difference in factors of 2",
                    widths[label] - widths["SAM"],
                    float(low) if known else None,
                    float(high) if known else None,
                    settings.seeds,
                    holds="above",
                )
            )
    rows = []
    for label, (_, rhos) in variants.items():
        best = int(errors[label].mean(axis=1).argmin())
        low, high = np.exp2(np.quantile(resampled[label], (0.025, 0.975)))
        width_shown = f"x{2 ** widths[label]:.2f} [{low:.2f}, {high:.2f}]"
        edge = "at the edge of the grid" if best in (0, len(rhos) - 1) else ""
        rows.append((label, f"{rhos[best]:g}", pair(list(errors[label][best])), width_shown, edge))
    table = Table(
        "The best rho, and how much it may be missed", ("method", "best rho", "test error %", "window", ""), rows
    )

    def curve(label: str) -> tuple[Sequence[float], Sequence[Sequence[float]]]:
        rhos = variants[label][1]
        best = rhos[int(errors[label].mean(axis=1).argmin())]
        return [rho / best for rho in rhos], [list(row) for row in errors[label]]

    def figure(name: str, title: str, labels: Sequence[str]) -> Figure:
        svg = plots.lines(
            {label: curve(label) for label in labels}, "rho / best rho", "test error (%)", log_x=True, top=100
        )
        return Figure(name, title, "Mean over seeds, band: standard error.", svg)

    figures = [
        figure("rho", "Normalizations", ["SAM", *(label for label in variants if label.endswith(", unscaled"))]),
        figure("rho-bias", "Bias policies", ["SAM", *(label for label in variants if ", elementwise" in label)]),
    ]
    notes = (
        "The test error is that of the last epoch. The best rho is the best on these seeds and this test data: it "
        "serves to lay the curves over each other, not to compare methods.",
        f"The window holds every rho whose mean error is within {settings.tolerance:g} points of the best one's, as a "
        "ratio of its ends; intervals: 95 %, bootstrap over seeds, which are few. Where the error jumps between two "
        "rho of the grid, the end of the window lies somewhere between them, by interpolation.",
        f"{len(findings)} claims are tested at 95 % each.",
    )
    return Findings(findings, [table], figures, notes)


STUDY = Study(
    name="rho",
    title="Sensitivity to rho",
    source="Figure 4",
    settings={
        "quick": Settings(2, 2, fixed=(0.1, 3), elementwise=(1.0, 3), filterwise=(0.2, 3), layerwise=(0.02, 3)),
        "laptop": Settings(),
    },
    plan=_plan,
    perform=trained,
    together=TOGETHER,
    report=_report,
    check=lambda settings: load("digits", None, settings.noise, 0),
)
