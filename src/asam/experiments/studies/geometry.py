"""Where sharpness looks for the worst point, at two weight vectors that are the same network.

The network w1 relu(w2 x) has two weights and computes the same function at (a w1, w2 / a). A ball of fixed size covers
another part of the loss there, and so sharpness changes. A ball measured in units of the weights, ||T_w^-1 e||_p <= rho
with T_w = diag(|w|), is stretched along, and holds the same losses.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from scipy import stats
from torch import Tensor, nn

from ...measure import Geometry, Objective, worst_case_sharpness
from .. import plots
from ..study import Figure, Finding, Findings, Outcome, Study, Table, finding

TARGET = 0.5
REGIONS = {
    "fixed ball, p = 2": Geometry("none", p=2),
    "fixed ball, p = inf": Geometry("none", p=math.inf),
    "normalized ball, p = inf": Geometry(p=math.inf, eta=0),
    "normalized ball, p = 2": Geometry(p=2, eta=0),
}
AROUND = 4096  # points of a region's boundary that are searched besides
CHANGED = 1.1  # a factor between two values of sharpness that is no rounding
ROUNDING = 1e-9
SHADES = [str(shade) for shade in np.linspace(0.98, 0.6, 13)]  # of gray
SHORTFALL = 1e-3


@dataclass(frozen=True)
class Settings:
    """How many random weights and rescalings, and the ones that are drawn: w and a."""

    pairs: int = 40
    rho_fixed: float = 0.15
    rho_normalized: float = 0.2
    steps: int = 10
    restarts: int = 6
    drawn: tuple[float, float, float] = (0.75, 0.75, 0.5)


@dataclass(frozen=True)
class Region:
    """One region around all the weights: the drawn ones first, then random ones."""

    region: str
    rho: float
    pairs: int
    steps: int
    restarts: int
    drawn: tuple[float, float, float]


class TwoWeights(nn.Module):
    """w1 relu(w2 x), whose loss is the square of its distance to the target at x = 1, halved."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The output for every x."""
        return self.weight[0] * torch.relu(self.weight[1] * x)


def loss(w1: Any, w2: Any) -> Any:
    """The loss over a grid of weights."""
    return (w1 * np.maximum(w2, 0) - TARGET) ** 2 / 2


def weights(pairs: int, drawn: tuple[float, float, float]) -> Iterator[tuple[float, float, float]]:
    """w1, w2 and a: the drawn ones, and random ones of which w1 w2 is within a factor of two of the target."""
    yield drawn
    generator = np.random.default_rng(0)
    for _ in range(pairs):
        w1, product, a = np.exp(generator.uniform(np.log([0.3, 0.5, 0.25]), np.log([3.0, 2.0, 4.0])))
        yield float(w1), float(TARGET * product / w1), float(a)


def boundary(w: Sequence[float], region: str, rho: float, points: int = AROUND) -> np.ndarray:
    """Points around the region, (points, 2): that of the p-norm, stretched by T_w."""
    geometry = REGIONS[region]
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)  # holds the corners of the square
    u = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    u /= np.linalg.norm(u, geometry.p, axis=1, keepdims=True)
    scales = geometry.scales({"weight": torch.tensor(w, dtype=torch.float64)})["weight"].numpy()
    points_around: np.ndarray = np.asarray(w) + rho * scales * u
    return points_around


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Region]:
    return {
        region: Region(
            region,
            settings.rho_fixed if geometry.normalization == "none" else settings.rho_normalized,
            settings.pairs,
            settings.steps,
            settings.restarts,
            settings.drawn,
        )
        for region, geometry in REGIONS.items()
    }


