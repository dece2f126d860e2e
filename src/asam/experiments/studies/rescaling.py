"""Does rho transfer? The same function with rescaled weights, trained with the same rho.

One layer of the initial network is multiplied by a and the next divided by it, which leaves the function as it is. The
ball of SAM does not know; that of ASAM is measured in units of the weights. rho is chosen once, at a = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from .. import plots
from ..data import load
from ..run import Run
from ..statistics import pair, paired_difference
from ..study import Figure, Findings, Outcome, Study, Table, finding
from .tuned import SPLITS, TOGETHER, Method, Tuning, lower, trained

COLLAPSED = 80.0  # % error; guessing among ten classes errs on 90


@dataclass(frozen=True)
class Settings:
    """Digits with label noise and the small multilayer perceptron."""

    seeds: int = 20
    tuning_seeds: int = 4
    epochs: int = 60
    noise: float = 0.4
    scales: tuple[float, ...] = (1 / 3, 1 / 2, 1.0, 2.0, 3.0)
    rho_sam: tuple[float, ...] = (0.2, 0.3, 0.35, 0.4, 0.45)
    rho_asam: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5, 4.0)


def _tuning(settings: Settings) -> Tuning:
    common = {"epochs": settings.epochs, "noise": settings.noise}
    return Tuning(
        groups={_group(scale): Run("sgd").but(scale=scale, **common) for scale in settings.scales},
        methods=[
            Method("SGD"),
            Method("SAM", {"method": "sam"}, "rho", settings.rho_sam),
            Method("ASAM", {"method": "asam"}, "rho", settings.rho_asam),
        ],
        seeds=settings.seeds,
        tuning_seeds=settings.tuning_seeds,
        tune_in=_group(1.0),
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return _tuning(settings).plan(outcomes)


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    tuning = _tuning(settings)
    errors = {
        method.label: [tuning.values(_group(scale), method.label, outcomes) for scale in settings.scales]
        for method in tuning.methods
    }
    at_one = settings.scales.index(1.0)
    # the scale with the highest mean error, the same for all seeds
    worst = {label: max(by_scale, key=fmean) for label, by_scale in errors.items()}
    lost = {label: paired_difference(worst[label], errors[label][at_one]) for label in errors}
    findings = [
        lower("At the worst scale ASAM has a lower test error than SAM", worst["ASAM"], worst["SAM"]),
        finding(
            "ASAM loses less than 5 points by rescaling",
            "points lost from a = 1 to the worst scale",
            lost["ASAM"].mean,
            lost["ASAM"].low,
            lost["ASAM"].high,
            lost["ASAM"].n,
            holds="below",
            limit=5.0,
        ),
        finding(
            "SAM loses more than 5 points by rescaling",
            "points lost from a = 1 to the worst scale",
            lost["SAM"].mean,
            lost["SAM"].low,
            lost["SAM"].high,
            lost["SAM"].n,
            holds="above",
            limit=5.0,
        ),
    ]
    table = Table(
        "Test error, %",
        ("method", *(f"a = {_fraction(scale)}" for scale in settings.scales), "rho", "collapsed"),
        [
            (
                method.label,
                *(pair(values) for values in errors[method.label]),
                tuning.chosen(_group(1.0), method, outcomes),
                f"{sum(error > COLLAPSED for row in errors[method.label] for error in row)} of "
                f"{settings.seeds * len(settings.scales)}",
            )
            for method in tuning.methods
        ],
    )
    found: dict[str, Any] = {"transfer": {"scales": list(settings.scales), "test_error": errors}}
    figure = Figure(
        "rescaling",
        "Test error over the scale",
        "The same rho on networks that start as the same function. A dot a seed, lines through the means.",
        plots.transfer(found, [_fraction(scale) for scale in settings.scales]),
    )
    notes = (
        SPLITS,
        "The worst scale of a method is the one with its highest mean error on the reported seeds.",
        "rho was chosen at a = 1 by validation error on seeds that are not used here.",
        f"Collapsed: a run that ends above {COLLAPSED:g} % test error, where guessing gives 90.",
        "Initial rescaling changes how SGD itself trains, too: see its row.",
    )
    return Findings(findings, [table], [figure], notes)


def _group(scale: float) -> str:
    return f"a={scale:.3g}"


def _fraction(scale: float) -> str:
    inverse = 1 / scale
    return f"1/{inverse:g}" if scale < 1 and np.isclose(inverse, round(inverse)) else f"{scale:g}"


STUDY = Study(
    name="rescaling",
    title="Does rho transfer to the same function with other weights?",
    source="Theorem 1 in training",
    settings={
        "quick": Settings(2, 1, 2, scales=(0.5, 1.0, 2.0), rho_sam=(0.2, 0.4), rho_asam=(2.0, 3.0)),
        "laptop": Settings(),
    },
    plan=_plan,
    perform=trained,
    together=TOGETHER,
    report=_report,
    check=lambda settings: load("digits", None, settings.noise, 0),
)
