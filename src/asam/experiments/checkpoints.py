"""Checkpoints of a run: written whole or not at all, read without running code, refused if they are another run's."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import InputError
from .files import write_bytes
from .run import Run


def save(path: Path, run: Run, state: dict[str, Any]) -> None:
    """Write the state of a run."""
    save_tensors(path, {"run": asdict(run), "state": state})


def save_tensors(path: Path, value: Any) -> None:
    """Write what torch can save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def tensors(content: bytes) -> Any:
    """What torch has saved; of a broken file, an error of any kind. No code of the file is run."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What a broken checkpoint raises, which depends on where it breaks, as bad input."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise InputError(f"{path} is not a checkpoint of a run ({reason}): start again with --force") from None


def load(path: Path, run: Run, processes: int) -> dict[str, Any]:
    """The state of the run.

    Raises:
        InputError: the file is no checkpoint, or that of another run or of another number of processes.
    """
    content = path.read_bytes()
    with refusals(path):
        found = tensors(content)
        of, state = dict(found["run"]), dict(found["state"])
        generators = len(state["random"])
        # by the names that a run has: those of the file may be anything
        differs = sorted(key for key, value in asdict(run).items() if key not in of or of[key] != value)
        if of.keys() - asdict(run).keys():
            differs.append("settings unknown here")
    if differs:
        raise InputError(f"{path} is of another run ({', '.join(differs)}): choose another --out, or --force")
    if generators != processes:
        raise InputError(f"{path} is of {generators} processes, not {processes}: start as many, or again with --force")
    return state
