"""What the commands show while they work, and how they say no."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import InputError

NARROWEST = 80  # columns in which every table shows its values


def say(text: str, *, wrapped: bool = True) -> None:
    """Print a text as it is, in lines as long as the terminal is wide if ``wrapped``."""
    _console().print(text, soft_wrap=not wrapped)


def print_table(table: Table) -> None:
    """Print a table; in a narrower terminal its lines are broken, and no values left out."""
    _console(width=max(NARROWEST, Console().width)).print(table)


@contextmanager
def progress(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar on standard error with the time left; yields what advances it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with _shown(Progress(*columns, TimeRemainingColumn(), console=_console(stderr=True))) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, completed=total)


@contextmanager
def counted(description: str, unit: str = "runs", *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """The same for runs whose number grows as the study goes on."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
    )
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with _shown(Progress(*columns, *times, console=_console(stderr=True), disable=not shown)) as progress:
        task = progress.add_task(description, total=1)
        yield lambda done, planned: progress.update(task, completed=done, total=planned)


def _console(**options: Any) -> Console:
    """What prints names and paths of the user's as they are: none of them is markup, or an emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def _shown(progress: Progress) -> Iterator[Progress]:
    """The bar, on and off; of what is refused nothing stays but the line that says so."""
    progress.start()
    try:
        yield progress
    except (InputError, OSError):
        progress.live.transient = True
        progress.live.stop()
        raise
    finally:
        if progress.live.is_started:
            progress.stop()


@contextmanager
def refusals() -> Iterator[None]:
    """What the library or torch refuses in the user's model, loss or data, as bad input."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(" ".join(str(error).split())) from error


def refusal(error: InputError | OSError) -> str:
    """What is said of bad input, or of a file that cannot be read or written."""
    if isinstance(error, OSError):
        return f"{error.filename or 'the results'}: {error.strerror or error}"
    return str(error)


def last_words(message: str) -> None:
    """Say on standard error, in a line, why a command ends."""
    if "--force" in sys.argv:  # it would start again
        message = message.replace("the same command goes on", "the same command without --force goes on")
    print(f"asam: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
