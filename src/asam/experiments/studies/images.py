"""Image classification without label noise: SGD at equal compute, SAM and ASAM on several data sets and networks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import plots
from ..data import load
from ..models import build
from ..run import Run
from ..study import Figure, Findings, Outcome, Study, Table
from .tuned import Method, Tuning, trained

TWICE = "SGD, twice the epochs"
NETWORKS = "densenet121 resnet20 resnet56 vgg19-bn resnext29-32x4d wrn28-2 wrn28-10 pyramidnet272"
FIELDS = "data_dir train_size test_size epochs lr batch_size label_smoothing device evaluate_every"
PAPER = (
    "The paper's test accuracies with WRN-28-10, best of a run, as later work quotes them (SGD / SAM / ASAM): CIFAR-10 "
    "96.34 / 96.98 / 97.28, CIFAR-100 81.56 / 83.42 / 83.68."
)


@dataclass(frozen=True)
class Settings:
    """Data sets and networks, and how they are trained. A single rho is taken as it is, several are tuned."""

    seeds: int = 4
    tuning_seeds: int = 1
    datasets: tuple[str, ...] = ("fashion-mnist", "glyphs")
    networks: tuple[str, ...] = ("cnn",)
    data_dir: str | None = None
    train_size: int | None = 6000
    test_size: int | None = None
    epochs: int = 15
    lr: float = 0.1
    batch_size: int = 100
    label_smoothing: float = 0.1
    device: str = "cpu"
    evaluate_every: int = 5
    rho_sam: tuple[tuple[float, ...], ...] = ((0.02, 0.05, 0.1), (0.02, 0.05, 0.1))  # by data set
    rho_asam: tuple[tuple[float, ...], ...] = ((0.25, 0.5, 1.0), (0.25, 0.5, 1.0))


def _tunings(settings: Settings) -> dict[str, Tuning]:
    base = Run("sgd", augment=True).but(**{name: getattr(settings, name) for name in FIELDS.split()})
    tunings = {}
    for dataset, rho_sam, rho_asam in zip(settings.datasets, settings.rho_sam, settings.rho_asam, strict=True):
        tunings[dataset] = Tuning(
            groups={f"{dataset}, {network}": base.but(dataset=dataset, model=network) for network in settings.networks},
            methods=[
                Method("SGD"),
                Method(TWICE, {"epochs": 2 * settings.epochs}),
                Method("SAM", {"method": "sam"}, "rho", rho_sam),
                Method("ASAM", {"method": "asam"}, "rho", rho_asam),
            ],
            seeds=settings.seeds,
            tuning_seeds=settings.tuning_seeds,
        )
    return tunings


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return {name: run for tuning in _tunings(settings).values() for name, run in tuning.plan(outcomes).items()}


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    findings, tables, figures = [], [], []
    for dataset, tuning in _tunings(settings).items():
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
        tables.append(Table(f"Test error on {dataset}, last epoch, %", tuning.headings(), tuning.rows(outcomes)))
    notes = (
        "Test error at the last epoch. SGD with twice the epochs has the compute of SAM and ASAM.",
        "Where several rho are given, validation data of other seeds chooses.",
        f"Crops for all, mirroring where a mirrored image is as good. {PAPER} The paper reports the best test accuracy "
        "of a run; here it is the last epoch's.",
    )
    return Findings(findings, tables, figures, notes)


def _check(settings: Settings) -> None:
    for dataset in settings.datasets:
        load(dataset, settings.data_dir, 0.0, 0, settings.train_size)
    with torch.device("meta"):
        for network in settings.networks:
            build(network, (3, 32, 32), 10)


STUDY = Study(
    name="images",
    title="Image classification",
    source="Tables 2 and 3",
    settings={
        "quick": Settings(
            1,
            datasets=("fashion-mnist",),
            networks=("cnn", "resnet20"),
            train_size=100,
            test_size=100,
            epochs=1,
            evaluate_every=1,
            rho_sam=((0.05,),),
            rho_asam=((0.5,),),
        ),
        "laptop": Settings(),
        "paper": Settings(
            seeds=3,
            datasets=("cifar10", "cifar100"),
            networks=tuple(NETWORKS.split()),
            train_size=50_000,
            epochs=200,
            batch_size=128,
            device="auto",
            evaluate_every=1,
            rho_sam=((0.05,), (0.1,)),
            rho_asam=((0.5,), (1.0,)),
        ),
    },
    run=Run,
    plan=_plan,
    perform=trained,
    report=_report,
    check=_check,
)
