"""Runs shared by any number of workers through a database, each done once.

The database is Optuna's: SQLite for the processes of one machine, PostgreSQL for a cluster. A run is a trial that
carries its configuration and, when it is done, its outcome. A worker that dies leaves a trial that goes stale and is
offered again. Of several trials with the same run's name, which workers that start together may make, only the first
that has not failed counts; that is what makes a run happen once.
"""

import json
import logging
import os
import random
import socket
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from . import InputError

HEARTBEAT = 2  # seconds
GRACE = 15  # seconds without a heartbeat after which a worker counts as dead
HANDFUL = 10  # runs that a worker offers at a time: few, so that others rarely offer the same
POLL = 0.5  # seconds between looks at runs that others are doing
PATIENCE = 10  # seconds for a server to answer
FAULTS = (StorageInternalError, SQLAlchemyError)

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)


class Runs:
    """The runs of one study in a database.

    Raises:
        InputError: the database cannot be opened; and in every method, it cannot be read or written any more.
    """

    def __init__(self, url: str, study: str) -> None:
        self._url = url
        self._storage = _open(url)
        with self._refusals():
            self._study = optuna.create_study(storage=self._storage, study_name=study, load_if_exists=True)

    def outcomes(self) -> dict[str, Any]:
        """The outcomes of the runs that are done, by name."""
        return {name: json.loads(trial.user_attrs["result"])["outcome"] for name, trial in self._done().items()}

    def records(self) -> list[dict[str, Any]]:
        """Every run that is done, with what it was, who did it and when, in the order of the names."""
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
        self, runs: Mapping[str, Any], perform: Callable[[Any], Any], done: Callable[[], None] = lambda: None
    ) -> None:
        """Do the runs that nobody does, until all of them are done; ``done`` is called after each of one's own."""
        names = list(runs)
        start = random.Random().randrange(len(names)) if names else 0
        names = names[start:] + names[:start]  # workers that begin at different places do not go for the same runs
        with self._refusals():
            while not self._look_and_work(names, runs, perform, done):
                pass

    def close(self) -> None:
        """Let go of the database."""
        self._storage.engine.dispose()

    def _look_and_work(
        self, names: list[str], runs: Mapping[str, Any], perform: Callable[[Any], Any], done: Callable[[], None]
    ) -> bool:
        """Do what one look at the database shows to be free; whether all was done already."""
        with _experimental():
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
        free = [name for name in mine or names if live[name].state == TrialState.WAITING]
        for name in free:
            trial = live[name]._trial_id  # Optuna has no public way to claim a certain trial, or to keep it alive
            if not self._claim(trial):
                return False  # another worker was here: what this one saw is out of date
            if self._perform(trial, runs[name], perform):
                done()
        if not (mine or free):
            time.sleep(POLL)
        return False

    def _live(self) -> dict[str, FrozenTrial]:
        with self._refusals():
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

    def _perform(self, trial: int, run: Any, perform: Callable[[Any], Any]) -> bool:
        """Whether the outcome is this worker's."""
        try:
            with self._heartbeat(trial):
                outcome = perform(run)
            result = {"outcome": outcome, "worker": f"{socket.gethostname()}:{os.getpid()}"}
            self._storage.set_trial_user_attr(trial, "result", json.dumps(result))
            self._storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.0])
        except UpdateFinishedTrialError:
            return False  # this process slept for so long that the run was given to another worker
        except BaseException:
            with suppress(UpdateFinishedTrialError, *FAULTS):
                self._storage.set_trial_state_values(trial, TrialState.FAIL)
            raise
        return True

    @contextmanager
    def _heartbeat(self, trial: int) -> Iterator[None]:
        """Like Optuna's own, which ends for good, with a traceback, where a single beat cannot be written."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                with suppress(*FAULTS):
                    self._storage.record_heartbeat(trial)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except FAULTS as error:
            reason = _reason(error, self._url)
            raise InputError(f"the storage {_shown(self._url)}: {reason}; the same command goes on") from error


def check(url: str) -> None:
    """Refuse a database that cannot be used.

    Raises:
        InputError: it cannot be opened.
    """
    _open(url).engine.dispose()


def file_url(path: Path) -> str:
    """The URL of an SQLite file."""
    return URL.create("sqlite", database=str(path.resolve())).render_as_string()


def _open(url: str) -> RDBStorage:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InputError("--storage is no database URL such as postgresql+psycopg://user@host/name") from None
    local = parsed.get_backend_name() == "sqlite"
    if local and parsed.database in (None, "", ":memory:"):
        raise InputError(f"the storage {url} is in the memory of one process: name a file, sqlite:///path")
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
    if parsed.drivername == "postgresql+psycopg" and "connect_timeout" not in parsed.query:
        options["connect_args"] = {"connect_timeout": PATIENCE}
    storage = _created(parsed, options)
    if local:
        event.listen(storage.engine, "connect", _configure)
        event.listen(storage.engine, "begin", _begin)
        storage.engine.dispose()
    return storage


def _configure(connection: sqlite3.Connection, _: Any) -> None:
    """A log ahead of the database needs no wait for the disk at every commit, and survives a loss of power."""
    connection.isolation_level = None
    with suppress(sqlite3.OperationalError):  # another process is at it, or the file system cannot do it
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin(connection: Connection) -> None:
    """A reader that becomes a writer fails at once when another writes; one that says so first waits its turn."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _created(url: URL, options: dict[str, Any]) -> RDBStorage:
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    pauses = [0.1, 0.2, 0.4, 0.8, 1.6]
    while True:
        try:
            with _experimental():
                return RDBStorage(text, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
        except ImportError as error:
            needed = getattr(error.__cause__, "name", None) or "another driver"
            hint = ": pip install 'asam[postgresql]'" if needed == "psycopg" else ""
            raise InputError(f"the storage {_shown(text)} needs {needed}{hint}") from None
        except Exception as error:
            if not pauses or not _races(error):
                reason = _reason(error, text)
                raise InputError(f"the storage {_shown(text)} cannot be opened: {reason}") from None
        time.sleep(pauses.pop(0))


def _races(error: Exception) -> bool:
    """Whether it may be that another worker makes the tables of a new database at the same time."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    text = str(cause)  # SQLite's, which is in English
    return isinstance(cause, IntegrityError | ProgrammingError) or "already exists" in text or "locked" in text


@contextmanager
def _experimental() -> Iterator[None]:
    """Optuna warns that its heartbeat may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _reason(error: Exception, url: str) -> str:
    cause = error.__cause__ or error if isinstance(error, StorageInternalError) else error
    text = " ".join(str(getattr(cause, "orig", None) or cause).split())
    password = make_url(url).password
    return text.replace(password, "***") if password else text


def _shown(url: str) -> str:
    """The URL without what may be secret."""
    return make_url(url).set(query={}).render_as_string()
