"""Label noise, and what it takes to beat a well-regularized SGD.

The paper compares SGD, SAM and ASAM under symmetric label noise. Plain SGD memorizes wrong labels, so the honest
baselines are those that keep it from that: early stopping, a stronger weight decay, and as much compute as ASAM has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import plots
from ..data import load
from ..models import build
from ..run import Run
from ..statistics import pair
from ..study import Figure, Findings, Outcome, Study, Table
from .tuned import SPLITS, TOGETHER, Method, Tuning, lower, trained

EARLY = "SGD, early stopping"
TWICE = "SGD, twice the epochs"
DECAY = "SGD, weight decay"
PAPER = (
    "The paper's test accuracies on CIFAR-10 with ResNet-32 (SGD / SAM / ASAM): 0 % noise 94.50 / 94.80 / 94.88, "
    "20 % 91.32 / 92.94 / 93.21, 40 % 87.68 / 90.62 / 90.89, 60 % 82.50 / 86.58 / 87.41, 80 % 68.35 / 69.92 / 67.69."
)


@dataclass(frozen=True)
class Settings:
    """The network, the data and what is tried. The numbers of epochs are of all but SGD at equal compute."""

    seeds: int = 16
    tuning_seeds: int = 3
    epochs: int = 60
    dataset: str = "digits"
    model: str = "mlp"
    data_dir: str | None = None
    device: str = "cpu"
    lr: float = 0.03
    batch_size: int = 50
    label_smoothing: float = 0.0
    augment: bool = False
    noises: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    rho_sam: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4)
    rho_asam: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    decays: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)


def _tuning(settings: Settings) -> Tuning:
    base: dict[str, Any] = {
        key: getattr(settings, key)
        for key in (
            "epochs",
            "dataset",
            "model",
            "data_dir",
            "device",
            "lr",
            "batch_size",
            "label_smoothing",
            "augment",
        )
    }
    return Tuning(
        groups={_group(noise): Run("sgd").but(noise=noise, **base) for noise in settings.noises},
        methods=[
            Method("SGD"),
            Method(TWICE, {"epochs": 2 * settings.epochs}),
            Method(DECAY, {}, "weight_decay", settings.decays),
            Method("SAM", {"method": "sam"}, "rho", settings.rho_sam),
            Method("ASAM", {"method": "asam"}, "rho", settings.rho_asam),
        ],
        seeds=settings.seeds,
        tuning_seeds=settings.tuning_seeds,
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return _tuning(settings).plan(outcomes)


def early_stopped(outcome: Outcome) -> float:
    """Test error at the epoch of the lowest validation error, the first of them."""
    validation = outcome["curves"]["validation_error"]
    error: float = outcome["curves"]["test_error"][validation.index(min(validation))]
    return error


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    tuning = _tuning(settings)
    errors: dict[str, dict[str, list[float]]] = {}
    for group in tuning.groups:
        errors[group] = {m.label: tuning.values(group, m.label, outcomes) for m in tuning.methods}
        errors[group][EARLY] = [early_stopped(outcomes[f"{group}/SGD/seed{seed}"]) for seed in range(settings.seeds)]
    findings = []
    for noise in settings.noises:
        for a, b in (("ASAM", "SGD"), ("ASAM", TWICE), ("ASAM", DECAY), ("ASAM", EARLY), ("ASAM", "SAM")):
            of = errors[_group(noise)]
            findings.append(lower(f"{a} has a lower test error than {b} at {noise:.0%} noise", of[a], of[b]))
    labels = ["SGD", EARLY, TWICE, DECAY, "SAM", "ASAM"]
    table = Table(
        "Test error, %",
        ("method", *(f"{noise:.0%} noise" for noise in settings.noises)),
        [(label, *(pair(errors[_group(noise)][label]) for noise in settings.noises)) for label in labels],
    )
    chosen = Table(
        "Chosen on validation data",
        ("method", *(f"{noise:.0%} noise" for noise in settings.noises)),
        [
            (m.label, *(tuning.chosen(_group(noise), m, outcomes) for noise in settings.noises))
            for m in tuning.methods
            if m.values
        ],
    )
    x = [100 * noise for noise in settings.noises]
    curves = {label: (x, [errors[_group(noise)][label] for noise in settings.noises]) for label in labels}
    figure = Figure(
        "noise",
        "Test error over label noise",
        "Mean over seeds, band: standard error. Clean test labels.",
        plots.lines(curves, "wrong training labels (%)", "test error (%)"),
    )
    notes = (
        SPLITS,
        f"{len(findings)} claims are tested at 95 % each: about one in forty would seem to hold by chance alone.",
        "A wrong label is another class, drawn uniformly. Validation and test labels are clean. rho and the "
        "weight decay are chosen by validation error on seeds that are not reported, the epoch of early stopping by "
        "that of the run itself.",
        "The gain over plain SGD is mostly a gain over memorizing wrong labels. Compare with the other baselines.",
        f"Twice the epochs of SGD is equal compute: ASAM takes two gradients a step. {PAPER}",
    )
    return Findings(findings, [table, chosen], [figure], notes)


def _group(noise: float) -> str:
    return f"noise={noise:g}"


def _check(settings: Settings) -> None:
    load(settings.dataset, settings.data_dir, 0.0, 0)
    with torch.device("meta"):
        build(settings.model, (3, 32, 32), 10)


STUDY = Study(
    name="noise",
    title="Label noise",
    source="Table 6",
    settings={
        "quick": Settings(2, 1, 2, noises=(0.0, 0.4), rho_sam=(0.2, 0.4), rho_asam=(2.0, 3.0), decays=(0.01, 0.02)),
        "laptop": Settings(),
        "paper": Settings(
            seeds=3,
            tuning_seeds=1,
            epochs=200,
            dataset="cifar10",
            model="resnet32",
            device="auto",
            lr=0.1,
            batch_size=128,
            label_smoothing=0.1,
            augment=True,
            rho_sam=(0.05, 0.1, 0.2),
            rho_asam=(0.5, 1.0, 2.0),
            decays=(5e-4, 1e-3, 2e-3),
        ),
    },
    plan=_plan,
    perform=trained,
    together=TOGETHER,
    report=_report,
    check=_check,
)
