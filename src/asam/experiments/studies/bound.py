"""The generalization bound of theorem 2, evaluated along training.

The bound limits the expected error by the worst training error in the neighborhood and a term that grows with the
number of weights. It holds, and says nothing: on networks of this kind it is above 1. Beside it, a certificate of the
same family that starts from the initial weights, and the test error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...measure import Geometry, Objective, asam_bound, gibbs_certificate, sam_bound, worst_case_sharpness
from .. import plots
from ..data import load
from ..run import Run
from ..statistics import pair
from ..study import Figure, Findings, Outcome, Study, Table, finding
from ..tasks import Classification
from ..training import Training

DELTA = 0.05
ETA = 0.01
SIGMAS = (0.01, 0.03, 0.1, 0.3)  # of the certificate's noise; it pays for choosing among them
CURVES = {"asam": "ASAM's bound", "sam": "SAM's bound", "certificate": "Gibbs certificate", "test": "test error"}


@dataclass(frozen=True)
class Settings:
    """Digits without label noise; the epochs after which the bounds are evaluated."""

    seeds: int = 5
    epochs: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 60)
    dataset: str = "digits"
    data_dir: str | None = None
    rho_sam: float = 0.1
    rho_asam: float = 1.0
    steps: int = 10
    samples: int = 20


@dataclass(frozen=True)
class Bounded:
    """A run and the epochs after which it is looked at."""

    training: Run
    epochs: tuple[int, ...]
    rho_sam: float
    rho_asam: float
    steps: int
    samples: int


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Bounded]:
    runs = {}
    for method, rho in (("sgd", 0.0), ("sam", settings.rho_sam), ("asam", settings.rho_asam)):
        for seed in range(settings.seeds):
            run = Run(method, seed, rho).but(
                epochs=max(settings.epochs), dataset=settings.dataset, data_dir=settings.data_dir
            )
            runs[f"{method}/seed{seed}"] = Bounded(
                run, settings.epochs, settings.rho_sam, settings.rho_asam, settings.steps, settings.samples
            )
    return runs


def perform(bounded: Bounded) -> Outcome:
    """Train, and evaluate the bounds on the way: every quantity by epoch, as an error between 0 and 1."""
    torch.set_num_threads(1)
    training = Training(bounded.training)
    prior = {name: param.detach().clone() for name, param in training.network.named_parameters()}
    found: dict[str, list[float]] = {name: [] for name in (*CURVES, "kl")}

    def look(epoch: int, metrics: dict[str, float]) -> None:
        if epoch in bounded.epochs:
            for name, value in (_bounds(training, bounded, prior) | {"test": metrics["test_error"] / 100}).items():
                found[name].append(value)

    training.advance(epoch_done=look)
    return found


def _bounds(training: Training, bounded: Bounded, prior: Mapping[str, Tensor]) -> dict[str, float]:
    task = training.task
    assert isinstance(task, Classification)
    objective = Objective(training.network, _loss, [(task.data.train.inputs, task.data.train.labels)])
    k, n = objective.like.numel(), objective.examples
    norm = float(torch.linalg.vector_norm(torch.cat([p.detach().flatten() for p in objective.params.values()])))

    def worst_error(rho: float, geometry: Geometry) -> float:
        """The error at the worst point that the ascent of the loss finds."""
        result = worst_case_sharpness(objective, rho, geometry=geometry, steps=bounded.steps)
        return max(objective.means(result.perturbation)["error"], objective.means()["error"])

    plain = worst_error(bounded.rho_sam, Geometry("none"))
    scaled = worst_error(bounded.rho_asam, Geometry(eta=ETA, bias="scaled"))
    common: dict[str, Any] = {"weight_norm": norm, "k": k, "n": n, "delta": DELTA}
    certificates = [
        gibbs_certificate(
            objective,
            sigma,
            geometry=Geometry("none"),
            prior=prior,
            delta=DELTA / len(SIGMAS),
            samples=bounded.samples,
            seed=bounded.training.seed,
        )
        for sigma in SIGMAS
    ]
    best = min(certificates, key=lambda certificate: certificate.value)
    return {
        "asam": asam_bound(scaled, rho=bounded.rho_asam, eta=ETA, **common).value,
        "sam": sam_bound(plain, rho=bounded.rho_sam, **common).value,
        "certificate": best.value,
        "kl": best.kl,
    }


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = network(batch[0])
    return cross_entropy(logits, batch[1]), {"error": (logits.argmax(1) != batch[1]).float().mean()}


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    last = {name: [outcome[name][-1] for outcome in outcomes.values()] for name in CURVES}
    n = len(outcomes)
    best_certificate = min(min(outcome["certificate"]) for outcome in outcomes.values())
    findings = [
        finding(
            "ASAM's bound says something: it is below 1 at the end of training",
            "bound on the error, smallest and largest",
            fmean(last["asam"]),
            min(last["asam"]),
            max(last["asam"]),
            n,
            holds="below",
            limit=1.0,
        ),
        finding(
            "At the end a certificate that starts from the initial weights says more than guessing, which errs on 90 %",
            "bound on the error, smallest and largest",
            fmean(last["certificate"]),
            min(last["certificate"]),
            max(last["certificate"]),
            n,
            holds="below",
            limit=0.9,
        ),
    ]
    methods = {"sgd": "SGD", "sam": "SAM", "asam": "ASAM"}
    rows = []
    for method, label in methods.items():
        runs = [outcomes[f"{method}/seed{seed}"] for seed in range(settings.seeds)]
        rows.append((label, *(pair([run[name][-1] for run in runs], 3) for name in CURVES)))
    table = Table("At the end of training, as an error between 0 and 1", ("trained with", *CURVES.values()), rows)
    curves = {
        title: (settings.epochs, [[o[name][i] for o in outcomes.values()] for i in range(len(settings.epochs))])
        for name, title in CURVES.items()
    }
    figure = Figure(
        "bound",
        "Bounds along training",
        "Mean over all runs. A bound above 1 says nothing about an error.",
        plots.lines(curves, "epoch", "error, or a bound on it", log_x=True),
    )
    notes = (
        f"The bounds hold with probability {1 - DELTA:.0%} each. SAM's and ASAM's take the 0-1 error at the worst "
        f"point that {settings.steps} steps of ascent of the loss find, which is at most the maximum that the theorem "
        "asks for.",
        f"SAM's bound is for rho = {settings.rho_sam:g}, ASAM's for rho = {settings.rho_asam:g} and eta = {ETA:g}. "
        "Only eta keeps T_w away from 0, so the term of ASAM's bound grows with 1 / (eta rho).",
        "The certificate is that of a classifier whose weights are drawn around the trained ones; it was the best of "
        f"{len(SIGMAS)} sizes of the noise and pays for the choice. The lowest anywhere is {best_certificate:.3f}.",
        "The interval of these findings is the range over runs, not a confidence interval.",
    )
    return Findings(findings, [table], [figure], notes)


STUDY = Study(
    name="bound",
    title="The generalization bound along training",
    source="Theorem 2",
    settings={"quick": Settings(1, (1, 2), steps=2, samples=4), "laptop": Settings()},
    plan=_plan,
    perform=perform,
    report=_report,
    check=lambda settings: load(settings.dataset, settings.data_dir, 0.0, 0),
)
