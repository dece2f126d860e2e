"""rho, and if asked for eta and the bias policy, found for a user's own training on validation data.

A search proposes values, starting from those that others found to work; a trial whose validation error falls behind is
stopped. The best few are trained again from fresh seeds, and those runs decide.
"""

import hashlib
import inspect
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna
import torch
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table
from torch import nn

from .. import ASAM, __version__
from . import InputError
from .database import file_url, opened
from .environment import environment
from .files import claim_folder, write
from .processes import end_with_parent
from .run import Run, as_run, read_run
from .runs import POLL, Runs
from .targets import imported
from .training import Training

# rho that worked with biases unscaled and eta = 0.01, from the paper and from later work
STARTS = {
    "cifar10": (0.5, 1.0),
    "cifar100": (1.0, 2.0),
    "tiny-imagenet": (3.0,),
    "imagenet": (1.0, 1.5),
    "vit": (3.0,),
    "vit-strong-augmentation": (0.4, 0.6),
    "translation": (0.2,),
    "fine-tuning": (0.5,),
    "anything": (0.2, 0.5, 1.0, 2.0, 3.0),
}
RHO = (0.01, 20.0)
ETA = (1e-4, 0.1)
BIASES = ("unscaled", "scaled", "fixed")
FIRST_CONFIRMING_SEED = 1000
DATABASE = "trials.sqlite3"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """What is searched, and how long."""

    target: str
    trials: int = 20
    confirmed: int = 3  # of the best trials, each with as many fresh seeds as ``seeds``
    seeds: int = 3
    starts: tuple[float, ...] = STARTS["anything"]
    tune_eta: bool = False
    tune_bias: bool = False


@dataclass(frozen=True)
class Choice:
    """What a trial trains with."""

    rho: float
    eta: float = 0.01
    bias: str = "unscaled"

    def asam(self, model: nn.Module, **others: Any) -> ASAM:
        """ASAM of the model with these values."""
        return ASAM(model, rho=self.rho, eta=self.eta, bias=self.bias, **others)


Train = Callable[[Choice, int, Callable[[float], None]], None]  # choice, seed, report


def find(target: str) -> Train:
    """A function that trains: the user's own, or that of a run's file.

    Raises:
        InputError: there is no such thing.
    """
    if ":" in target and not Path(target).exists():
        try:
            function = imported(target)
            inspect.signature(function).bind(lambda model: None, 0, lambda error: None)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{target} must be a function of (asam, seed, report): {error}") from None
        return lambda choice, seed, report: function(choice.asam, seed, report)
    run = as_run({"method": "asam", "rho": 1.0, **read_run(Path(target))}, target)
    if run.method != "asam":
        raise InputError(f"{target}: method must be asam, got {run.method}")
    return lambda choice, seed, report: _train(run, choice, seed, report)


def _train(run: Run, choice: Choice, seed: int, report: Callable[[float], None]) -> None:
    def epoch_done(epoch: int, metrics: dict[str, float]) -> None:
        names = [name for name in metrics if name.startswith("validation")]
        if not names:
            raise InputError("the run has no validation data: choose a smaller train_size")
        report(metrics[names[0]])

    torch.set_num_threads(1)
    Training(replace(run, seed=seed, **asdict(choice))).advance(epoch_done)


def claim(search: Search, folder: Path, *, force: bool) -> None:
    """Make the folder ready for the results, or refuse it."""
    config = {"asam": __version__, **asdict(search)}
    claim_folder(folder, config, last="tune.json", ours=(f"{DATABASE}*",), force=force)


