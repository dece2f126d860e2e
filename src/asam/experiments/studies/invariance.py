"""Is adaptive sharpness the same for all weights of one function?

A ReLU network stays the same function when what feeds a channel is multiplied and what reads it is divided by one
factor. Theorem 1: sharpness in the ball ||T_w^-1 e||_p <= rho does not change, if T_w is scaled as w is. That asks for
eta = 0, for biases scaled with the weights, and for a T_w as fine as the scaling: elementwise for a factor a channel,
filterwise for a factor a filter, layerwise for a factor a layer.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...measure import Geometry, Objective, worst_case_sharpness
from ..data import load
from ..run import Run
from ..study import Finding, Findings, Outcome, Study, finding
from ..tasks import Classification
from ..training import Training
from .invariance_report import figure, table
from .invariance_scalings import KINDS, MODELS, WIDEST, rescaled_copy

DTYPES = {"float64": torch.float64, "float32": torch.float32}
ROUNDING = {"float64": 1e-9, "float32": 1e-3}  # below: the same
BROKEN = 0.01  # above: another value
SAM = "none, any eta, bias unscaled"
GEOMETRIES = {
    SAM: Geometry("none"),
    "none, any eta, bias fixed": Geometry("none", bias="fixed"),
    **{
        f"{normalization}, eta = {eta:g}, bias {bias}": Geometry(normalization, eta=eta, bias=bias)
        for normalization in ("elementwise", "filterwise", "layerwise")
        for eta in (0.0, 0.01)
        for bias in ("scaled", "unscaled", "fixed")
    },
}


@dataclass(frozen=True)
class Settings:
    """Networks trained for a few epochs on digits, and how many rescalings of each kind."""

    seeds: int = 5
    epochs: int = 5
    draws: int = 3
    examples: int = 32
    steps: int = 3  # of the ascent
    rho_none: float = 0.1
    rho_elementwise: float = 0.5
    rho_filterwise: float = 0.2
    rho_layerwise: float = 0.02


@dataclass(frozen=True)
class Network:
    """A trained network, measured before and after rescalings."""

    model: str
    seed: int
    epochs: int
    draws: int
    examples: int
    steps: int
    rho: dict[str, float]  # by normalization


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Network]:
    values = asdict(settings)
    rho = {name: values.pop(f"rho_{name}") for name in ("none", "elementwise", "filterwise", "layerwise")}
    return {
        f"{model}/seed{seed}": Network(
            model, seed, settings.epochs, settings.draws, settings.examples, settings.steps, rho
        )
        for model in MODELS
        for seed in range(values["seeds"])
    }


def perform(run: Network) -> Outcome:
    """The largest relative change of sharpness by precision, kind of rescaling and geometry, and that of the loss."""
    torch.set_num_threads(1)
    training = Training(Run("sgd", run.seed).but(model=run.model, epochs=run.epochs, evaluate_every=run.epochs))
    training.advance()
    task = training.task
    assert isinstance(task, Classification)
    inputs, labels = task.data.train.inputs[: run.examples], task.data.train.labels[: run.examples]
    changes: dict[str, dict[str, dict[str, float]]] = {}
    of_loss = {}
    for name, dtype in DTYPES.items():
        # rescaled in float64 and then rounded
        exact = copy.deepcopy(training.network).double()
        assert isinstance(exact, nn.Sequential)
        before, loss = _measured(exact, run, inputs, labels, dtype)
        changes[name], losses = {}, [0.0]
        for kind in MODELS[run.model]:
            generator = torch.Generator().manual_seed(run.seed)
            worst = dict.fromkeys(GEOMETRIES, 0.0)
            for _ in range(run.draws):
                after, other = _measured(rescaled_copy(exact, kind, generator), run, inputs, labels, dtype)
                worst = {label: max(worst[label], _change(before[label], after[label])) for label in worst}
                losses.append(_change(loss, other))
            changes[name][kind] = worst
        of_loss[name] = max(losses)
    return {"changes": changes, "loss": of_loss}


def _measured(
    network: nn.Module, run: Network, inputs: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[dict[str, float], float]:
    """Sharpness by geometry, and the loss."""
    network = copy.deepcopy(network).to(dtype)
    objective = Objective(
        network, lambda network, batch: cross_entropy(network(batch[0]), batch[1]), [(inputs.to(dtype), labels)]
    )
    values = {
        label: worst_case_sharpness(objective, run.rho[str(geometry.normalization)], geometry=geometry, steps=run.steps)
        for label, geometry in GEOMETRIES.items()
    }
    return {label: result.value for label, result in values.items()}, objective.loss()


def _change(before: float, after: float) -> float:
    """Relative change, the same in both directions."""
    return max(before, after) / max(min(before, after), 1e-300) - 1


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    def claim(text: str, geometry: str, kinds: Sequence[str], invariant: bool, dtype: str = "float64") -> Finding:
        """Over the networks to which a kind of these applies, the worst of them for each."""
        found = [outcome["changes"][dtype] for outcome in outcomes.values()]
        values = [max(by[kind][geometry] for kind in kinds if kind in by) for by in found if by.keys() & set(kinds)]
        limit = ROUNDING[dtype] if invariant else BROKEN
        return finding(
            text,
            f"worst relative change in {dtype}, median and range over networks",
            median(values),
            *(min(values), max(values), len(values)),
            holds="below" if invariant else "above",
            limit=limit,
        )

    everything, scaled = tuple(KINDS), ("channels", "layers")
    exact = "elementwise, eta = 0, bias scaled"
    findings = [
        claim("Sharpness in a ball of fixed size depends on the scale", SAM, everything, False),
        claim("Elementwise sharpness with eta = 0 and biases scaled does not (theorem 1)", exact, everything, True),
        claim("Nor in single precision", exact, everything, True, "float32"),
        claim("Nor with biases fixed", "elementwise, eta = 0, bias fixed", everything, True),
        claim("With biases unscaled, as the paper trains, it does", exact.replace("scaled", "unscaled"), scaled, False),
        claim("With eta = 0.01, as the paper trains, it does", exact.replace("= 0", "= 0.01"), scaled, False),
    ]
    for normalization, same, other in (
        ("filterwise", ("filters", "layers"), ("channels",)),
        ("layerwise", ("layers",), ("channels", "filters")),
    ):
        label = f"{normalization}, eta = 0, bias scaled"
        names = [" or ".join(KINDS[kind] for kind in kinds) for kinds in (same, other)]
        findings += [
            claim(f"{normalization.capitalize()} sharpness is the same under {names[0]}", label, same, True),
            claim(f"{normalization.capitalize()} sharpness is not the same under {names[1]}", label, other, False),
        ]
    in_brief = [label for label in GEOMETRIES if label == SAM or label.endswith("eta = 0, bias scaled")]
    tables = [table(outcomes, "float64", list(GEOMETRIES)), table(outcomes, "float32", in_brief)]
    loss = {name: max(outcome["loss"][name] for outcome in outcomes.values()) for name in DTYPES}
    notes = (
        f"Networks: {settings.seeds} of each kind, trained for {settings.epochs} epochs on digits; mlp has two hidden "
        "layers, cnn three convolutions with batch norm, in eval mode. The loss itself changes by a rescaling by "
        f"{loss['float64']:.0e} in float64 and {loss['float32']:.0e} in float32, relatively.",
        "A factor a channel: for every ReLU, on what feeds its channels and, inverse, on the next weights. A factor a "
        "layer: the same factor for all of them. A factor a filter: on filters before batch norm, whose statistics "
        f"follow. Factors between 1/{WIDEST:g} and {WIDEST:g}.",
        f"Sharpness is what {settings.steps} steps of ascent find on {settings.examples} examples, p = 2, rho "
        f"{settings.rho_none:g} in the fixed ball, {settings.rho_elementwise:g} elementwise, "
        f"{settings.rho_filterwise:g} filterwise, {settings.rho_layerwise:g} layerwise. A change is the ratio of the "
        "larger to the smaller value, minus 1. Few steps are not the maximum; but where the ball is the same in units "
        "of the weights, so is each of them.",
        f"The interval is the range over networks, not a confidence interval. Below {ROUNDING['float64']:g} (float32: "
        f"{ROUNDING['float32']:g}) counts as the same, above {BROKEN:g} as changed.",
    )
    return Findings(findings, tables, [figure(outcomes, settings.draws)], notes)


STUDY = Study(
    name="invariance",
    title="Is sharpness the same for all weights of a function?",
    source="Theorem 1",
    settings={"quick": Settings(seeds=1, epochs=1, draws=1, examples=8, steps=1), "laptop": Settings()},
    plan=_plan,
    perform=perform,
    report=_report,
    check=lambda settings: load("digits", None, 0.0, 0),
)
