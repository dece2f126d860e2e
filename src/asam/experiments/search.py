"""The search of ``asam tune``: trials in a database, for any number of workers.

It begins with the rho that others found to work, goes on with a tree-structured Parzen estimator (Optuna's), and stops
a trial that falls behind the median of the others.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import optuna
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from . import InputError
from .database import FAULTS, experimental, opened
from .run import Run
from .runs import POLL
from .trainings import Choice, Train

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
    run: Run | None = None  # where the target is a file

    def choice(self, values: dict[str, Any]) -> Choice:
        """The values of a trial, and for what is not searched those of the run."""
        known: dict[str, Any] = {} if self.run is None else {"eta": self.run.eta, "bias": self.run.bias}
        return Choice(**(known | values))

    def name(self, part: str) -> str:
        """What a part of the tuning is called in the database."""
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"asam-tune-{key}-{part}"


@contextmanager
def opened_study(search: Search, url: str) -> Iterator[optuna.Study]:
    """The trials of the search in the database."""
    with opened(url) as storage:
        with experimental():
            sampler = optuna.samplers.TPESampler(constant_liar=True)
        yield optuna.create_study(
            storage=storage,
            study_name=search.name("search"),
            sampler=sampler,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),  # the first report stops none
            load_if_exists=True,
        )


def searched(search: Search, study: optuna.Study, train: Train, seen: set[int]) -> bool:
    """Do a trial if there are not enough in hand; whether enough are finished, and no worker is at one.

    ``seen`` is this worker's, empty at first.
    """
    trials = study.get_trials(deepcopy=False)
    for trial in trials:  # a worker killed before its first heartbeat leaves a trial that would never go stale
        if trial.state == TrialState.RUNNING and trial.number not in seen:
            study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
            seen.add(trial.number)
    with experimental():
        fail_stale_trials(study)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    finished, running = sum(state in FINISHED for state in states), states.count(TrialState.RUNNING)
    if finished + running < search.trials:
        offer_starts(search, study)
        try:
            study.optimize(partial(_objective, search, train), n_trials=1, catch=_SurplusError)
        except AssertionError as error:  # what Optuna makes of a fault while it writes down a trial's end
            if isinstance(error.__context__, FAULTS):
                raise error.__context__ from None
            raise
        return False
    if running:
        time.sleep(POLL)
    return not running


def offer_starts(search: Search, study: optuna.Study) -> None:
    """Those that no trial has tried; one that was killed or failed in it has not."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    tried = {trial.system_attrs.get("fixed_params", {}).get("rho") for trial in trials}
    searched = (["eta"] if search.tune_eta else []) + (["bias"] if search.tune_bias else [])
    for rho in search.starts:
        if rho not in tried:
            study.enqueue_trial({"rho": rho} | {name: getattr(Choice(rho), name) for name in searched})


class _SurplusError(Exception):
    """Another worker has begun the last trial at the same moment."""


def _objective(search: Search, train: Train, trial: optuna.Trial) -> float:
    begun = trial.study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
    if sum(other.number < trial.number for other in begun) >= search.trials:
        raise _SurplusError
    values: dict[str, Any] = {"rho": trial.suggest_float("rho", *RHO, log=True)}
    if search.tune_eta:
        values["eta"] = trial.suggest_float("eta", *ETA, log=True)
    if search.tune_bias:
        values["bias"] = trial.suggest_categorical("bias", BIASES)
    return last_error(train, search.choice(values), 0, trial)


def last_error(train: Train, choice: Choice, seed: int, trial: optuna.Trial | None) -> float:
    """The last error that was reported, inf for one that is not finite; a trial that falls behind is stopped."""
    errors: list[float] = []

    def report(error: float) -> None:
        value = float(error)
        errors.append(value if math.isfinite(value) else math.inf)
        if trial is not None:
            trial.report(errors[-1], len(errors))
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        train(choice, seed, report)
    except optuna.TrialPruned:  # of the user's own function, which no trial is there to hear
        if trial is not None:
            raise
        return math.inf
    if not errors:
        raise InputError("the training never called report(validation_error)")
    return errors[-1]
