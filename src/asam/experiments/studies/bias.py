"""Which parameters to perturb: the bias policy changes the algorithm.

The paper leaves biases unscaled: their scale is 1, and all share one norm, so that on a small network the biases
can take nearly all of the perturbation. The alternatives: scale them as weights, do not perturb them, perturb weights
of two dimensions or more only, perturb normalization layers only. Each tunes its own rho: rho does not carry over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from .. import plots
from ..data import load
from ..run import Run
from ..statistics import pair, paired_difference
from ..study import Figure, Findings, Outcome, Study, Table, finding
from .tuned import SPLITS, Method, Tuning, trained

UNSCALED = "ASAM, biases unscaled (the paper)"


@dataclass(frozen=True)
class Settings:
    """Digits with label noise and a convolutional network with batch norm."""

    seeds: int = 12
    tuning_seeds: int = 3
    epochs: int = 30
    noise: float = 0.4
    rho_sam: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    rho_asam: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    rho_norm: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)


def _tuning(settings: Settings) -> Tuning:
    def asam(label: str, rhos: tuple[float, ...], **changes: str) -> Method:
        return Method(f"ASAM, {label}", {"method": "asam", **changes}, "rho", rhos)

    return Tuning(
        groups={"digits": Run("sgd", model="cnn", epochs=settings.epochs, noise=settings.noise)},
        methods=[
            Method("SGD"),
            Method("SGD, twice the epochs", {"epochs": 2 * settings.epochs}),
            Method("SAM, all parameters", {"method": "sam"}, "rho", settings.rho_sam),
            Method("SAM, weights only", {"method": "sam", "perturb": "weights"}, "rho", settings.rho_sam),
            asam("biases unscaled (the paper)", settings.rho_asam, bias="unscaled"),
            asam("biases scaled", settings.rho_asam, bias="scaled"),
            asam("biases fixed", settings.rho_asam, bias="fixed"),
            asam("weights only", settings.rho_asam, perturb="weights"),
            asam("norm layers only", settings.rho_norm, perturb="norm", bias="scaled"),
        ],
        seeds=settings.seeds,
        tuning_seeds=settings.tuning_seeds,
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return _tuning(settings).plan(outcomes)


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    tuning = _tuning(settings)
    errors = {m.label: tuning.values("digits", m.label, outcomes) for m in tuning.methods}
    order = sorted(errors, key=lambda label: fmean(errors[label]))
    findings = [
        tuning.finding("digits", a, b, outcomes, "")
        for a, b in (
            ("ASAM, weights only", UNSCALED),
            ("ASAM, biases scaled", UNSCALED),
            ("ASAM, norm layers only", UNSCALED),
            ("ASAM, weights only", "SAM, weights only"),
            ("ASAM, weights only", "SGD, twice the epochs"),
        )
    ]
    spread = paired_difference(errors["ASAM, weights only"], errors[UNSCALED])
    findings.append(
        finding(
            "Weights only and the paper's policy differ by more than a point of test error",
            "size of the difference in points",
            abs(spread.mean),
            None if spread.low is None or spread.high is None else _nearest_to_zero(spread.low, spread.high),
            None if spread.low is None or spread.high is None else max(abs(spread.low), abs(spread.high)),
            spread.n,
            holds="above",
            limit=1.0,
        )
    )
    by_label = {m.label: m for m in tuning.methods}
    rows = [(label, pair(errors[label]), tuning.chosen("digits", by_label[label], outcomes)) for label in order]
    table = Table("Test error, from the best", ("what is perturbed", "test error %", "rho"), rows)
    caption = "A dot a seed, grey lines between the same seeds; diamonds: mean and sd."
    figure = Figure("bias", "Test error by what is perturbed", caption, plots.dots(errors, "test error (%)"))
    notes = (
        SPLITS,
        "Every row tunes its own rho on validation data of other seeds; rho does not carry over between the rows.",
        "ASAM scales a batch norm's gamma by |gamma| + eta; with weights only it is not perturbed.",
        f"The best of several rows is not a test: the closest rival of the best row, {order[0]}, is {order[1]}.",
    )
    return Findings(findings, [table], [figure], notes)


def _nearest_to_zero(low: float, high: float) -> float:
    return 0.0 if low <= 0 <= high else min(abs(low), abs(high))


STUDY = Study(
    name="bias",
    title="Which parameters to perturb",
    source="The bias policy of the paper's experiments, and SAM-ON's",
    settings={
        "quick": Settings(2, 1, 1, rho_sam=(0.2,), rho_asam=(2.0,), rho_norm=(2.0,)),
        "laptop": Settings(),
    },
    plan=_plan,
    perform=trained,
    report=_report,
    check=lambda settings: load("digits", None, settings.noise, 0),
)
