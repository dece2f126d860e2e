"""What a run trains on: batches, a network, a loss, and what is measured after an epoch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import InputError
from .data import Split, augmented, load
from .models import build, rescale_
from .run import Run

EVALUATION_BATCH = 1000

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """The part of a run that is not the same for all data."""

    steps: int  # in an epoch

    def network(self) -> nn.Module:
        """The network before training, from torch's default generator."""
        ...

    def batches(self, generator: torch.Generator, rank: int, world: int) -> Iterator[Batch]:
        """The batches of an epoch; of each, the share of one of ``world`` processes. All draws are the generator's."""
        ...

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch, a scalar."""
        ...

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Metrics after an epoch, in eval mode, by their names; ``validation_...`` is what choices are made by."""
        ...

    def final(self, network: nn.Module) -> dict[str, float]:
        """Metrics after the last epoch that are not worth their time after every one."""
        ...


def find(run: Run) -> Task:
    """The task of a run.

    Raises:
        InputError: its data is not there.
    """
    if run.dataset == "help-texts":
        from .translation import Translation

        return Translation(run)
    if run.dataset == "image-folder":
        from .image_folder import ImageFolder

        return ImageFolder(run)
    return Classification(run)


class Classification:
    """Images in memory. Errors are percentages; the gap is taken on test labels as noisy as the training labels."""

    def __init__(self, run: Run) -> None:
        self._run = run
        data = load(run.dataset, run.data_dir, run.noise, run.seed, run.train_size)
        size = run.test_size
        if size is not None and size > len(data.test.labels):
            raise InputError(f"test_size must be at most {len(data.test.labels)}, got {size}")
        validation, test, noisy = (
            Split(part.inputs[:size], part.labels[:size]) for part in (data.validation, data.test, data.noisy_test)
        )
        self.data = replace(data, validation=validation, test=test, noisy_test=noisy)
        self._n = len(self.data.train.labels)
        self.steps = -(-self._n // run.batch_size)

    def network(self) -> nn.Module:
        """The network of the run, its first layers rescaled by ``run.scale``."""
        run = self._run
        network = build(run.model, tuple(self.data.train.inputs.shape[1:]), self.data.classes, run.dropout)
        if run.scale != 1:
            rescale_(network, run.scale)
        return network

    def batches(self, generator: torch.Generator, rank: int, world: int) -> Iterator[Batch]:
        """Images (n, channels, height, width) and labels (n,)."""
        for index in torch.split(torch.randperm(self._n, generator=generator), self._run.batch_size):
            inputs = self.data.train.inputs[index]
            if self._run.augment:
                inputs = augmented(inputs, generator, self.data.flips, self.data.black)
            yield share(inputs, rank, world), share(self.data.train.labels[index], rank, world)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        inputs, labels = batch
        return cross_entropy(network(inputs), labels, label_smoothing=self._run.label_smoothing)

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Errors on training, validation (where there is any) and test data."""
        parts = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        return {f"{name}_error": error_and_loss(network, part)[0] for name, part in parts.items() if len(part.labels)}

    def final(self, network: nn.Module) -> dict[str, float]:
        """The generalization gap in error and in loss."""
        train, test = (error_and_loss(network, part) for part in (self.data.train, self.data.noisy_test))
        return {"generalization_gap": test[0] - train[0], "loss_gap": test[1] - train[1]}


def share(batch: Tensor, rank: int, world: int) -> Tensor:
    """What one of several processes takes of a batch: at least one example, the first if there are not enough."""
    return batch[rank::world] if rank < len(batch) else batch[:1]


def error_and_loss(network: nn.Module, split: Split) -> tuple[float, float]:
    """Percentage of examples whose label is not the network's choice, and mean cross-entropy, in eval mode."""
    device, mode = next(network.parameters()).device, network.training
    network.eval()
    wrong, loss = 0, 0.0
    with torch.no_grad():
        parts = (torch.split(part, EVALUATION_BATCH) for part in (split.inputs, split.labels))
        for inputs, labels in zip(*parts, strict=True):
            logits, labels = network(inputs.to(device)), labels.to(device)
            wrong += int((logits.argmax(1) != labels).sum())
            loss += float(cross_entropy(logits, labels, reduction="sum"))
    network.train(mode)
    return 100 * wrong / len(split.labels), loss / len(split.labels)
