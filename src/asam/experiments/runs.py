"""Runs shared by any number of workers through a database, each done once.

The database is Optuna's: SQLite for the processes of one machine, PostgreSQL for a cluster. A run is a trial that
carries its configuration and, when it is done, its outcome. A worker that dies leaves a trial that goes stale and is
offered again. Of several trials with the same run's name, which workers that start together may make, only the first
that has not failed counts; that is what makes a run happen once.
"""

import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from . import InputError

HEARTBEAT = 2  # seconds
GRACE = 15  # seconds without a heartbeat after which a worker counts as dead
POLL = 0.5  # seconds between looks at runs that others are doing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import optuna
    from optuna.storages import RDBStorage, fail_stale_trials
    from optuna.storages._heartbeat import get_heartbeat_thread  # what study.optimize uses
    from optuna.trial import FrozenTrial, TrialState, create_trial
    from sqlalchemy import event

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)


class Runs:
    """The runs of one study in a database.

    Raises:
        InputError: the database cannot be opened.
    """

    def __init__(self, url: str, study: str) -> None:
        self._storage = _open(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study = optuna.create_study(storage=self._storage, study_name=study, load_if_exists=True)

    def outcomes(self) -> dict[str, Any]:
        """The outcomes of the runs that are done, by name."""
        return {
            name: json.loads(trial.user_attrs["outcome"])
            for name, trial in self._live().items()
            if trial.state == TrialState.COMPLETE
        }

    def records(self) -> list[dict[str, Any]]:
        """Every run that is done, with what it was, who did it and when, in the order of the names."""
        return [
            {
                "name": name,
                "run": json.loads(trial.user_attrs["run"]),
                "outcome": json.loads(trial.user_attrs["outcome"]),
                "worker": trial.user_attrs["worker"],
                "started": str(trial.datetime_start),
                "seconds": round((trial.datetime_complete - trial.datetime_start).total_seconds(), 3)
                if trial.datetime_complete and trial.datetime_start
                else None,
            }
            for name, trial in sorted(self._live().items())
            if trial.state == TrialState.COMPLETE
        ]

    def work(
        self,
        runs: Mapping[str, Any],
        perform: Callable[[Any], Any],
        done: Callable[[], None] = lambda: None,
        order: int = 0,
    ) -> None:
        """Do the runs that nobody does, until all of them are done; ``done`` is called after each of one's own.

        ``order`` shifts where in the list a worker begins, so that workers do not go for the same run.
        """
        names = list(runs)
        names = names[order % max(1, len(names)) :] + names[: order % max(1, len(names))]
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fail_stale_trials(self._study)
            live = self._live()
            for name in runs.keys() - live.keys():
                self._offer(name, runs[name])
            if runs.keys() - live.keys():
                continue
            if all(live[name].state == TrialState.COMPLETE for name in runs):
                return
            worked = False
            for name in names:
                if live[name].state == TrialState.WAITING and self._claim(live[name]):
                    self._perform(live[name], runs[name], perform)
                    worked = True
                    done()
            if not worked:
                time.sleep(POLL)

    def close(self) -> None:
        """Let go of the database."""
        self._storage.engine.dispose()

    def _live(self) -> dict[str, FrozenTrial]:
        found: dict[str, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state != TrialState.FAIL:
                found.setdefault(trial.user_attrs["name"], trial)
        return found

    def _offer(self, name: str, run: Any) -> None:
        attributes = {"name": name, "run": json.dumps(asdict(run))}
        self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes))

    def _claim(self, trial: FrozenTrial) -> bool:
        # the heartbeat first: a worker killed in between must not leave a running trial without one
        self._storage.record_heartbeat(trial._trial_id)
        try:
            return self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _perform(self, trial: FrozenTrial, run: Any, perform: Callable[[Any], Any]) -> None:
        number, storage = trial._trial_id, self._storage
        try:
            storage.set_trial_user_attr(number, "worker", f"{socket.gethostname()}:{os.getpid()}")
            with get_heartbeat_thread(number, storage):
                outcome = perform(run)
            storage.set_trial_user_attr(number, "outcome", json.dumps(outcome))
            storage.set_trial_state_values(number, TrialState.COMPLETE, [0.0])
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # this process slept for so long that the run was given to another worker
        except BaseException:
            storage.set_trial_state_values(number, TrialState.FAIL)
            raise


def _open(url: str) -> RDBStorage:
    local = url.startswith("sqlite")
    connect: dict[str, Any] = {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
    problem: Exception | None = None
    for attempt in range(5):  # workers that start together on a new database may all create its tables
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                storage = RDBStorage(url, connect, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            break
        except ImportError as error:
            raise InputError(f"{_without_password(url)} needs {error.name}: pip install 'asam[postgresql]'") from None
        except Exception as error:
            problem = error
            time.sleep(0.2 * 2**attempt)
    else:
        reason = " ".join(str(problem).split())
        raise InputError(f"the storage {_without_password(url)} cannot be opened: {reason}") from None
    if local:
        # a reader that becomes a writer fails at once when another writes; one that says so first waits its turn
        @event.listens_for(storage.engine, "connect")
        def _manual(connection: Any, _: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(storage.engine, "begin")
        def _immediate(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        storage.engine.dispose()
    return storage


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.rsplit(':', 1)[0]}:***@{tail}" if at and head.count(":") > 1 else url
