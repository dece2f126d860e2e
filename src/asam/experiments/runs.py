"""Runs shared by any number of workers through a database, each done once.

The database is Optuna's: SQLite for the processes of one machine, PostgreSQL for a cluster. A run is a trial that
carries its configuration and, when it is done, its outcome. A worker that dies leaves a trial that goes stale and is
offered again. Of several trials with the same run's name, which workers that start together may make, only the first
that has not failed counts; that is what makes a run happen once.
"""

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from . import database
from .database import FAULTS, experimental, open_database, refusals

HANDFUL = 10  # runs that a worker offers at a time: few, so that others rarely offer the same
POLL = 0.5  # seconds between looks at runs that others are doing


@dataclass(frozen=True)
class Together:
    """How to perform several runs at once, where that is faster.

    Args:
        alike: the same for runs that can be performed at once; None for one that cannot.
        perform: their outcomes.
    """

    alike: Callable[[Any], Hashable | None]
    perform: Callable[[Sequence[Any]], Sequence[Any]]


class Runs:
    """The runs of one study in a database.

    Raises:
        InputError: the database cannot be opened; and in every method, it cannot be read or written any more.
    """

    def __init__(self, url: str, study: str) -> None:
        self._url = url
        self._storage = open_database(url)
        try:
            with refusals(self._url):
                self._study = optuna.create_study(storage=self._storage, study_name=study, load_if_exists=True)
        except BaseException:
            self.close()
            raise

    def outcomes(self) -> dict[str, Any]:
        """The outcomes of the runs that are done, by name."""
        return {name: json.loads(trial.user_attrs["result"])["outcome"] for name, trial in self._done().items()}

    def records(self) -> list[dict[str, Any]]:
        """Every run that is done, with what it was, who did it and when, in the order of the names.

        The seconds are those of all the runs that were performed at once with it; ``together`` is their number.
        """
        return [
            {
                "name": name,
                "run": json.loads(trial.user_attrs["run"]),
                **json.loads(trial.user_attrs["result"]),
                "started": str(trial.datetime_start),
                "seconds": round(trial.duration.total_seconds(), 3) if trial.duration else None,
            }
            for name, trial in sorted(self._done().items())
        ]

    def work(
        self,
        runs: Mapping[str, Any],
        perform: Callable[[Any], Any],
        done: Callable[[], object] = lambda: None,
        together: Together | None = None,
    ) -> None:
        """Do the runs that nobody does, until all of them are done; ``done`` is called after each of one's own."""
        names = list(runs)
        start = random.Random().randrange(len(names)) if names else 0
        names = names[start:] + names[:start]  # workers that begin at different places do not go for the same runs

        def key(name: str) -> tuple[Hashable, str]:
            alike = None if together is None else together.alike(runs[name])
            return (alike, "") if alike is not None else (None, name)

        def outcomes(group: Sequence[str]) -> Sequence[Any]:
            if together is not None and len(group) > 1:
                return together.perform([runs[name] for name in group])
            return [perform(runs[name]) for name in group]

        with refusals(self._url):
            while not self._look_and_work(names, runs, key, outcomes, done):
                pass

    def close(self) -> None:
        """Let go of the database."""
        self._storage.engine.dispose()

    def _look_and_work(
        self,
        names: list[str],
        runs: Mapping[str, Any],
        key: Callable[[str], Hashable],
        outcomes: Callable[[Sequence[str]], Sequence[Any]],
        done: Callable[[], object],
    ) -> bool:
        """Do what one look at the database shows to be free; whether all was done already."""
        with experimental():
            fail_stale_trials(self._study)
        live = self._live()
        mine = [name for name in names if name not in live][:HANDFUL]
        for name in mine:
            attributes = {"name": name, "run": json.dumps(asdict(runs[name]))}
            self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes))
        if mine:
            live = self._live()
        elif all(live[name].state == TrialState.COMPLETE for name in names):
            return True
        free = [name for name in mine or names if live[name].state == TrialState.WAITING][:HANDFUL]
        for _, group in groupby(free, key):
            members, claimed = list(group), {}
            for name in members:
                trial = live[name]._trial_id  # Optuna has no public way to claim a certain trial, or to keep it alive
                if not self._claim(trial):
                    break
                claimed[name] = trial
            self._perform(claimed, outcomes, done)
            if len(claimed) < len(members):
                return False  # another worker was here: what this one saw is out of date
        if not (mine or free):
            time.sleep(POLL)
        return False

    def _live(self) -> dict[str, FrozenTrial]:
        with refusals(self._url):
            trials = self._study.get_trials(deepcopy=False)
        found: dict[str, FrozenTrial] = {}
        for trial in trials:
            if trial.state != TrialState.FAIL:
                found.setdefault(trial.user_attrs["name"], trial)
        return found

    def _done(self) -> dict[str, FrozenTrial]:
        return {name: trial for name, trial in self._live().items() if trial.state == TrialState.COMPLETE}

    def _claim(self, trial: int) -> bool:
        # the heartbeat first: a worker killed in between must not leave a running trial without one
        self._storage.record_heartbeat(trial)
        try:
            return self._storage.set_trial_state_values(trial, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _perform(
        self,
        claimed: Mapping[str, int],
        outcomes: Callable[[Sequence[str]], Sequence[Any]],
        done: Callable[[], object],
    ) -> None:
        """Do runs that are this worker's, trials by names; ``done`` is called for each that is so to the end."""
        worker = f"{socket.gethostname()}:{os.getpid()}"
        try:
            with self._heartbeat(claimed.values()):
                found = outcomes(list(claimed))
            for trial, outcome in zip(claimed.values(), found, strict=True):
                result = {"outcome": outcome, "worker": worker, "together": len(claimed)}
                with suppress(UpdateFinishedTrialError):  # this process slept so long that another was given the run
                    self._storage.set_trial_user_attr(trial, "result", json.dumps(result))
                    self._storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.0])
                    done()
        except BaseException:
            for trial in claimed.values():
                with suppress(UpdateFinishedTrialError, *FAULTS):
                    self._storage.set_trial_state_values(trial, TrialState.FAIL)
            raise

    @contextmanager
    def _heartbeat(self, trials: Iterable[int]) -> Iterator[None]:
        """Like Optuna's own, which ends for good, with a traceback, where a single beat cannot be written."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(database.HEARTBEAT):
                for trial in trials:
                    with suppress(*FAULTS):
                        self._storage.record_heartbeat(trial)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
