"""Image classification without label noise: SGD at equal compute, SAM and ASAM on several data sets and networks."""

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
from .tuned import SPLITS, Method, Tuning, trained

TWICE = "SGD, twice the epochs"
NETWORKS = "densenet121 resnet20 resnet56 vgg19-bn resnext29-32x4d wrn28-2 wrn28-10 pyramidnet272"
FIELDS = "data_dir test_size batch_size label_smoothing device evaluate_every"
PAPER = (
    "The paper's test accuracies with WRN-28-10, best of a run, as later work quotes them (SGD / SAM / ASAM): CIFAR-10 "
    "96.34 / 96.98 / 97.28, CIFAR-100 81.56 / 83.42 / 83.68."
)


@dataclass(frozen=True)
class Part:
    """A data set, its networks and the rho to try. A single rho is taken as it is, of several one is chosen."""

    dataset: str
    networks: tuple[str, ...]
    rho_sam: tuple[float, ...]
    rho_asam: tuple[float, ...]
    lr: float = 0.1
    epochs: int = 15
    train_size: int | None = None
    augment: bool = True


@dataclass(frozen=True)
class Settings:
    """What is trained on, and how."""

    parts: tuple[Part, ...]
    seeds: int = 5
    tuning_seeds: int = 1
    data_dir: str | None = None
    test_size: int | None = None
    batch_size: int = 100
    label_smoothing: float = 0.1
    device: str = "cpu"
    evaluate_every: int = 5


def _tuning(settings: Settings, part: Part) -> Tuning:
    base = Run("sgd", dataset=part.dataset, lr=part.lr, epochs=part.epochs).but(
        train_size=part.train_size,
        augment=part.augment,
        **{name: getattr(settings, name) for name in FIELDS.split()},
    )
    return Tuning(
        groups={f"{part.dataset}, {network}": base.but(model=network) for network in part.networks},
        methods=[
            Method("SGD"),
            Method(TWICE, {"epochs": 2 * part.epochs}),
            Method("SAM", {"method": "sam"}, "rho", part.rho_sam),
            Method("ASAM", {"method": "asam"}, "rho", part.rho_asam),
        ],
        seeds=settings.seeds,
        tuning_seeds=settings.tuning_seeds,
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return {name: run for part in settings.parts for name, run in _tuning(settings, part).plan(outcomes).items()}


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    findings, tables, figures = [], [], []
    for part in settings.parts:
        tuning = _tuning(settings, part)
        for group in tuning.groups:
            findings += [
                tuning.finding(group, a, b, outcomes, f" on {group}")
                for a, b in (("ASAM", TWICE), ("ASAM", "SAM"), ("SAM", TWICE))
            ]
            errors = {m.label: tuning.values(group, m.label, outcomes) for m in tuning.methods}
            name = group.replace(", ", "-")
            caption = "A dot a seed, grey lines between the same seeds; diamonds: mean and sd."
            svg = plots.dots(errors, "test error (%)", from_zero=False)
            figures.append(Figure(name, f"Test error on {group}", caption, svg))
        what = ", ".join([part.dataset, *(part.networks if len(part.networks) == 1 else [])])
        tables.append(Table(f"Test error on {what}, last epoch, %", tuning.headings(), tuning.rows(outcomes)))
        fits = [
            (m.label, *(pair(tuning.values(group, m.label, outcomes, "train_error")) for group in tuning.groups))
            for m in tuning.methods
        ]
        headings = ("method", *(f"{group}: training error %" for group in tuning.groups))
        tables.append(Table(f"Training error on {what}, last epoch, %", headings, fits))
    notes = (
        SPLITS,
        "Test error at the last epoch. SGD with twice the epochs has the compute of SAM and ASAM.",
        "Where the training error is as high as the test error the network underfits, and what "
        "regularizes it has nothing to gain.",
        "Where several rho are given, validation data of other seeds chooses.",
        f"Where augment is set: random crops, and mirroring where a mirrored image is as good. {PAPER} The "
        "paper reports the best test accuracy of a run; here it is the last epoch's.",
    )
    return Findings(findings, tables, figures, notes)


def _check(settings: Settings) -> None:
    for part in settings.parts:
        load(part.dataset, settings.data_dir, 0.0, 0, part.train_size)
        with torch.device("meta"):
            for network in part.networks:
                build(network, (3, 32, 32), 10)


# so few images and so many epochs that the networks fit them: else there is no gap to close
FITTED: dict[str, Any] = {"epochs": 60, "train_size": 2000, "augment": False}

STUDY = Study(
    name="images",
    title="Image classification",
    source="Tables 2 and 3",
    settings={
        "quick": Settings(
            (Part("fashion-mnist", ("cnn", "resnet20"), (0.05,), (0.5,), epochs=1, train_size=100),),
            seeds=1,
            test_size=100,
            evaluate_every=1,
        ),
        "laptop": Settings(
            (
                Part("fashion-mnist", ("cnn",), (0.02, 0.05, 0.1, 0.2), (0.25, 0.5, 1.0, 2.0), **FITTED),
                Part("fashion-mnist", ("mlp",), (0.05, 0.1, 0.2, 0.4), (0.5, 1.0, 2.0, 4.0), lr=0.05, **FITTED),
                Part(
                    "glyphs", ("mlp",), (0.05, 0.1, 0.2, 0.4), (0.25, 0.5, 1.0, 2.0), lr=0.05, epochs=20, augment=False
                ),
            )
        ),
        "paper": Settings(
            (
                Part("cifar10", tuple(NETWORKS.split()), (0.05,), (0.5,), epochs=200, train_size=50_000),
                Part("cifar100", tuple(NETWORKS.split()), (0.1,), (1.0,), epochs=200, train_size=50_000),
            ),
            seeds=3,
            batch_size=128,
            device="auto",
            evaluate_every=1,
        ),
    },
    plan=_plan,
    perform=trained,
    report=_report,
    check=_check,
)
