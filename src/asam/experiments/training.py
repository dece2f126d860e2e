"""One run: a network trained with one method from one seed, on one thread, with everything measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import ASAM, SAM
from .data import CLASSES, Data, Split, load
from .models import build, rescale_


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of a run."""

    method: str  # "sgd", "sam" or "asam"
    seed: int
    rho: float = 0.0
    eta: float = 0.01
    epochs: int = 60
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 50
    noise: float = 0.4
    scale: float = 1.0  # the initial network's first layer times this, the next divided by it
    dataset: str = "digits"
    data_dir: str | None = None
    model: str = "mlp"

    @property
    def passes(self) -> int:
        """Gradient evaluations per step."""
        return 1 if self.method == "sgd" else 2


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Errors are percentages; the gap is taken on test labels as noisy as the training labels."""

    test_error: float
    train_error: float
    generalization_gap: float
    seconds_per_step: float
    curves: dict[str, list[float]]  # by epoch: train_error, validation_error, test_error


def train(run: Run) -> tuple[Outcome, dict[str, Tensor]]:
    """The outcome and the weights after the last epoch. The time is that of the process, evaluation left out."""
    torch.set_num_threads(1)
    data = load(run.dataset, run.data_dir, run.noise, run.seed)
    network = initial_network(run, data)
    optimizer = torch.optim.SGD(network.parameters(), run.lr, run.momentum, weight_decay=run.weight_decay)
    batches = torch.Generator().manual_seed(run.seed)
    n = len(data.train.labels)
    steps_per_epoch = -(-n // run.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs * steps_per_epoch)
    backward = _backward(run, network)
    curves: dict[str, list[float]] = {"train_error": [], "validation_error": [], "test_error": []}
    seconds = 0.0
    for _ in range(run.epochs):
        start = time.process_time()
        for index in torch.split(torch.randperm(n, generator=batches), run.batch_size):
            inputs, labels = data.train.inputs[index], data.train.labels[index]
            backward(partial(_loss, network, inputs, labels))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        seconds += time.process_time() - start
        for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
            curves[f"{name}_error"].append(error(network, split))
    return _outcome(network, data, curves, seconds / (run.epochs * steps_per_epoch)), network.state_dict()


def initial_network(run: Run, data: Data) -> nn.Sequential:
    """The network of a run before training."""
    torch.manual_seed(run.seed)
    network = build(run.model, tuple(data.train.inputs.shape[1:]), CLASSES)
    rescale_(network, run.scale)
    return network


def error(network: nn.Module, split: Split) -> float:
    """Percentage of examples whose label is not the network's choice, in eval mode."""
    network.eval()
    with torch.no_grad():
        wrong = int((network(split.inputs).argmax(1) != split.labels).sum())
    network.train()
    return 100 * wrong / len(split.labels)


def _outcome(network: nn.Module, data: Data, curves: dict[str, list[float]], seconds_per_step: float) -> Outcome:
    train_error = curves["train_error"][-1]
    gap = error(network, data.noisy_test) - train_error
    return Outcome(curves["test_error"][-1], train_error, gap, seconds_per_step, curves)


def _loss(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(network(inputs), labels)


def _backward(run: Run, network: nn.Module) -> Callable[[Callable[[], Tensor]], Any]:
    if run.method == "sgd":
        return lambda closure: torch.autograd.backward(closure())
    if run.method == "sam":
        return SAM(network, rho=run.rho).backward
    return ASAM(network, rho=run.rho, eta=run.eta).backward