def tune(
    search: Search, folder: Path, storage: str | None, workers: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Search, confirm, and write ``tune.json`` into the folder, which :func:`claim` has made ready.

    Raises:
        InputError: the target is not there, or every trial failed.
    """
    find(search.target)
    url = storage or file_url(folder / DATABASE)
    if workers == 1:
        _work(search, url, progress)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
            for worker in [pool.submit(_work, search, url) for _ in range(workers)]:
                worker.result()
    with _study(search, url) as study:
        runs = Runs(url, _name(search, "confirming"))
        outcomes = runs.outcomes()
        runs.close()
        found = _result(search, study.get_trials(states=FINISHED), outcomes)
    write(folder / "tune.json", json.dumps(found, indent=1) + "\n")
    for file in folder.glob(f"{DATABASE}*"):
        file.unlink(missing_ok=True)
    return found


def _work(search: Search, url: str, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Search until there are trials enough, then train the best few again; any number of workers may."""
    train = find(search.target)
    total = search.trials + search.confirmed * search.seeds

    def objective(trial: optuna.Trial) -> float:
        choice = Choice(
            trial.suggest_float("rho", *RHO, log=True),
            trial.suggest_float("eta", *ETA, log=True) if search.tune_eta else 0.01,
            trial.suggest_categorical("bias", BIASES) if search.tune_bias else "unscaled",
        )
        return _last_error(train, choice, 0, trial)

    with _study(search, url) as study:
        if not study.trials:
            for rho in search.starts:
                study.enqueue_trial({"rho": rho}, skip_if_exists=True)
        while (done := len(study.get_trials(deepcopy=False, states=FINISHED))) < search.trials:
            progress(done, total)
            study.optimize(objective, n_trials=1)
        while study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # of other workers
            time.sleep(POLL)
            fail_stale_trials(study)
        trials = study.get_trials(states=(TrialState.COMPLETE,))
    best = sorted(trials, key=lambda trial: trial.values[0])[: search.confirmed]
    confirming = {
        f"trial {trial.number}, seed {seed}": Confirming(Choice(**trial.params), seed)
        for trial in best
        for seed in range(FIRST_CONFIRMING_SEED, FIRST_CONFIRMING_SEED + search.seeds)
    }
    runs = Runs(url, _name(search, "confirming"))
    try:
        runs.work(
            confirming,
            lambda run: _last_error(train, run.choice, run.seed, None),
            lambda: progress(search.trials + len(runs.outcomes()), total),
        )
    finally:
        runs.close()


@dataclass(frozen=True)
class Confirming:
    """A choice trained again from a fresh seed."""

    choice: Choice
    seed: int


def _last_error(train: Train, choice: Choice, seed: int, trial: optuna.Trial | None) -> float:
    """The last error that was reported; a trial that falls behind is stopped."""
    errors: list[float] = []

    def report(error: float) -> None:
        errors.append(float(error))
        if trial is not None:
            trial.report(errors[-1], len(errors))
            if trial.should_prune():
                raise optuna.TrialPruned

    train(choice, seed, report)
    if not errors:
        raise InputError("the training never called report(validation_error)")
    return errors[-1]


def _result(search: Search, trials: list[FrozenTrial], outcomes: dict[str, float]) -> dict[str, Any]:
    table = []
    for trial in trials:
        errors = [error for name, error in outcomes.items() if name.startswith(f"trial {trial.number},")]
        row = {"trial": trial.number, **asdict(Choice(**trial.params)), "error": trial.value}
        row |= {"pruned": trial.state == TrialState.PRUNED, "reports": len(trial.intermediate_values)}
        if errors:
            row |= {"mean": fmean(errors), "sd": stdev(errors) if len(errors) > 1 else 0.0, "n": len(errors)}
        table.append(row)
    confirmed = [row for row in table if "mean" in row]
    if not confirmed:
        raise InputError("no trial came to an end with a finite validation error")
    best = min(confirmed, key=lambda row: row["mean"])
    return {
        "best": {name: best[name] for name in ("rho", "eta", "bias")},
        "trials": table,
        "search": asdict(search),
        "environment": environment(),
    }


@contextmanager
def _study(search: Search, url: str) -> Iterator[optuna.Study]:
    with opened(url) as storage:
        yield optuna.create_study(
            storage=storage,
            study_name=_name(search, "search"),
            sampler=optuna.samplers.TPESampler(constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
            load_if_exists=True,
        )


def _name(search: Search, part: str) -> str:
    key = hashlib.sha256(json.dumps(asdict(search), sort_keys=True).encode()).hexdigest()[:12]
    return f"asam-tune-{key}-{part}"


def terminal_table(found: dict[str, Any]) -> Table:
    """The trials, from the best: those that were trained again first."""
    table = Table("rho", "eta", "bias", "validation error", "from fresh seeds", "")
    rows = sorted(found["trials"], key=lambda row: (row.get("mean", math.inf), row["pruned"], row["error"]))
    for row in rows:
        again = f"{row['mean']:.4g} ± {row['sd']:.2g} (n = {row['n']})" if "mean" in row else ""
        stopped = f"stopped after {row['reports']} reports" if row["pruned"] else ""
        table.add_row(f"{row['rho']:.3g}", f"{row['eta']:.3g}", row["bias"], f"{row['error']:.4g}", again, stopped)
    return table
