"""What is measured: a run of the comparison, or a model of the user's own with its loss and data."""

import importlib
import json
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..measure import normalized_logits
from ..measure.batches import first
from . import InputError
from .data import load
from .training import Run, initial_network

WEIGHTS = ("state_dict", "model_state_dict", "model")  # where checkpoints of other tools keep them


@dataclass(frozen=True)
class Target:
    """A model with what is needed to measure it.

    ``held_out`` holds data sets by their names, the first of the same distribution as the training data. ``prior``
    holds the weights before training, where they are known.
    """

    name: str
    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Any]
    data: Iterable[Any]
    held_out: dict[str, Iterable[Any]] = field(default_factory=dict)
    prior: dict[str, Tensor] | None = None

    def batches(self, examples: int) -> list[Any]:
        """The first so many examples of the training data."""
        return first(self.data, examples)


def find(target: str, function: str | None, *, normalize_logits: bool) -> Target:
    """The target that the user means: a run's file, a checkpoint with a function, or a function alone.

    Raises:
        InputError: there is no such thing, or it is not what it should be.
    """
    if function is not None:
        model, loss_fn, data, held_out = _call(function)
        _load_weights(model, _checkpoint(Path(target)))
    elif ":" in target and not Path(target).exists():
        model, loss_fn, data, held_out = _call(target)
    else:
        return _run(Path(target), normalize_logits)
    if normalize_logits:
        raise InputError("--normalize-logits is for runs: in a loss of your own, use asam.measure.normalized_logits")
    return Target(Path(target).stem if function else target, model, loss_fn, data, held_out)


def _run(path: Path, normalize_logits: bool) -> Target:
    if path.is_dir():
        raise InputError(f"{path} is a folder: name one of its runs, such as {_example(path)}")
    bare = path.with_suffix("") if path.suffix in (".json", ".pt") else path
    configuration, weights = bare.with_name(bare.name + ".json"), bare.with_name(bare.name + ".pt")
    if not configuration.exists():
        hint = ": for a checkpoint of your own, name the function that makes its model with --model module:function"
        raise InputError(
            f"{path} is not a run of asam compare{hint if path.exists() else ', and there is no such file'}"
        )
    try:
        run = Run(**json.loads(configuration.read_text(encoding="utf-8"))["run"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{configuration} is not a run of asam compare ({error})") from None
    data = load(run.dataset, run.data_dir, run.noise, run.seed)
    model = initial_network(run, data)
    prior = {name: param.detach().clone() for name, param in model.named_parameters()}
    _load_weights(model, _checkpoint(weights))
    held_out: dict[str, Iterable[Any]] = {"held-out error": [(data.test.inputs, data.test.labels)]}
    if run.noise > 0:
        noisy = [(data.noisy_test.inputs, data.noisy_test.labels)]
        held_out = {
            "held-out error, labels as noisy as in training": noisy,
            "held-out error, clean labels": [(data.test.inputs, data.test.labels)],
        }
    loss_fn = _normalized_loss if normalize_logits else _loss
    return Target(bare.name, model, loss_fn, [(data.train.inputs, data.train.labels)], held_out, prior)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch[0])
    return cross_entropy(logits, batch[1]), {"error": (logits.argmax(1) != batch[1]).double().mean()}


def _normalized_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch[0])
    error = (logits.argmax(1) != batch[1]).double().mean()
    return cross_entropy(normalized_logits(logits), batch[1]), {"error": error}


def _example(folder: Path) -> str:
    runs = folder / "runs" if (folder / "runs").is_dir() else folder
    return str(next((file.with_suffix("") for file in sorted(runs.glob("*.json"))), folder / "runs" / "asam-x1-seed0"))


def _call(function: str) -> tuple[nn.Module, Callable[[nn.Module, Any], Any], Iterable[Any], dict[str, Iterable[Any]]]:
    """What the user's function returns; modules are looked for in the current folder too."""
    module_name, _, name = function.partition(":")
    if not module_name or not name:
        raise InputError(f"a function is named module:function, got {function!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        made = getattr(importlib.import_module(module_name), name)()
    except Exception as error:
        raise InputError(f"{function}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not (
        isinstance(made, tuple)
        and len(made) in (3, 4)
        and isinstance(made[0], nn.Module)
        and callable(made[1])
        and isinstance(made[2], Iterable)
    ):
        raise InputError(f"{function} must return (model, loss_fn, data) or (model, loss_fn, data, held_out)")
    return made[0], made[1], made[2], {"held-out error": made[3]} if len(made) == 4 else {}


def _checkpoint(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} does not load as weights only: {reason}") from None
    for key in WEIGHTS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} holds no state dict")
    return state


def _load_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint does not fit the model: {' '.join(str(error).split())[:300]}") from None
