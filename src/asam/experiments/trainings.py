"""The training that is tuned: the user's own function, or that of a run's file."""

import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from .. import ASAM
from . import InputError
from .run import Run, as_run, read_run
from .targets import imported
from .training import Training


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


def read(target: str) -> Run | None:
    """The run of a file; none if the target is a function.

    Raises:
        InputError: it is no run of ASAM.
    """
    if ":" in target and not Path(target).exists():
        return None
    run = as_run({"method": "asam", "rho": 1.0, **read_run(Path(target))}, target)
    if run.method != "asam":
        raise InputError(f"{target}: method must be asam, got {run.method}")
    return run


def find(target: str, run: Run | None) -> Train:
    """What trains: the run, or the function that the target names.

    Raises:
        InputError: there is no such function.
    """
    if run is not None:
        return lambda choice, seed, report: _train(run, choice, seed, report)
    try:
        with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the results
            function = imported(target)
        inspect.signature(function).bind(lambda model: None, 0, lambda error: None)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{target} must be a function of (asam, seed, report): {_said(error, target)}") from error
    return lambda choice, seed, report: _call(function, target, choice, seed, report)


def _call(
    function: Callable[..., Any], target: str, choice: Choice, seed: int, report: Callable[[float], None]
) -> None:
    made = False

    def asam(model: nn.Module, **others: Any) -> ASAM:
        nonlocal made
        made = True
        return choice.asam(model, **others)

    try:
        with redirect_stdout(sys.stderr):
            function(asam, seed, report)
    except (InputError, optuna.TrialPruned):
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{target}: the training raised {_said(error, target)}") from error
    if not made:
        raise InputError(f"{target}: the training never called asam(model): all values of rho would do the same")


def _said(error: BaseException, target: str) -> str:
    """The error in a line, with the last line of the user's module that led to it."""
    module = tuple(target.partition(":")[0].split("."))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).with_suffix("").parts[-len(module) :] == module]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _train(run: Run, choice: Choice, seed: int, report: Callable[[float], None]) -> None:
    def epoch_done(epoch: int, metrics: dict[str, float]) -> None:
        names = [name for name in metrics if name.startswith("validation")]
        if not names:
            raise InputError("the run has no validation data: choose a smaller train_size")
        report(metrics[names[0]])

    torch.set_num_threads(1)
    Training(replace(run, seed=seed, **asdict(choice))).advance(epoch_done)
