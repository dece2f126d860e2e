"""What is measured: a run of the comparison, or a model of the user's own with its loss and data."""

import copy
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..measure import Objective, normalized_logits
from ..measure.batches import first
from ..parameters import bare_names
from . import InputError, tasks
from .checkpoints import tensors
from .run import as_run, read_run
from .training import initial_network

WEIGHTS = ("state_dict", "model_state_dict", "model")  # where checkpoints of other tools keep them


@dataclass(frozen=True)
class Target:
    """A model with what is needed to measure it.

    ``data`` holds the training examples to measure on. ``held_out`` holds data sets by their names, the first of the
    same distribution. ``prior`` holds the weights before training, where they are known.
    """

    name: str
    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Any]
    data: list[Any]
    held_out: dict[str, list[Any]] = field(default_factory=dict)
    prior: dict[str, Tensor] | None = None


def find(
    names: Sequence[str], function: str | None, *, examples: int, seed: int, normalize_logits: bool
) -> list[Target]:
    """What the user means by each name: a run's file, a checkpoint with a function, or a function alone.

    A function is called once, from a fixed seed, so that all its checkpoints are measured on the same data.

    Raises:
        InputError: there is no such thing, or it is not what it should be.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be at least 0 and less than 2**63, got {seed}")
    targets: list[Target] = []
    made = None if function is None else _call(function, examples, seed)
    for name in names:
        if made is not None:
            model = made.model if len(names) == 1 else _copied(made.model)
            _load_weights(model, _checkpoint(Path(name)))
            targets.append(replace(made, name=Path(name).stem, model=model))
        elif ":" in name and not Path(name).exists():
            targets.append(_call(name, examples, seed))
        else:
            targets.append(_run(Path(name), examples, normalize_logits))
            continue
        if normalize_logits:
            raise InputError("--normalize-logits is for runs: in your loss, use asam.measure.normalized_logits")
    return targets


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the model cannot be copied, so give one checkpoint at a time ({reason[:200]})") from error


def _run(path: Path, examples: int, normalize_logits: bool) -> Target:
    if path.is_dir():
        example = _example(path)
        raise InputError(
            f"{path} is a folder{f': name one of its runs, such as {example}' if example else ' without runs'}"
        )
    bare = path.with_suffix("") if path.suffix in (".json", ".pt") else path
    configuration, weights = bare.with_name(bare.name + ".json"), bare.with_name(bare.name + ".pt")
    if not configuration.exists():
        hint = ", and there is no such file"
        if path.exists():
            hint = ": for a checkpoint of your own, name the function that makes its model with --model module:function"
        raise InputError(f"{path} is not a run of asam compare or asam train{hint}")
    try:
        run = as_run(read_run(configuration), "the file")
    except InputError as error:
        raise InputError(f"{configuration} is not a run of asam compare or asam train ({error})") from None
    task = tasks.find(run)
    if not isinstance(task, tasks.Classification):
        raise InputError(f"{configuration}: runs on {run.dataset} are measured with --model module:function")
    data, model = task.data, initial_network(run, task)
    prior = {name: param.detach().clone() for name, param in model.named_parameters()}
    # running statistics come from the training data, and no prior may
    known_prior = None if any(buffer.is_floating_point() for buffer in model.buffers()) else prior
    _load_weights(model, _checkpoint(weights))
    held_out: dict[str, list[Any]] = {"held-out error": [(data.test.inputs, data.test.labels)]}
    if run.noise > 0:
        noisy = [(data.noisy_test.inputs, data.noisy_test.labels)]
        held_out = {
            "held-out error, labels as noisy as in training": noisy,
            "held-out error, clean labels": [(data.test.inputs, data.test.labels)],
        }
    loss_fn = _normalized_loss if normalize_logits else _loss
    batches = first([(data.train.inputs, data.train.labels)], examples)
    # asam train calls each of its runs so, in a folder with a name
    name = bare.resolve().parent.name if bare.name == "run" else bare.name
    return Target(name, model, loss_fn, batches, held_out, known_prior)


def counted(target: Target, advance: Callable[[float], None]) -> Objective:
    """The objective of a target; ``advance`` is called with the passes made, a backward pass counted as two."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        try:
            with redirect_stdout(sys.stderr):
                result = target.loss_fn(model, batch)
        except Exception as error:
            message = " ".join(str(error).split())
            raise InputError(f"{target.name}: the loss raised {type(error).__name__}: {message}") from error
        advance((3 if torch.is_grad_enabled() else 1) / len(target.data))
        return result

    return Objective(target.model, loss_fn, target.data)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch[0])
    return cross_entropy(logits, batch[1]), {"error": (logits.argmax(1) != batch[1]).double().mean()}


def _normalized_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch[0])
    error = (logits.argmax(1) != batch[1]).double().mean()
    return cross_entropy(normalized_logits(logits), batch[1]), {"error": error}


def _example(folder: Path) -> Path | None:
    runs = folder / "runs" if (folder / "runs").is_dir() else folder
    return next(
        (file.with_suffix("") for file in sorted(runs.glob("*.pt")) if file.with_suffix(".json").exists()), None
    )


def _call(function: str, examples: int, seed: int) -> Target:
    """What the user's function returns."""
    torch.manual_seed(seed)
    try:
        # what the user's code prints is no part of the results
        with redirect_stdout(sys.stderr):
            made = imported(function)()
            if not (isinstance(made, tuple) and len(made) in (3, 4)):
                made = None, None, None
            model, loss_fn, data = made[:3]
            if not (isinstance(model, nn.Module) and callable(loss_fn) and isinstance(data, Iterable)):
                raise InputError("it must return (model, loss_fn, data) or (model, loss_fn, data, held_out)")
            batches = first(data, examples)
            held_out = {"held-out error": first(made[3], sys.maxsize)} if len(made) == 4 else {}
    except InputError as error:
        raise InputError(f"{function}: {error}") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{function}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return Target(function, model, loss_fn, batches, held_out)


def imported(function: str) -> Any:
    """The user's ``module:function``; modules are looked for in the current folder too.

    Raises:
        InputError: it is not named so.
    """
    module_name, _, name = function.partition(":")
    if not module_name or not name:
        raise InputError(f"a function is named module:function, got {function!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return getattr(importlib.import_module(module_name), name)


def _checkpoint(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    try:
        state = tensors(content)
    except Exception as error:  # what a broken file raises depends on where it breaks
        raise InputError(
            f"{path} is not a checkpoint of tensors alone ({type(error).__name__}): save model.state_dict()"
        ) from None
    for key in WEIGHTS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} holds no state dict")
    return state


def _load_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    ours = {short: name for name, short in bare_names(model.state_dict()).items()}  # whatever either is wrapped in
    renamed = {ours.get(short, name): state[name] for name, short in bare_names(state).items()}
    try:
        model.load_state_dict(renamed)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint does not fit the model: {' '.join(str(error).split())[:300]}") from None
