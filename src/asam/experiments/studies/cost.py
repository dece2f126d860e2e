"""What ASAM costs, and what cheaper forms of it keep of its gain.

ASAM takes two gradients a step. The cheaper forms climb seldom, on a part of the batch, or against the momentum, which
takes none; the economical recipe is exact in the last steps only. The gain that a form keeps is (plain - form) / (plain
- ASAM) in test error, on seeds that chose nothing.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from .. import plots
from ..data import load
from ..run import Run
from ..statistics import pair
from ..study import Figure, Finding, Findings, Outcome, Study, Table, finding
from ..training import Training
from .tuned import SPLITS, Method, Tuning, lower, trained

RESAMPLES = 2000
TIMINGS = 5  # seeds that are timed
TIMED = 1 / 4  # of a training's length, for its time
KEPT = 98.0  # per cent of the gain
WALL_CLOCK = 1.10  # of plain training's
PLAIN = "Plain"
ECONOMICAL = {0.1: "Economical, 10 % exact", 0.25: "Economical, 25 % exact"}
AGAINST = "Against own mean"
MOMENTUM = "Against the optimizer's momentum"
# In what they differ from ASAM, and their rho in units of ASAM's.
CHEAPER: dict[str, tuple[dict[str, Any], float]] = {
    "ASAM, every 5th step": ({"every": 5}, 2),
    "ASAM, every 5th step, quarter batch": ({"every": 5, "ascent_share": 0.25}, 2),
    "ASAM, every 10th step": ({"every": 10}, 3),
    "ASAM, quarter batch": ({"ascent_share": 0.25}, 1),
}
SEVERAL = (*CHEAPER, AGAINST, MOMENTUM, *ECONOMICAL.values())


@dataclass(frozen=True)
class Part:
    """A task: data, network and optimizer, and the rho to try for ASAM; those of the other forms are multiples."""

    name: str
    dataset: str
    model: str
    noise: float
    lr: float
    epochs: int
    rhos: tuple[float, ...]
    sam: float  # rho of SAM in units of ASAM's
    seeds: int
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    warmup: int = 0
    train_size: int | None = None
    test_size: int | None = None
    perturb: str = "all"
    bias: str = "unscaled"

    def but(self, **changes: Any) -> "Part":
        """The same with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Settings:
    """The tasks, and on how many seeds each form's rho is chosen."""

    parts: tuple[Part, ...]
    tuning_seeds: int = 3
    data_dir: str | None = None


@dataclass(frozen=True)
class Timing:
    """Trainings of one length by all methods, for their time alone; their schedules are shorter."""

    runs: dict[str, Run]


def _folder(settings: Settings, part: Part) -> str | None:
    """The folder of the data. Digits need none: where there is other data too, it is for that."""
    mixed = any(other.dataset != "digits" for other in settings.parts)
    return None if mixed and part.dataset == "digits" else settings.data_dir


def _tuning(settings: Settings, part: Part) -> Tuning:
    base = Run(
        "sgd",
        dataset=part.dataset,
        data_dir=_folder(settings, part),
        model=part.model,
        noise=part.noise,
        lr=part.lr,
        epochs=part.epochs,
        optimizer=part.optimizer,
        weight_decay=part.weight_decay,
        warmup=part.warmup,
        train_size=part.train_size,
        test_size=part.test_size,
        perturb=part.perturb,
        bias=part.bias,
        evaluate_every=2 * part.epochs,  # at the end
    )

    def times(factor: float) -> tuple[float, ...]:
        return tuple(factor * rho for rho in part.rhos)

    # rho of the exact steps counts only where there are any
    free: dict[str, Any] = {"method": "economical", "exact": 0.0, "rho": 1.0}
    return Tuning(
        groups={part.name: base},
        methods=[
            Method(PLAIN),
            Method(f"{PLAIN}, 1.25 times the epochs", {"epochs": round(1.25 * part.epochs)}),
            Method(f"{PLAIN}, twice the epochs", {"epochs": 2 * part.epochs}),
            Method("SAM", {"method": "sam"}, "rho", times(part.sam)),
            Method("ASAM", {"method": "asam"}, "rho", part.rhos),
            *(
                Method(label, {"method": "asam"} | changes, "rho", times(factor))
                for label, (changes, factor) in CHEAPER.items()
            ),
            Method(AGAINST, free, "momentum_rho", times(2)),
            Method(MOMENTUM, free | {"memory": "optimizer"}, "momentum_rho", times(2)),
            *(
                Method(label, {"method": "economical", "exact": exact}, "rho", part.rhos)
                for exact, label in ECONOMICAL.items()
            ),
        ],
        seeds=part.seeds,
        tuning_seeds=settings.tuning_seeds,
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run | Timing]:
    runs: dict[str, Run | Timing] = {}
    for part in settings.parts:
        tuning = _tuning(settings, part)
        runs.update(tuning.plan(outcomes))
        shorter = {"epochs": max(1, round(TIMED * part.epochs)), "warmup": round(TIMED * part.warmup)}
        for seed in range(TIMINGS):
            timed = {
                method.label: tuning.run(part.name, method, min(method.values, default=None)).but(seed=seed, **shorter)
                for method in tuning.methods
            }
            runs[_timing_name(part, seed)] = Timing(timed)
    return runs


