"""A run: everything that decides its outcome, in one frozen configuration that can be stored and read back."""

import json
import math
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import InputError

LARGEST = 1e18  # squares of larger numbers leave the range of float32


def _said(text: str, default: Any, *choices: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Run:
    """One training run."""

    method: str = _said(
        "sgd: the plain gradient of the base optimizer; sam; asam; economical: against the momentum, then asam.",
        "asam",
        "sgd",
        "sam",
        "asam",
        "economical",
    )
    seed: int = _said("Fixes split, noisy labels, initial weights, batches and dropout.", 0)
    rho: float = _said("Neighborhood size; 0.5 if it is not given to asam train, for SAM 0.05.", 0.0)
    eta: float = _said("Stabilizer of T_w.", 0.01)
    normalization: str = _said("T_w of ASAM.", "elementwise", "elementwise", "filterwise", "layerwise", "none")
    p: float = _said("The norm of the ball, inf included.", 2.0)
    bias: str = _said("What holds for biases.", "unscaled", "unscaled", "scaled", "fixed")
    perturb: str = _said(
        "Which parameters: all, those of two dimensions or more, those of normalization layers.",
        "all",
        "all",
        "weights",
        "norm",
    )
    every: int = _said("Of sam and asam: one step of so many, the plain gradient in the others.", 1)
    ascent_share: float = _said("Of sam and asam: the share of a batch that is climbed on.", 1.0)
    exact: float = _said("Of economical: the share of exact steps, the last ones.", 0.25)
    momentum_rho: float = _said("Of economical: rho against the momentum; 0: twice rho.", 0.0)
    memory: str = _said("Of economical: its own mean of gradients, or the optimizer's.", "own", "own", "optimizer")
    decay: float = _said("Of economical: decay of its own mean.", 0.9)
    optimizer: str = _said("The base optimizer.", "sgd", "sgd", "adam", "adamw")
    lr: float = _said("Learning rate.", 0.03)
    momentum: float = _said("Of SGD.", 0.9)
    beta2: float = _said("Of Adam and AdamW.", 0.999)
    weight_decay: float = _said("Weight decay.", 5e-4)
    clip: float = _said("Largest norm of the gradient; 0: as it is.", 0.0)
    schedule: str = _said("Of the learning rate.", "cosine", "cosine", "inverse-sqrt", "constant")
    warmup: int = _said("Steps in which the learning rate rises linearly.", 0)
    epochs: int = _said("Epochs.", 60)
    batch_size: int = _said("Examples in a step, over all processes.", 50)
    label_smoothing: float = _said("Of the training loss.", 0.0)
    dataset: str = _said(
        "Data.", "digits", "digits", "fashion-mnist", "glyphs", "cifar10", "cifar100", "image-folder", "help-texts"
    )
    data_dir: str | None = _said("Folder of the data.", None)
    train_size: int | None = _said("Training examples; by default those of the data set.", None)
    image_size: int = _said("Side of the images of an image-folder, which are scaled to it.", 224)
    test_size: int | None = _said("Test and validation examples each; by default those of the data set.", None)
    noise: float = _said("Share of wrong training labels.", 0.0)
    augment: bool = _said("Random crops and flips.", False)
    model: str = _said(
        "mlp, cnn, vit, or a network of pytorchcv such as resnet20 or wrn28-10; of help-texts transformer-tiny or "
        "transformer-iwslt.",
        "mlp",
    )
    dropout: float = _said("Dropout rate.", 0.0)
    scale: float = _said("The initial network's first layer times this, the next divided by it.", 1.0)
    evaluate_every: int = _said("Epochs between evaluations.", 1)
    device: str = _said("cpu, cuda, or auto.", "cpu")
    parallel: str = _said(
        "Of several processes: each with a copy of the network, or with a part.", "ddp", "ddp", "fsdp"
    )
    precision: str = _said("Of the passes, by autocast.", "float32", "float32", "bfloat16", "float16")

    @property
    def passes(self) -> float:
        """Gradient evaluations per step, in batches."""
        if self.method == "economical":
            return 1 + self.exact
        return 1 if self.method == "sgd" else 1 + self.ascent_share / self.every

    def but(self, **changes: Any) -> "Run":
        """The same run with some fields changed."""
        return replace(self, **changes)

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            InputError: a field has a value that it cannot have.
        """
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise InputError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
        not_negative, positive = (f"a number {sign} 0 and < {LARGEST:g}" for sign in (">=", ">"))
        limits: dict[str, tuple[bool, str]] = {
            "seed": (0 <= self.seed < 2**63, "at least 0 and less than 2**63"),
            "rho": (0 <= self.rho < LARGEST, not_negative),
            "eta": (0 <= self.eta < LARGEST, not_negative),
            "p": (self.p > 1, "a number > 1 or inf"),
            "every": (self.every >= 1, "at least 1"),
            "ascent_share": (0 < self.ascent_share <= 1, "more than 0 and at most 1"),
            "exact": (0 <= self.exact <= 1, "a share from 0 to 1"),
            "momentum_rho": (0 <= self.momentum_rho < LARGEST, not_negative),
            "decay": (0 <= self.decay < 1, "at least 0 and less than 1"),
            "lr": (0 < self.lr < LARGEST, positive),
            "momentum": (0 <= self.momentum < 1, "at least 0 and less than 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and less than 1"),
            "weight_decay": (0 <= self.weight_decay < LARGEST, not_negative),
            "clip": (0 <= self.clip < LARGEST, not_negative),
            "warmup": (self.warmup >= 0, "at least 0"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0 and less than 1"),
            "train_size": (self.train_size is None or self.train_size >= 1, "at least 1"),
            "image_size": (self.image_size >= 1, "at least 1"),
            "test_size": (self.test_size is None or self.test_size >= 1, "at least 1"),
            "noise": (0 <= self.noise < 1, "at least 0 and less than 1"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "scale": (0 < self.scale < LARGEST, positive),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
        }
        for name, (holds, allowed) in limits.items():
            if not holds:
                raise InputError(f"{name} must be {allowed}, got {getattr(self, name)}")
        if self.method != "sgd" and self.rho == 0:
            raise InputError(f"{self.method} needs rho > 0, got {self.rho}")
        if self.method not in ("sam", "asam"):  # the schedule of an economical run counts every step
            for name, default in (("every", 1), ("ascent_share", 1.0)):
                if getattr(self, name) != default:
                    raise InputError(f"{name} goes with sam and asam, not with {self.method}")
        if self.method == "economical" and self.memory == "own" and self.parallel == "fsdp":
            raise InputError("economical with parallel fsdp needs memory optimizer, which the checkpoint holds")


def as_run(values: dict[str, Any], source: str) -> Run:
    """The run of these values.

    Raises:
        InputError: a name is not a run's, or a value cannot be.
    """
    known = {item.name: item.type for item in fields(Run)}
    values = dict(values)
    for name, value in values.items():
        if value == "inf" and known.get(name) is float:  # JSON has no number for it
            values[name] = value = math.inf
        if name not in known:
            raise InputError(f"{source}: a run has no {name!r}; it has {', '.join(known)}")
        if not _is(value, known[name]):
            raise InputError(f"{source}: {name} has a wrong type, {value!r}")
        if isinstance(value, int) and value >= 2**63:
            raise InputError(f"{source}: {name} must be less than 2**63, got {value}")
    run = Run(**values)
    run.check()
    return run


def read_run(path: Path) -> dict[str, Any]:
    """The values that a TOML or JSON file gives to a run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is neither TOML nor JSON: {error}") from None
    values = values.get("run", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold the names and values of a run")
    return values


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int) if kind is float and isinstance(value, int) else isinstance(value, kind)
