"""Does sharpness predict the generalization gap? Over many trained networks, sharpness against adaptive sharpness.

Networks differ in batch size, learning rate, weight decay and dropout. Those that fit their training data are ranked by
sharpness and by generalization gap, and Kendall's tau tells how far the two rankings agree. The neighborhood size of
each measure is chosen on networks of other seeds, by their tau; the reported networks have no part in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite, sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...measure import Geometry, Objective, kendall, kendall_difference, sharpness_profile
from .. import InputError
from ..data import load
from ..run import Run
from ..study import Finding, Findings, Outcome, Study, finding
from ..tasks import Classification
from ..training import Training
from .correlation_report import figures, table_one, table_rho

BALLS = {"sharpness": Geometry("none"), "adaptive sharpness": Geometry(eta=0.0, bias="scaled")}
METHODS = ("auto_pgd", "one_step")
SELECTION_SEED = 1000
REPORTED_SEED = 2000
PAPER = (
    "The paper's figure 2 has tau 0.174 for sharpness and 0.636 for adaptive sharpness, p = 2, on CIFAR-10 networks "
    "(as quoted by later work). Later work also finds that on modern networks adaptive sharpness follows training "
    "parameters such as the learning rate rather than generalization (Andriushchenko et al., 2023)."
)


@dataclass(frozen=True)
class Settings:
    """A grid of training settings, each a network; and what is measured of every one."""

    batch_sizes: tuple[int, ...] = (25, 50, 100, 200)
    lrs: tuple[float, ...] = (0.03, 0.05, 0.08)
    weight_decays: tuple[float, ...] = (0.0, 1e-3, 5e-3)
    dropouts: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    epochs: int = 60
    dataset: str = "fashion-mnist"
    model: str = "mlp"
    data_dir: str | None = None
    train_size: int = 1000
    examples: int = 500
    steps: int = 10
    largest_train_error: float = 5.0  # %
    rhos: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    adaptive_rhos: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Network:
    """A network to train and measure."""

    training: Run
    examples: int
    steps: int
    rhos: tuple[float, ...]
    adaptive_rhos: tuple[float, ...]


def _networks(settings: Settings) -> list[dict[str, float]]:
    names = ("batch_size", "lr", "weight_decay", "dropout")
    grid = product(settings.batch_sizes, settings.lrs, settings.weight_decays, settings.dropouts)
    return [dict(zip(names, values, strict=True)) for values in grid]


def _place(settings: Settings, changes: Mapping[str, float]) -> list[int]:
    sides = (settings.batch_sizes, settings.lrs, settings.weight_decays, settings.dropouts)
    return [side.index(value) for side, value in zip(sides, changes.values(), strict=True)]


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Network]:
    runs = {}
    for i, changes in enumerate(_networks(settings)):
        for part, seed in (("selection", SELECTION_SEED + i), ("reported", REPORTED_SEED + i)):
            if part == "selection" and sum(_place(settings, changes)) % 2:
                continue  # half as many choose rho, every second one along each side of the grid
            training = Run(
                "sgd",
                seed=seed,
                epochs=settings.epochs,
                evaluate_every=settings.epochs,
                dataset=settings.dataset,
                model=settings.model,
                data_dir=settings.data_dir,
                train_size=settings.train_size,
            ).but(**changes)
            runs[f"{part}/{i:03d}"] = Network(
                training, settings.examples, settings.steps, settings.rhos, settings.adaptive_rhos
            )
    return runs


def measure_name(ball: str, p: float, method: str) -> str:
    """Under which name a measure is stored."""
    return f"{ball}, p = {p:g}, {'one step' if method == 'one_step' else 'ascent'}"


def perform(network: Network) -> Outcome:
    """Train the network and measure it: every measure's values by rho."""
    torch.set_num_threads(1)
    training = Training(network.training)
    training.advance()
    outcome = training.outcome()
    task = training.task
    assert isinstance(task, Classification)
    data = [(task.data.train.inputs[: network.examples], task.data.train.labels[: network.examples])]
    objective = Objective(training.network.eval(), _loss, data)
    kept = {name: outcome[name] for name in ("train_error", "test_error", "generalization_gap", "loss_gap")}
    if not isfinite(objective.loss()):  # it diverged, and will not be among those that fit their data
        return kept | {"measures": {}}
    k = objective.like.numel()
    values: dict[str, list[float]] = {}
    for ball, geometry in BALLS.items():
        rhos = network.rhos if ball == "sharpness" else network.adaptive_rhos
        for p in (2.0, inf):
            sizes = [rho / sqrt(k) for rho in rhos] if p == inf else list(rhos)
            in_norm = Geometry(geometry.normalization, p, geometry.eta, geometry.bias)
            for method in METHODS:
                profile = sharpness_profile(objective, sizes, geometry=in_norm, steps=network.steps, method=method)
                values[measure_name(ball, p, method)] = list(profile.values)
    return kept | {"measures": values}


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(network(batch[0]), batch[1])