def _timing_name(part: Part, seed: int) -> str:
    return f"{part.name}/time/seed{seed}"


def _perform(run: Run | Timing) -> Outcome:
    return trained(run) if isinstance(run, Run) else _timed(run)


def _timed(timing: Timing) -> Outcome:
    """The CPU time of a training by each method, an epoch of each in turn: what slows the machine slows all of them."""
    torch.set_num_threads(1)
    trainings = {label: Training(run) for label, run in timing.runs.items()}
    order, chance = list(trainings), random.Random(timing.runs[PLAIN].seed)
    for epoch in range(1, timing.runs[PLAIN].epochs + 1):
        chance.shuffle(order)
        for label in order:
            trainings[label].advance(epochs=epoch)
    return {label: training.seconds for label, training in trainings.items()}


def kept(
    plain: Sequence[float], form: Sequence[float], asam: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """The gain kept, (plain - form) / (plain - ASAM) in per cent, and its bootstrap 95 % interval over paired seeds.

    Example:
        >>> kept([10.0], [6.0], [5.0])
        (80.0, None, None)
    """

    def ratio(means: np.ndarray) -> np.ndarray:
        result: np.ndarray = 100 * (means[0] - means[1]) / (means[0] - means[2])
        return result

    return _bootstrapped(ratio, np.array([plain, form, asam]))


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    findings: list[Finding] = []
    tables, figures = [], []
    for part in settings.parts:
        tuning = _tuning(settings, part)
        errors = {m.label: tuning.values(part.name, m.label, outcomes) for m in tuning.methods}
        clock = {m.label: _wall_clock(tuning, part, m.label, outcomes) for m in tuning.methods}
        gain = lower(f"ASAM has a lower test error than plain training: {part.name}", errors["ASAM"], errors[PLAIN])
        findings.append(gain)
        gains = gain.high is not None and gain.high < 0
        cells = {label: kept(errors[PLAIN], errors[label], errors["ASAM"]) for label in SEVERAL} if gains else {}
        for label, (estimate, low, high) in cells.items():
            claim = f"{label} keeps {KEPT:g} % of ASAM's gain: {part.name}"
            quantity = f"gain kept in %, at {clock[label][0]:.2f} of plain training's time"
            findings.append(finding(claim, quantity, estimate, low, high, part.seeds, holds="above", limit=KEPT))
        rows = [
            (
                m.label,
                f"{_passes(tuning, part, m.label):.2f}",
                _interval(clock[m.label], 2),
                pair(errors[m.label]),
                _interval(cells.get(m.label)),
                tuning.chosen(part.name, m, outcomes),
            )
            for m in tuning.methods
        ]
        headings = ("method", "gradients", "time / plain", "test error %", "gain kept %", "rho chosen")
        tables.append(Table(f"{part.name}, n = {part.seeds}", headings, rows))
        svg = _frontier({label: (clock[label][0], errors[label]) for label in errors})
        caption = f"Mean and standard error over {part.seeds} seeds; dashed: what ASAM reaches."
        figures.append(Figure(part.name.replace(" %", "").replace(" ", "-").replace(",", ""), part.name, caption, svg))
    notes = (
        SPLITS,
        "Time is CPU time of the training steps on one thread, evaluation left out, in units of plain training's: "
        "trainings of a quarter of the length by all methods side by side in one process, an epoch of each in turn in "
        f"an order drawn anew, the mean over {TIMINGS} seeds, with a bootstrap interval. Longer plain training is "
        "timed as a method of its own: what parts its time from 1.25 and 2 is chance.",
        "Plain training is the base optimizer alone: SGD, for the transformers on digits AdamW. The aim is "
        f"{KEPT:g} % of the gain at {WALL_CLOCK:g} of its time, wherever ASAM has a gain.",
        "The transformer with noise and the network on glyphs were set so that ASAM has a gain to keep, on two seeds "
        "that are not reported. Trained on glyphs for fewer steps, where that network underfits, ASAM was worse than "
        "plain training there; with the multilayer perceptron it had no gain.",
        "Gain kept is of mean test errors, with a bootstrap interval over seeds, only where ASAM is better than plain "
        "training.",
        "Each form's rho is chosen from as many values by validation error on seeds that are not reported. Of the "
        "economical recipe, rho against the momentum is twice that of the exact steps.",
    )
    return Findings(findings, tables, figures, notes)


def _passes(tuning: Tuning, part: Part, label: str) -> float:
    method = next(m for m in tuning.methods if m.label == label)
    run = tuning.groups[part.name].but(**method.changes)
    return run.passes * run.epochs / part.epochs


def _wall_clock(
    tuning: Tuning, part: Part, label: str, outcomes: Mapping[str, Outcome]
) -> tuple[float, float | None, float | None]:
    """CPU time of the whole training in units of plain training's, and its bootstrap 95 % interval over timings."""
    method = next(m for m in tuning.methods if m.label == label)
    longer = tuning.groups[part.name].but(**method.changes).epochs / part.epochs
    timings = [outcomes[_timing_name(part, seed)] for seed in range(TIMINGS)]
    seconds = np.array([[timing[of] for timing in timings] for of in (label, PLAIN)])

    def ratio(means: np.ndarray) -> np.ndarray:
        result: np.ndarray = longer * means[0] / means[1]
        return result

    return _bootstrapped(ratio, seconds)


def _bootstrapped(
    ratio: Callable[[np.ndarray], np.ndarray], values: np.ndarray
) -> tuple[float, float | None, float | None]:
    """A ratio of the means of the rows of (k, n) values, and its interval over the n paired seeds."""
    estimate, n = float(ratio(values.mean(axis=1))), values.shape[1]
    if n < 2:
        return estimate, None, None
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(ratio(values[:, draws].mean(axis=2)), [0.025, 0.975])
    return estimate, float(low), float(high)


def _interval(cell: tuple[float, float | None, float | None] | None, digits: int = 0) -> str:
    if cell is None:
        return ""
    estimate, low, high = cell
    shown = f"{estimate:.{digits}f}"
    return shown if low is None else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def _frontier(points: Mapping[str, tuple[float, Sequence[float]]]) -> str:
    """Test error over time, a point a method."""

    def draw(axes: Axes) -> None:
        for i, (label, (clock, errors)) in enumerate(points.items()):
            error = float(np.std(errors, ddof=1)) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
            color = plots.color_of(label, i)
            marker = "os^"[i % 3]  # neighbors in color are not in shape
            axes.errorbar(clock, np.mean(errors), yerr=error, color=color, marker=marker, capsize=3, label=label)
        axes.axhline(float(np.mean(points["ASAM"][1])), color=plots.COLORS["ASAM"], linestyle="--", linewidth=1)
        axes.set_xlabel("time in units of plain training's")
        axes.set_ylabel("test error (%)")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return plots.svg(draw, (9, 4))


def _check(settings: Settings) -> None:
    for part in settings.parts:
        load(part.dataset, _folder(settings, part), part.noise, 0, part.train_size)


WEIGHTS: dict[str, Any] = {"perturb": "weights", "bias": "fixed"}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.05, "warmup": 60, **WEIGHTS}
NOISY, CLEAN = (1.5, 3.0, 4.5, 6.0), (0.75, 1.5, 2.25, 3.0)
FASHION, GLYPHS = (0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0)
VIT, VIT_CLEAN = (1.0, 2.0, 3.0, 4.0), (0.25, 0.5, 1.0, 2.0)

