"""Several processes at the same work, which they share through a database."""

import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from . import InputError
from .processes import end, end_with_parent, interrupts_held_back

LOOK = 0.5  # seconds between looks at how far the work is
SHARE = 0.02  # of the time, at most, that is taken by looking: the cores are the workers'


def work_together(
    work: Callable[..., None], arguments: tuple[Any, ...], workers: int, look: Callable[[], bool]
) -> None:
    """Call ``work(*arguments)`` in so many processes; ``look``, called in between, tells whether all is done.

    Raises:
        Exception: the first that a process raised; the others are ended.
        InputError: not all is done, and no process is left.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Connection] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(work, arguments, theirs))
            with interrupts_held_back():
                process.start()
                processes[process] = ours
            theirs.close()
        alive, pause = {process.sentinel: process for process in processes}, 0.0
        while alive:
            for sentinel in wait(list(alive), timeout=pause):
                alive.pop(sentinel).join()
            _raise_first(processes.values())
            begun = time.monotonic()
            done = look()  # once more after the last has ended
            pause = max(LOOK, (time.monotonic() - begun) / SHARE)
    finally:
        end(list(processes))
    if not done:
        raise InputError("the worker processes were killed (out of memory?): the same command goes on")


def _raise_first(connections: Iterable[Connection]) -> None:
    for connection in connections:
        with suppress(EOFError):
            if connection.poll():
                raise connection.recv()


def _worker(work: Callable[..., None], arguments: tuple[Any, ...], connection: Connection) -> None:
    signal.signal(signal.SIGTERM, _put_down)
    end_with_parent()
    try:
        work(*arguments)
    except Exception as error:
        connection.send(_portable(error))


def _put_down(*_: Any) -> NoReturn:
    """Leave the run that is being performed to others, at once."""
    sys.exit(1)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or another with its text where it cannot go to another process."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("".join(traceback.format_exception(error)))
    return copy
