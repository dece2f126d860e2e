"""The comparison: SGD, SGD at equal compute, SAM and ASAM from the same starts, and how well rho transfers.

Every run is written on its own when it is done, so a comparison that was killed goes on where it stopped.
"""

import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from .. import __version__
from . import InputError
from .checkpoints import save_tensors
from .environment import environment
from .files import claim_folder, read_json, write
from .processes import end, end_with_parent
from .run import Run
from .statistics import mean_sd, paired_difference
from .training import train

SCALES = (1 / 3, 1 / 2, 1.0, 2.0, 3.0)
EARLY = "SGD, early stopping"
TWICE = "SGD, twice the epochs"
REGULARIZED = "SGD, weight decay 0.02"


@dataclass(frozen=True)
class Comparison:
    """What is compared. The rho of the defaults were chosen on digits with 40 % noise, on other seeds than these."""

    dataset: str = "digits"
    model: str = "mlp"
    noise: float = 0.4
    seeds: int = 10
    epochs: int = 60
    rho_sam: float = 0.4
    rho_asam: float = 3.0
    data_dir: str | None = None

    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods of the table and in what their runs differ."""
        return {
            "SGD": {"method": "sgd"},
            TWICE: {"method": "sgd", "epochs": 2 * self.epochs},
            REGULARIZED: {"method": "sgd", "weight_decay": 0.02},
            "SAM": {"method": "sam", "rho": self.rho_sam},
            "ASAM": {"method": "asam", "rho": self.rho_asam},
        }

    def runs(self) -> dict[str, Run]:
        """Every run by its name: each method at the plain start, and SGD, SAM and ASAM at the rescaled ones."""
        common = {
            "dataset": self.dataset,
            "model": self.model,
            "noise": self.noise,
            "epochs": self.epochs,
            "data_dir": self.data_dir,
        }
        runs = {}
        for seed in range(self.seeds):
            for label, method in self.methods().items():
                scales = SCALES if label in ("SGD", "SAM", "ASAM") else (1.0,)
                for scale in scales:
                    runs[run_name(label, scale, seed)] = Run(seed=seed, scale=scale, **{**common, **method})
        return runs


def run_name(label: str, scale: float, seed: int) -> str:
    """The name of a run's files."""
    words = "".join(c if c.isalnum() or c == "." else "-" for c in label.lower()).replace("--", "-")
    return f"{words}-x{scale:.3g}-seed{seed}"


def prepare(comparison: Comparison, folder: Path, *, force: bool) -> None:
    """Make the folder ready: new, or the same comparison unfinished, which goes on; with ``force`` start again.

    Raises:
        InputError: the folder holds something else, and there is no ``force``.
    """
    claim_folder(
        folder,
        {"asam": __version__, **asdict(comparison)},
        last="results.json",
        ours=("report.html", "runs/*.json", "runs/*.pt"),
        force=force,
    )
    (folder / "runs").mkdir(exist_ok=True)


def execute(comparison: Comparison, folder: Path, workers: int, done: Callable[[int], None]) -> dict[str, Any]:
    """Train what is not trained yet, on ``workers`` processes, and return the outcomes by run.

    ``done`` is called with the number of gradient passes over the training data that each finished run took.
    """
    outcomes, missing = {}, {}
    for name, run in comparison.runs().items():
        path = folder / "runs" / f"{name}.json"
        if path.exists():
            outcomes[name] = _outcome(path, run)
            done(cost(run))
        else:
            missing[name] = run
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=end_with_parent)
    try:
        futures = {pool.submit(_one, run, folder / "runs" / name): name for name, run in missing.items()}
        for future in as_completed(futures):
            name = futures[future]
            outcomes[name] = future.result()
            done(cost(missing[name]))
    except BrokenProcessPool:
        raise InputError("a worker process was killed (out of memory?): the same command goes on") from None
    except BaseException:
        end(multiprocessing.active_children())  # a run that they are at may take hours
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return outcomes


def cost(run: Run) -> int:
    """Gradient passes over the training data."""
    return round(run.epochs * run.passes)