def perform(run: Region) -> Outcome:
    """Sharpness and the worst point at w and at Aw, and how much higher a search around the region gets."""
    found: dict[str, list[Any]] = {"at_w": [], "at_aw": [], "worst_w": [], "worst_aw": [], "missed": []}
    for w1, w2, a in weights(run.pairs, run.drawn):
        for place, w in (("w", (w1, w2)), ("aw", (a * w1, w2 / a))):
            objective = Objective(
                TwoWeights(w), lambda network, x: (network(x) - TARGET).square().mean() / 2, [torch.ones(1).double()]
            )
            result = worst_case_sharpness(
                objective, run.rho, geometry=REGIONS[run.region], steps=run.steps, restarts=run.restarts
            )
            assert result.perturbation is not None
            found[f"at_{place}"].append(result.value)
            found[f"worst_{place}"].append((np.asarray(w) + result.perturbation["weight"].numpy()).tolist())
            searched = float(loss(*boundary(w, run.region, run.rho).T).max()) - result.base_loss
            found["missed"].append(1 - result.value / searched)
    return found


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    runs = _plan(settings, outcomes)
    findings, rows = [], []
    for region, outcome in outcomes.items():
        logs = [abs(math.log(aw / w)) for w, aw in zip(outcome["at_w"][1:], outcome["at_aw"][1:], strict=True)]
        factors = [math.exp(log) for log in logs]
        if REGIONS[region].normalization == "none":
            half = float(stats.t.ppf(0.975, len(logs) - 1)) * stdev(logs) / len(logs) ** 0.5
            middle, low, high = (math.exp(fmean(logs) + shift) for shift in (0, -half, half))
            claim = f"{region.capitalize()}: sharpness changes though the function does not"
            quantity = "factor between w and Aw, geometric mean"
            findings.append(finding(claim, quantity, middle, low, high, len(logs), holds="above", limit=CHANGED))
        else:
            claim = f"{region.capitalize()}: sharpness is the same at w and at Aw"
            findings.append(_largest(claim, "relative change", [factor - 1 for factor in factors], ROUNDING))
        rows.append(
            (
                region,
                f"{runs[region].rho:g}",
                f"{outcome['at_w'][0]:.4f}",
                f"{outcome['at_aw'][0]:.4f}",
                _factor(median(factors)),
                _factor(max(factors)),
            )
        )
    missed = [share for outcome in outcomes.values() for share in outcome["missed"]]
    quantity = f"share of the sharpness that it misses, of {AROUND} points around the region"
    findings.append(_largest("The ascent finds the worst point of the region", quantity, missed, SHORTFALL))
    headings = ("region", "rho", "sharpness at w (drawn)", "at Aw", "factor, median of all", "largest")
    table = Table("Sharpness at w and at Aw, the same function", headings, rows)
    w1, w2, a = settings.drawn
    figure = Figure(
        "geometry",
        "Loss contours and the regions in which sharpness is taken",
        f"The loss (w1 relu(w2) - {TARGET:g})^2 / 2, light where it is low; its valley is dotted. w = ({w1:g}, {w2:g}) "
        f"and Aw = ({a * w1:g}, {w2 / a:g}) are the same network. A star marks the worst point of its region, and the "
        "broken line of its color runs through all weights of that loss: with a fixed ball a line for each point; with "
        "a normalized one the same line for both, on which the dashes of the two colors alternate.",
        plots.svg(lambda *axes: _draw(axes, runs, outcomes), (9, 9), columns=2, rows=2),
    )
    notes = (
        f"{settings.pairs} random weights and rescalings: w1 between 0.3 and 3, w1 w2 between half and twice the "
        "target, a between 1/4 and 4, all uniform in the logarithm. In float64.",
        "Interval: for the fixed balls, t over the logarithms; otherwise the range over all weights, which is what a "
        "claim about every rescaling has to stand.",
        "A region may hold two maxima, one on each side of the valley, and an ascent finds the lower one at times: "
        f"{settings.restarts} ascents are made, and compared with a search.",
        "The rho of fixed and normalized regions are in different units; where w1 = w2 they are chosen to be alike.",
    )
    return Findings(findings, [table], [figure], notes)


def _draw(axes: Sequence[Axes], runs: Mapping[str, Region], outcomes: Mapping[str, Outcome]) -> None:
    side = np.linspace(0, 1.95, 79)
    grid = loss(*np.meshgrid(side, side))
    for panel, (region, run) in zip(axes, runs.items(), strict=True):
        outcome = outcomes[region]
        w1, w2, a = run.drawn
        panel.contourf(side, side, grid, np.linspace(0, 3.4, 13) ** 2 / 2, colors=SHADES, extend="max")
        panel.plot(side[1:], TARGET / side[1:], color="#0f172a", linestyle=":", linewidth=1.2)
        for place, label, w, color in (
            ("w", "w", (w1, w2), plots.PALETTE[3]),
            ("aw", "Aw", (a * w1, w2 / a), plots.PALETTE[0]),
        ):
            worst, around = outcome[f"worst_{place}"][0], boundary(w, region, run.rho, 256)
            dashes = (0 if place == "w" else 5, (5, 5))  # where both lines are the same, their dashes alternate
            panel.contour(side, side, grid, [loss(*worst)], colors=[color], linewidths=1.3, linestyles=[dashes])
            panel.add_patch(Polygon(around, facecolor=(color, 0.3), edgecolor=color, linewidth=1.3))
            panel.plot(*w, "o", color=color, markersize=4)
            below = (w[0], float(around[:, 1].min()))
            panel.annotate(label, below, (0, -3), textcoords="offset points", ha="center", va="top", color=color)
            name = f"at {label}: {outcome[f'at_{place}'][0]:.4f}"
            panel.plot(*worst, "*", color=color, markersize=14, markeredgecolor="white", linestyle="", label=name)
        panel.set(xlim=(0, 1.95), ylim=(0, 1.95), aspect="equal", xlabel="w1", ylabel="w2")
        panel.grid(visible=False)
        panel.set_title(f"{region}, rho = {run.rho:g}", loc="left", fontsize=10)
        panel.legend(title="sharpness", loc="upper right", fontsize=9)


def _largest(claim: str, quantity: str, values: Sequence[float], limit: float) -> Finding:
    """The claim that all values are below a limit."""
    quantity = f"{quantity}: the largest, and the range over all"
    return finding(claim, quantity, max(values), min(values), max(values), len(values), holds="below", limit=limit)


def _factor(value: float) -> str:
    return f"1 + {value - 1:.1e}" if value - 1 < 1e-4 else f"{value:.3g}"


STUDY = Study(
    name="geometry",
    title="The regions in which sharpness is taken",
    source="Figure 1",
    settings={"quick": Settings(pairs=4), "laptop": Settings()},
    plan=_plan,
    perform=perform,
    report=_report,
)
