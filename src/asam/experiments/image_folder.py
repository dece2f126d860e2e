"""Images in files, such as ImageNet: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, decoded while training goes on.

The images of ``val`` are the test data. Validation data is held out of ``train``: of each class 2 % of its images, at
least one, drawn by the seed.
"""

import math
import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from . import InputError
from .models import build, rescale_
from .run import Run

SUFFIXES = (".jpg", ".jpeg", ".png")
HELD_OUT = 0.02
EVALUATION_BATCH = 256
MOST_WORKERS = 8
# of ImageNet, by channel
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

Example = tuple[str, int]  # path, class
Key = tuple[int, int | None]  # which example; the seed of its crop, None for the middle
Batch = tuple[Tensor, ...]


class ImageFolder:
    """Images of ``run.image_size``; random resized crops and flips with ``run.augment``, else the middle.

    Errors are percentages; the top-5 error counts images whose class is not among the network's five first choices.

    Raises:
        InputError: the folder is not there, or has not what it takes.
    """

    def __init__(self, run: Run) -> None:
        if run.noise:
            raise InputError(f"image-folder keeps the labels it has: noise must be 0, got {run.noise}")
        if run.test_size is not None:
            raise InputError("image-folder is tested on all of val: leave --test-size out")
        if run.data_dir is None:
            raise InputError("image-folder needs --data-dir: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
        self._run = run
        folder = Path(run.data_dir)
        found = _classes(folder / "train")
        self.classes = list(found)
        train, self._validation = _held_out(found, run)
        self._train = _Images(train, run.image_size)
        test = _classes(folder / "val")
        if unknown := [name for name in test if name not in found]:
            raise InputError(f"{folder / 'val' / unknown[0]} is of a class that {folder / 'train'} lacks")
        numbers = {name: i for i, name in enumerate(self.classes)}
        self._test = _Images([(path, numbers[name]) for name, paths in test.items() for path in paths], run.image_size)
        self.steps = -(-len(train) // run.batch_size)

    def network(self) -> nn.Module:
        """The network of the run."""
        run = self._run
        network = build(run.model, (3, run.image_size, run.image_size), len(self.classes), run.dropout)
        if run.scale != 1:
            rescale_(network, run.scale)
        return network

    def batches(self, generator: torch.Generator, rank: int, world: int) -> Iterator[Batch]:
        """Images (n, 3, size, size) and labels (n,). An image's crop is of a seed of its own, whoever decodes it."""
        n = len(self._train.examples)
        order = torch.randperm(n, generator=generator).tolist()
        seeds = torch.randint(2**62, (n,), generator=generator).tolist() if self._run.augment else [None] * n
        keys = list(zip(order, seeds, strict=True))
        size = self._run.batch_size
        batches = [keys[start : start + size] for start in range(0, n, size)]
        # at least one, where a last batch does not go round
        return _decoded(self._train, [batch[rank::world] or batch[:1] for batch in batches])

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        inputs, labels = batch
        return cross_entropy(network(inputs), labels, label_smoothing=self._run.label_smoothing)

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Errors on validation and test data."""
        validation, _ = _errors(network, self._validation)
        test, top5 = _errors(network, self._test)
        return {"validation_error": validation, "test_error": test, "test_top5_error": top5}

    def final(self, network: nn.Module) -> dict[str, float]:
        """Nothing more: the training error would take an epoch."""
        return {}


class _Images(Dataset[Batch | str]):
    def __init__(self, examples: list[Example], size: int) -> None:
        self.examples = examples
        self._size = size

    def __getitem__(self, key: Key) -> Batch | str:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Batch | str:
        """A batch, or what is wrong with one of its files: an exception would cross processes with its traceback."""
        inputs = torch.empty(len(keys), 3, self._size, self._size)
        for out, (index, seed) in zip(inputs, keys, strict=True):
            path = self.examples[index][0]
            try:
                with Image.open(path) as opened:
                    if opened.mode.startswith(("I", "F")):  # of which Pillow would cut off what is above 255
                        return f"{path} has more than 8 bits a channel: convert it to 8"
                    image = _cropped(opened.convert("RGB"), self._size, seed)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                return f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            out.copy_((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD)
        return inputs, torch.tensor([self.examples[index][1] for index, _ in keys], dtype=torch.long)


def _cropped(image: Image.Image, size: int, seed: int | None) -> Image.Image:
    if seed is None:
        # the side of 224 in the middle of an image whose shorter side is 256
        width, height = image.size
        side = min(width, height) * 224 / 256
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    draws = random.Random(seed)
    cropped = image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(*image.size, draws))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.random() < 0.5 else cropped


def random_box(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """A box of 8 to 100 % of the area, its sides 3:4 to 4:3; left, top, right, bottom. As Inception's training crops.

    Where ten draws do not fit, the largest box in the middle whose sides are within those ratios.
    """
    for _ in range(10):
        area = width * height * draws.uniform(0.08, 1)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draws.randint(0, width - w), draws.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _classes(folder: Path) -> dict[str, list[str]]:
    """The images of each class."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not there: --data-dir must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    found = {
        entry.name: sorted(str(file) for file in entry.iterdir() if _is_image(file))
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not found:
        raise InputError(f"{folder} has no classes: each is a folder of images in it")
    if empty := [name for name, files in found.items() if not files]:
        raise InputError(f"{folder / empty[0]} has no image ({', '.join(SUFFIXES)})")
    return found


def _is_image(file: Path) -> bool:
    """By its name; some systems leave hidden files beside those of the user."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _held_out(found: dict[str, list[str]], run: Run) -> tuple[list[Example], _Images]:
    """Training data in random order, as much as asked for, and validation data."""
    generator = torch.Generator().manual_seed(run.seed)
    train: list[Example] = []
    validation: list[Example] = []
    for number, (name, paths) in enumerate(found.items()):
        if len(paths) < 2:
            raise InputError(f"the class {name} has one training image: it takes another for validation")
        order = torch.randperm(len(paths), generator=generator).tolist()
        held = max(1, round(HELD_OUT * len(paths)))
        validation += [(paths[i], number) for i in order[:held]]
        train += [(paths[i], number) for i in order[held:]]
    if run.train_size is not None and run.train_size > len(train):
        raise InputError(f"train_size must be at most {len(train)}, got {run.train_size}")
    chosen = torch.randperm(len(train), generator=generator).tolist()[: run.train_size]
    return [train[i] for i in chosen], _Images(validation, run.image_size)


def _decoded(images: _Images, batches: list[list[Key]]) -> Iterator[Batch]:
    # workers of workers are not allowed; the loader's own seed must not come from torch's default generator
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 0 if multiprocessing.current_process().daemon else min(MOST_WORKERS, processors, len(batches))
    loader: DataLoader[Batch | str] = DataLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator()
    )
    for batch in loader:
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _errors(network: nn.Module, images: _Images) -> tuple[float, float]:
    """Top-1 and top-5 error, in eval mode."""
    device = next(network.parameters()).device
    keys: list[Key] = [(i, None) for i in range(len(images.examples))]
    batches = [keys[start : start + EVALUATION_BATCH] for start in range(0, len(keys), EVALUATION_BATCH)]
    wrong = torch.zeros(2, dtype=torch.long)
    mode = network.training
    network.eval()
    with torch.no_grad():
        for inputs, labels in _decoded(images, batches):
            logits = network(inputs.to(device))
            hits = logits.topk(min(5, logits.shape[1])).indices.cpu() == labels[:, None]
            wrong += len(labels) - torch.stack([hits[:, 0].sum(), hits.sum()])
    network.train(mode)
    top1, top5 = (100 * wrong / len(keys)).tolist()
    return top1, top5