def results(comparison: Comparison, outcomes: dict[str, Any]) -> dict[str, Any]:
    """Everything the table, the page and a machine want to know."""
    seeds = range(comparison.seeds)

    def of(label: str, field: str, scale: float = 1.0) -> list[Any]:
        return [outcomes[run_name(label, scale, seed)][field] for seed in seeds]

    methods = {}
    for label, method in comparison.methods().items():
        run = Run(seed=0, **{"epochs": comparison.epochs, **method})
        ratios = [a / b for a, b in zip(of(label, "seconds_per_step"), of("SGD", "seconds_per_step"), strict=True)]
        curves = of(label, "curves")
        methods[label] = {
            "cost": cost(run) / comparison.epochs,
            "time_per_step": median(ratios),
            "test_error": of(label, "test_error"),
            "train_error": of(label, "train_error"),
            "generalization_gap": of(label, "generalization_gap"),
            "curves": {name: [curve[name] for curve in curves] for name in ("train_error", "test_error")},
        }
    stopped = [_early(curves) for curves in of("SGD", "curves")]
    methods[EARLY] = {"cost": 1.0, "time_per_step": 1.0, **{k: [s[k] for s in stopped] for k in stopped[0]}}

    errors = {label: method["test_error"] for label, method in methods.items()}
    pairs = [("ASAM", other) for other in ("SGD", TWICE, REGULARIZED, EARLY, "SAM")] + [("SAM", TWICE)]
    return {
        "comparison": asdict(comparison),
        "methods": methods,
        "differences": [{"a": a, "b": b, **asdict(paired_difference(errors[a], errors[b]))} for a, b in pairs],
        "transfer": {
            "scales": list(SCALES),
            "test_error": {
                label: [of(label, "test_error", scale) for scale in SCALES] for label in ("SGD", "SAM", "ASAM")
            },
        },
        "environment": environment(),
    }


def verdict(found: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    sentences = []
    for difference in found["differences"]:
        a, b, mean, low, high = (difference[key] for key in ("a", "b", "mean", "low", "high"))
        if low is None:
            sentences.append(f"{a} against {b}: {mean:+.1f} points of test error on a single seed.")
            continue
        said = "lower" if high < 0 else "higher" if low > 0 else "not shown to differ"
        sentences.append(
            f"{a} against {b}: {mean:+.1f} points of test error [{low:+.1f}, {high:+.1f}], {said}; "
            f"better on {difference['wins']} of {difference['n']} seeds, p = {difference['p_value']:.2g}."
        )
    spans = {}
    for label, by_scale in found["transfer"]["test_error"].items():
        means = [mean_sd(values)[0] for values in by_scale]
        spans[label] = f"{label} {min(means):.1f} to {max(means):.1f} %"
    sentences.append(
        "The same rho on the same function with rescaled weights, test error from best to worst scale: "
        + ", ".join(spans.values())
        + "."
    )
    return sentences


def _one(run: Run, path: Path) -> dict[str, Any]:
    outcome, weights = train(run)
    save_tensors(path.with_name(path.name + ".pt"), weights)
    write(path.with_name(path.name + ".json"), json.dumps({"run": asdict(run), "outcome": outcome}))
    return outcome


def _outcome(path: Path, run: Run) -> dict[str, Any]:
    """The outcome of a run that was done before."""
    advice = "start again with --force"
    found = read_json(path, advice)
    try:
        outcome: dict[str, Any] = found["outcome"]
        curves = [outcome["curves"][f"{part}_error"] for part in ("train", "validation", "test")]
        numbers = [outcome[name] for name in ("train_error", "test_error", "generalization_gap", "seconds_per_step")]
        whole = all(len(curve) == run.epochs for curve in curves) and outcome["seconds_per_step"] > 0
        if whole and all(map(math.isfinite, chain(numbers, *curves))):
            return outcome
    except (KeyError, TypeError, OverflowError):
        pass
    raise InputError(f"{path} cannot be read (it holds no outcome of this run): {advice}")


def _early(curves: dict[str, Sequence[float]]) -> dict[str, float]:
    """Errors at the epoch of the lowest error on (clean) validation data, the first of them."""
    validation = curves["validation_error"]
    epoch = validation.index(min(validation))
    return {"test_error": curves["test_error"][epoch], "train_error": curves["train_error"][epoch]}
