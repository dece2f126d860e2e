"""Two weights, one valley: where SAM and ASAM go on the loss |w1 relu(w2) - 0.04|.

Every point of the valley w1 w2 = 0.04 is a minimum, and it is flattest where the weights are equal. SAM's step to the
worst point has one length for all weights: where w2 is smaller than it, the step may end at w2 < 0, where the
gradient is 0, and the weights never move again. ASAM's step is in units of the weights, and for rho < 1 takes none of
them through 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..statistics import paired_difference
from ..study import Findings, Outcome, Study, finding
from .toy_descent import STARTS, Settings, name, perform, plan
from .toy_report import figures, notes, tables

ENOUGH = 0.95  # of the starts
RESAMPLES = 1000


@dataclass(frozen=True)
class _Ranges:
    """What a method does for every rho from the starts of the grid, (rhos, starts)."""

    rhos: np.ndarray
    flat: np.ndarray
    steps: np.ndarray  # inf: never arrived

    def good(self, index: np.ndarray, most: float | np.ndarray = math.inf) -> np.ndarray:
        """At which rho enough of these starts get there, the median one in so many steps at most.

        Starts are given by their indices, (draws, starts), and the steps for every draw; the result is (rhos, draws).
        """
        good: np.ndarray = self.flat[:, index].mean(axis=-1) >= ENOUGH
        good &= np.median(self.steps[:, index], axis=-1) <= most
        return good

    def ends(self, index: np.ndarray, most: float | np.ndarray = math.inf) -> tuple[np.ndarray, np.ndarray]:
        """log2 of the smallest and of the largest good rho of each draw; where there is none, the grid's smallest."""
        good, log = self.good(index, most), np.log2(self.rhos)[:, None]
        largest = np.where(good, log, log[0]).max(axis=0)
        return np.where(good, log, largest).min(axis=0), largest

    def best(self, everything: np.ndarray) -> int:
        """The good rho of the fewest steps, by its index."""
        return int(np.where(self.good(everything)[:, 0], np.median(self.steps, axis=1), np.inf).argmin())


def _ranges(method: str, rhos: Sequence[float], outcomes: Mapping[str, Outcome]) -> _Ranges:
    runs = [outcomes[name(method, rho)] for rho in rhos]
    steps = np.array([run["arrived"][len(STARTS) :] for run in runs], dtype=float)
    flat = np.array([run["flat"][len(STARTS) :] for run in runs])
    return _Ranges(np.array(rhos), flat, np.where(steps == 0, np.inf, steps))


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    sam, asam = (_ranges(method, settings.rhos, outcomes) for method in ("SAM", "ASAM"))
    n = sam.flat.shape[1]
    everything, drawn = np.arange(n)[None], np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    sgd = _ranges("SGD", [0.0], outcomes).steps[0]

    def fast(method: _Ranges, index: np.ndarray) -> np.ndarray:
        """Factors of 2 between the ends of the range of rho that is twice as fast as SGD from the same starts."""
        smallest, largest = method.ends(index, np.median(sgd[index], axis=-1) / 2)
        width: np.ndarray = largest - smallest
        return width

    stuck = [
        [float(value) for value in outcomes[name(method, rho)]["stuck"][len(STARTS) :]]
        for method, rho in zip(("ASAM", "SAM"), reversed(settings.shown), strict=True)
    ]
    frozen = paired_difference(*stuck)
    findings = [
        finding(
            "ASAM does not freeze where SAM does",
            f"share of starts that freeze, ASAM {settings.shown[1]:g} minus SAM {settings.shown[0]:g}",
            *(frozen.mean, frozen.low, frozen.high, n),
            holds="below",
        )
    ]
    for claim, quantity, here, resampled in (
        (
            "ASAM bears a larger rho",
            "largest rho that brings 95 % of the starts to the flat end, in factors of 2 above SAM's",
            asam.ends(everything)[1] - sam.ends(everything)[1],
            asam.ends(drawn)[1] - sam.ends(drawn)[1],
        ),
        (
            "ASAM's range of rho that is twice as fast as SGD is wider than SAM's",
            "difference of the ranges, in factors of 2 between their ends",
            fast(asam, everything) - fast(sam, everything),
            fast(asam, drawn) - fast(sam, drawn),
        ),
    ):
        low, high = np.quantile(resampled, (0.025, 0.975))
        findings.append(finding(claim, quantity, float(here[0]), float(low), float(high), n, holds="above"))
    fastest = [np.log2(method.steps[method.best(everything)]) for method in (asam, sam)]
    both = np.isfinite(fastest).all(axis=0)
    if both.any():
        faster = paired_difference(*(list(map(float, steps[both])) for steps in fastest))
        findings.append(
            finding(
                "ASAM is sooner at the flat end than SAM, each with the rho that is fastest",
                "steps, in factors of 2 of SAM's",
                *(faster.mean, faster.low, faster.high, faster.n),
                holds="below",
            )
        )
    return Findings(findings, tables(settings, outcomes), figures(settings, outcomes), notes(settings))


STUDY = Study(
    name="toy",
    title="Paths of SAM and ASAM in a valley",
    source="Figure 3",
    settings={
        "quick": Settings(steps=300, side=4, rhos=(0.02, 0.05, 0.5)),
        "laptop": Settings(),
    },
    plan=plan,
    perform=perform,
    report=_report,
)