@dataclass(frozen=True)
class Ranking:
    """The networks of a part that fit their data: gaps, hyper-parameters and the values of the measures by rho."""

    gaps: list[float]
    loss_gaps: list[float]
    hyperparameters: dict[str, list[float]]
    measures: dict[str, list[list[float]]]
    trained: int

    def of(self, measure: str, index: int) -> list[float]:
        """A measure at one of its rho, by network."""
        return [values[index] for values in self.measures[measure]]


def _ranking(settings: Settings, outcomes: Mapping[str, Outcome], part: str) -> Ranking:
    changes = _networks(settings)
    runs = [(changes[int(name.split("/")[1])], outcomes[name]) for name in outcomes if name.startswith(part)]
    fit = [(c, o) for c, o in runs if o["measures"] and o["train_error"] <= settings.largest_train_error]
    if len(fit) < 2:
        raise InputError(f"{len(fit)} of {len(runs)} networks fit their data: there is nothing to rank")
    return Ranking(
        [o["generalization_gap"] for _, o in fit],
        [o["loss_gap"] for _, o in fit],
        {name: [c[name] for c, _ in fit] for name in changes[0]},
        {name: [o["measures"][name] for _, o in fit] for name in fit[0][1]["measures"]},
        len(runs),
    )


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    selection, reported = (_ranking(settings, outcomes, part) for part in ("selection", "reported"))
    chosen = {
        name: max(range(len(values[0])), key=lambda i, name=name: kendall(selection.of(name, i), selection.gaps).tau_b)  # type: ignore[misc]
        for name, values in selection.measures.items()
    }
    findings = []
    for p in (2.0, inf):
        fixed, adaptive = (measure_name(ball, p, "auto_pgd") for ball in BALLS)
        findings += [
            _correlates(
                f"Adaptive sharpness, p = {p:g}, rises with the generalization gap", reported, adaptive, chosen
            ),
            _difference(
                f"Adaptive sharpness ranks better than sharpness, p = {p:g}", reported, adaptive, fixed, chosen
            ),
        ]
    fixed, adaptive = (measure_name(ball, 2.0, "one_step") for ball in BALLS)
    findings.append(
        _difference(
            "Adaptive sharpness ranks better than sharpness, p = 2, one step", reported, adaptive, fixed, chosen
        )
    )
    notes = (
        f"{len(reported.gaps)} of {reported.trained} networks have a training error of at most "
        f"{settings.largest_train_error:g} % and are ranked; rho was chosen on {len(selection.gaps)} others.",
        f"The gap is test error minus training error. Sharpness is taken on {settings.examples} training examples; "
        f"with p = inf the neighborhood is rho / sqrt(k) in every weight, k the number of weights; adaptive: eta = 0, "
        "biases scaled.",
        "Every network has a seed of its own, for its data and its weights. rho is chosen by the gap of other networks "
        "on the same official test images.",
        "psi compares networks that differ in one hyper-parameter and in their seeds only, Psi is their mean. "
        "Intervals: 95 %, bootstrap over networks.",
        PAPER,
    )
    rhos = {name: settings.rhos if name.startswith("sharpness") else settings.adaptive_rhos for name in chosen}
    tables = [table_one(reported, chosen, rhos), table_rho(reported, rhos)]
    return Findings(findings, tables, figures(reported, chosen, rhos), notes)


def _correlates(claim: str, ranking: Ranking, measure: str, chosen: Mapping[str, int]) -> Finding:
    found = kendall(ranking.of(measure, chosen[measure]), ranking.gaps)
    return finding(claim, "Kendall's tau", found.tau_b, *found.interval_b, found.n, holds="above")


def _difference(claim: str, ranking: Ranking, a: str, b: str, chosen: Mapping[str, int]) -> Finding:
    estimate, interval = kendall_difference(ranking.of(a, chosen[a]), ranking.of(b, chosen[b]), ranking.gaps)
    return finding(claim, "difference of Kendall's tau", estimate, *interval, len(ranking.gaps), holds="above")


STUDY = Study(
    name="correlation",
    title="Sharpness and the generalization gap",
    source="Figure 2 and table 1",
    settings={
        "quick": Settings(
            batch_sizes=(50, 100),
            lrs=(0.05, 0.1),
            weight_decays=(0.0, 5e-3),
            dropouts=(0.0,),
            epochs=8,
            dataset="digits",
            train_size=300,
            examples=100,
            steps=3,
            largest_train_error=100.0,
            rhos=(0.5, 1.0),
            adaptive_rhos=(0.5, 1.0),
        ),
        "laptop": Settings(),
    },
    plan=_plan,
    perform=perform,
    report=_report,
    check=lambda settings: load(settings.dataset, settings.data_dir, 0.0, 0, settings.train_size),
)
