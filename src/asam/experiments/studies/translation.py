"""Translation with a Transformer: Adam, also for twice the epochs, and Adam with the gradients of SAM and of ASAM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .. import InputError, plots
from ..parallel_text import load
from ..run import Run
from ..statistics import mean_sd, pair, paired_difference
from ..study import Figure, Finding, Findings, Outcome, Study, Table, finding
from .tuned import Method, Tuning, trained

GROUP = "translation"
TWICE = "Adam, twice the epochs"
FIELDS = """data_dir train_size test_size model epochs batch_size lr schedule warmup weight_decay dropout
    label_smoothing device evaluate_every"""
PAPER = (
    "The paper's test BLEU on IWSLT'14 German-English, as later work quotes it: Adam 34.86, Adam + SAM 34.78, "
    "Adam + ASAM 35.02, with rho 0.1 for SAM and 0.2 for ASAM."
)


@dataclass(frozen=True)
class Settings:
    """The network and how it is trained. A single rho is taken as it is; of several, validation loss chooses."""

    seeds: int = 3
    tuning_seeds: int = 1
    data_dir: str | None = None
    needs_data_dir: bool = False
    train_size: int | None = None
    test_size: int | None = None
    model: str = "transformer-tiny"
    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-3
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 1e-4
    dropout: float = 0.0
    label_smoothing: float = 0.1
    device: str = "cpu"
    evaluate_every: int = 1
    rho_sam: tuple[float, ...] = (0.02, 0.05, 0.1)
    rho_asam: tuple[float, ...] = (0.05, 0.1, 0.2)


def _tuning(settings: Settings) -> Tuning:
    base = Run("sgd", optimizer="adam", beta2=0.98, dataset="help-texts")
    return Tuning(
        groups={GROUP: base.but(**{name: getattr(settings, name) for name in FIELDS.split()})},
        methods=[
            Method("Adam"),
            Method(TWICE, {"epochs": 2 * settings.epochs}),
            Method("Adam + SAM", {"method": "sam"}, "rho", settings.rho_sam),
            Method("Adam + ASAM", {"method": "asam"}, "rho", settings.rho_asam),
        ],
        seeds=settings.seeds,
        tuning_seeds=settings.tuning_seeds,
        metric="validation_loss",
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return _tuning(settings).plan(outcomes)


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    tuning = _tuning(settings)
    bleu = {method.label: tuning.values(GROUP, method.label, outcomes, "test_bleu") for method in tuning.methods}
    findings = [_higher(bleu, "Adam + ASAM", other) for other in ("Adam", TWICE, "Adam + SAM")]
    rows = []
    for method in tuning.methods:
        rho = tuning.choice(GROUP, method, outcomes)
        columns = [bleu[method.label]]
        columns += [
            tuning.values(GROUP, method.label, outcomes, metric) for metric in ("validation_bleu", "validation_loss")
        ]
        cells = [pair(values, digits) for values, digits in zip(columns, (2, 2, 3), strict=True)]
        rows.append((method.label, *cells, "" if rho is None else f"{rho:g}"))
    table = Table(
        "BLEU and validation loss, mean ± sd",
        ("method", "test BLEU", "validation BLEU", "validation loss", "rho"),
        rows,
    )
    figure = Figure(
        "translation",
        "Test BLEU",
        "A dot a seed, grey lines between the same seeds; diamonds: mean and sd.",
        plots.svg(lambda axes: _draw(axes, bleu), (8, 2.7)),
    )
    notes = (
        "Higher BLEU is better. Adam with twice the epochs has the compute of SAM and ASAM, which take two gradients a "
        "step. Seeds change initial weights, batches and dropout; the pairs and their parts stay.",
        "Where several rho are given, the validation loss of another seed chooses. BLEU is sacrebleu's, of greedy "
        "translations; the paper's is not (a beam, and other tokens, are usual for IWSLT'14), so compare differences.",
        "Without a folder of IWSLT'14 the pairs are short ones of LibreOffice's help: formulaic texts, a network of "
        "one layer, and few epochs; how far twice as many get tells how far the others are from the end of training, "
        f"where generalization is compared. {PAPER}",
    )
    return Findings(findings, [table], [figure], notes)


def _higher(bleu: Mapping[str, list[float]], a: str, b: str) -> Finding:
    found = paired_difference(bleu[a], bleu[b])
    return finding(
        f"{a} has a higher test BLEU than {b}",
        f"difference in BLEU, better on {sum(x > y for x, y in zip(bleu[a], bleu[b], strict=True))} of {found.n} seeds",
        found.mean,
        found.low,
        found.high,
        found.n,
        holds="above",
    )


def _draw(axes: Axes, bleu: Mapping[str, list[float]]) -> None:
    labels = list(bleu)[::-1]
    axes.plot(np.array([bleu[label] for label in labels]), range(len(labels)), color="#cbd5e1", linewidth=0.6)
    for y, label in enumerate(labels):
        color = plots.COLORS.get(label.removeprefix("Adam + "), plots.COLORS["SGD"])
        mean, sd = mean_sd(bleu[label])
        axes.scatter(bleu[label], np.full(len(bleu[label]), y), s=18, color=color, alpha=0.45, linewidths=0)
        axes.errorbar(mean, y + 0.22, xerr=sd, color=color, marker="D", markersize=5, capsize=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlabel("test BLEU")


def _check(settings: Settings) -> None:
    if settings.needs_data_dir and settings.data_dir is None:
        raise InputError(
            "this scale needs IWSLT'14 German-English: name a folder of train, valid and test files (.de, .en) with "
            "--data-dir"
        )
    load(settings.data_dir)


_PAPER_SCALE: dict[str, Any] = {
    "needs_data_dir": True,
    "model": "transformer-iwslt",
    "epochs": 50,
    "batch_size": 128,
    "lr": 5e-4,
    "schedule": "inverse-sqrt",
    "warmup": 4000,
    "dropout": 0.3,
    "device": "auto",
    "rho_sam": (0.1,),
    "rho_asam": (0.2,),
}

STUDY = Study(
    name="translation",
    title="Translation with a Transformer",
    source="Table 5",
    settings={
        "quick": Settings(
            1, train_size=300, test_size=50, epochs=1, warmup=5, rho_sam=(0.05, 0.1), rho_asam=(0.1, 0.2)
        ),
        "laptop": Settings(),
        "paper": Settings(**_PAPER_SCALE),
    },
    plan=_plan,
    perform=trained,
    report=_report,
    check=_check,
)