STUDY = Study(
    name="cost",
    title="Error against cost",
    source="Beyond the paper: cheaper forms of ASAM",
    settings={
        "quick": Settings((Part("digits with noise", "digits", "mlp", 0.4, 0.03, 3, (2.0, 3.0), 0.13, 2),), 1),
        "laptop": Settings(
            (
                Part("digits, 40 % noise", "digits", "mlp", 0.4, 0.03, 60, NOISY, 0.13, 20),
                Part("digits, clean", "digits", "mlp", 0.0, 0.03, 60, CLEAN, 0.17, 20),
                Part("fashion-mnist, 40 % noise", "fashion-mnist", "cnn", 0.4, 0.1, 40, FASHION, 0.13, 10).but(
                    train_size=500, test_size=1000, **WEIGHTS
                ),
                Part("transformer, 20 % noise", "digits", "vit", 0.2, 2e-3, 60, VIT, 0.13, 10).but(**ADAMW),
                Part("transformer, clean", "digits", "vit", 0.0, 2e-3, 30, VIT_CLEAN, 0.13, 10).but(**ADAMW),
                Part("glyphs, clean", "glyphs", "cnn", 0.0, 0.1, 50, GLYPHS, 0.13, 10).but(
                    train_size=1500, test_size=1000, **WEIGHTS
                ),
            ),
            tuning_seeds=2,
        ),
    },
    plan=_plan,
    perform=_perform,
    report=_report,
    check=_check,
)
