"""Checkpoints of a run: written whole or not at all, read without running code, refused if they are another run's."""

import io
import pickle
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


def load(path: Path, run: Run) -> dict[str, Any]:
    """The state of the run.

    Raises:
        InputError: the file cannot be read, is no checkpoint, or that of another run.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        of, state = found["run"], found["state"]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is not a checkpoint of a run ({reason}): start again with --force") from None
    if of != asdict(run):
        differs = sorted(key for key in of.keys() | asdict(run).keys() if of.get(key) != asdict(run).get(key))
        raise InputError(f"{path} is of another run ({', '.join(differs)}): choose another --out, or --force")
    return dict(state)
