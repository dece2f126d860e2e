"""The database behind runs and trials: Optuna's, in an SQLite file or on a PostgreSQL server."""

import logging
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from . import InputError

HEARTBEAT = 2  # seconds
GRACE = 15  # seconds without a heartbeat after which a worker counts as dead
PATIENCE = 10  # seconds for a server to answer
FAULTS = (StorageInternalError, SQLAlchemyError)

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)


@contextmanager
def refusals(url: str) -> Iterator[None]:
    """Faults of the database as bad input, in a line without the password."""
    try:
        yield
    except FAULTS as error:
        reason = _reason(error, url)
        raise InputError(f"the storage {_shown(url)}: {reason}; the same command goes on") from error


@contextmanager
def opened(url: str) -> Iterator[RDBStorage]:
    """The database for a while, whose faults are refused.

    Raises:
        InputError: it cannot be opened, read or written.
    """
    storage = open_database(url)
    try:
        with refusals(url):
            yield storage
    finally:
        storage.engine.dispose()


def check(url: str) -> None:
    """Refuse a database that cannot be used.

    Raises:
        InputError: it cannot be opened.
    """
    with opened(url):
        pass


def file_url(path: Path) -> str:
    """The URL of an SQLite file."""
    return URL.create("sqlite", database=str(path.resolve())).render_as_string()


def open_database(url: str) -> RDBStorage:
    """The database; what opens it closes it, by ``engine.dispose()``.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        parsed = make_url(url)
        parsed.render_as_string()  # it may be no Unicode
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
            with experimental():
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
def experimental() -> Iterator[None]:
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
