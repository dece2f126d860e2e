"""Images in memory: what is there without a download, and CIFAR where the user has it.

A seed fixes the split into training, validation and test data, and which labels are noisy.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import InputError, cifar

# where Debian's package dataset-fashion-mnist puts the files
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# examples: training, validation, test
SIZES = {
    "digits": [500, 297, 1000],
    "fashion-mnist": [2000, 1000, 10000],
    "cifar10": [45000, 5000, 10000],
    "cifar100": [45000, 5000, 10000],
}
CLASSES = {"cifar100": 100, "glyphs": 36}  # of the others 10
FLIPPED = ("fashion-mnist", "cifar10", "cifar100")  # a mirrored letter is another one, or none
# of the glyphs: where the families of the training data end, and those of the validation data
CUTS = (0.65, 0.75)
CHUNK = 1000


@dataclass(frozen=True)
class Split:
    """Images of shape (n, channels, height, width), of mean 0 and standard deviation 1 over all, and labels (n,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Training data with noisy labels; clean validation and test data; the test data once more with noisy labels."""

    train: Split
    validation: Split  # empty where all that is not test data is trained on
    test: Split
    noisy_test: Split
    classes: int
    flips: bool  # whether a mirrored image is as good
    black: Tensor  # what a pixel of value 0 has become, (channels, 1, 1)


@dataclass(frozen=True)
class _Source:
    images: np.ndarray  # as stored, (n, channels, height, width)
    labels: Tensor
    mean: np.ndarray  # (channels, 1, 1) or a scalar
    std: np.ndarray
    n_test: int = 0  # the last so many are the official test data
    families: Tensor | None = None


def load(dataset: str, folder: str | None, noise: float, seed: int, train_size: int | None = None) -> Data:
    """The data of one seed: ``noise`` is the share of labels replaced by another class, drawn uniformly.

    Test data are the official ones of CIFAR, of Fashion-MNIST where a ``train_size`` is given, else drawn by the seed;
    of the glyphs, no family of fonts is in two parts. Validation and test data do not depend on ``train_size``, and
    fewer training examples are the first of more. Training on all that is not test data leaves no validation data.

    Raises:
        InputError: the files of the data set are not there or are not what they should be, or hold too few examples.
    """
    source = _read(dataset, folder)
    generator = torch.Generator().manual_seed(seed)
    train, validation, test = _split(dataset, source, train_size, generator)
    train, validation = _resized(train, validation, train_size)
    parts = [Split(_standardized(source, index), source.labels[index]) for index in (train, validation, test)]
    classes = CLASSES.get(dataset, 10)
    train_noisy, test_noisy = (_noisy(split, noise, classes, generator) for split in (parts[0], parts[2]))
    black = torch.tensor(-source.mean / source.std, dtype=torch.float32).expand(source.images.shape[1], 1, 1)
    return Data(train_noisy, parts[1], parts[2], test_noisy, classes, dataset in FLIPPED, black)


def _split(
    dataset: str, source: _Source, train_size: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of training, validation and test data, in random order."""
    n = len(source.labels)
    if source.families is not None:
        return _by_family(source.families, generator)
    n_train, n_validation, n_test = SIZES[dataset]
    if source.n_test and (train_size is not None or dataset != "fashion-mnist"):
        order = torch.randperm(n - source.n_test, generator=generator)
        return order[n_validation:], order[:n_validation], torch.arange(len(order), n)
    order = torch.randperm(n, generator=generator)[: n_train + n_validation + n_test]
    return order[:n_train], order[n_train:-n_test], order[-n_test:]


def _by_family(families: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.randperm(len(families), generator=generator)
    counts = torch.bincount(families)
    ranked = torch.randperm(len(counts), generator=generator)
    middle = counts[ranked].cumsum(0) - counts[ranked] / 2
    part = torch.empty_like(ranked)
    part[ranked] = torch.bucketize(middle, len(families) * torch.tensor(CUTS))
    train, validation, test = (order[part[families[order]] == i] for i in range(3))
    if not (len(train) and len(validation) and len(test)):
        raise InputError(f"{len(counts)} families of fonts are too few for training, validation and test data")
    return train, validation, test


def _resized(train: Tensor, validation: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """As many training examples as asked for, by their indices; all there are if the validation data is taken too.

    Raises:
        InputError: there are not so many.
    """
    if size is None or size <= len(train):
        return train[:size], validation
    if size == len(train) + len(validation):
        return torch.cat([train, validation]), validation[:0]
    everything = len(train) + len(validation)
    raise InputError(f"train_size must be at most {len(train)}, or {everything} with no validation data, got {size}")


def augmented(inputs: Tensor, generator: torch.Generator, flip: bool = False, black: Tensor | None = None) -> Tensor:
    """Random crops of the images padded with black, by 4 pixels at a side of 28 or 32, half of them mirrored.

    Args:
        inputs: images of shape (n, channels, height, width); an eighth of the height is the padding.
        generator: where all draws come from.
        flip: whether to mirror.
        black: what a black pixel is, (channels, 1, 1); by default 0.
    """
    n, channels, height, width = inputs.shape
    pad = -(-height // 8)
    padded = inputs.new_zeros((n, channels, height + 2 * pad, width + 2 * pad))
    if black is not None:
        padded += black
    padded[:, :, pad : pad + height, pad : pad + width] = inputs
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand((n, 1), generator=generator) < 0.5, columns.flip(1), columns)
    image = torch.arange(n)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _noisy(split: Split, noise: float, classes: int, generator: torch.Generator) -> Split:
    n = len(split.labels)
    changed = torch.randperm(n, generator=generator)[: round(noise * n)]
    labels = split.labels.clone()
    labels[changed] = (labels[changed] + torch.randint(1, classes, changed.shape, generator=generator)) % classes
    return Split(split.inputs, labels)


@cache
def _read(dataset: str, folder: str | None) -> _Source:
    if dataset == "digits":
        from sklearn.datasets import load_digits

        if folder is not None:
            raise InputError("digits come with scikit-learn: leave --data-dir out")
        digits = load_digits()
        return _gray(digits.images, digits.target)
    if dataset == "glyphs":
        from .glyphs import glyphs

        images, labels, families = glyphs(folder)
        return _gray(images, labels, families=torch.tensor(families))
    if dataset in cifar.FILES:
        images, labels, n_test = cifar.read(dataset, folder)
        if (n := len(labels)) != sum(SIZES[dataset]) or n_test != SIZES[dataset][2]:
            raise InputError(f"{folder} holds {n - n_test} and {n_test} images: that is not {dataset}")
        _check_labels(dataset, labels, folder)
        return _colored(images, labels, n_test)
    path = Path(folder) if folder else FASHION_FOLDER
    images = np.concatenate([_idx(path / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")])
    label_parts = [_idx(path / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
    labels = np.concatenate(label_parts)
    if images.ndim != 3 or labels.shape != images.shape[:1] or len(labels) < sum(SIZES[dataset]):
        raise InputError(f"{path} does not hold the images and labels of Fashion-MNIST")
    _check_labels(dataset, labels, path)
    return _gray(images, labels, n_test=len(label_parts[1]))


def _check_labels(dataset: str, labels: Sequence[int] | np.ndarray, path: Path | str | None) -> None:
    classes = CLASSES.get(dataset, 10)
    if not 0 <= min(labels) <= max(labels) < classes:
        raise InputError(f"{path} holds the label {max(labels)}: {dataset} has those from 0 to {classes - 1}")


def _idx(path: Path) -> np.ndarray:
    """An array in the IDX format: two zeros, the type (8: uint8), the number of dimensions, the sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there: install Debian's dataset-fashion-mnist, or name its folder with --data-dir"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", dimensions, 4) if len(content) > 4 + 4 * dimensions else np.zeros(0)
    values = np.frombuffer(content, np.uint8, offset=min(4 + 4 * dimensions, len(content)))
    if not dimensions or values.size != shape.prod():
        raise InputError(f"{path} is not an IDX file of bytes")
    return values.reshape(shape.astype(int))


def _gray(images: np.ndarray, labels: np.ndarray, n_test: int = 0, families: Tensor | None = None) -> _Source:
    """Statistics over all images, (n, height, width)."""
    return _Source(
        images[:, None], torch.tensor(labels.astype(np.int64)), images.mean(), images.std(), n_test, families
    )


def _colored(images: np.ndarray, labels: np.ndarray, n_test: int) -> _Source:
    """Statistics of each channel over the images that are not test data, from how often each value is there."""
    values = np.arange(256)
    counts = np.zeros((images.shape[1], 256))
    n = len(images) - n_test
    for start in range(0, n, CHUNK):
        chunk = images[start : min(start + CHUNK, n)]
        counts += [np.bincount(channel.ravel(), minlength=256) for channel in chunk.swapaxes(0, 1)]
    weights = counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(1))
    return _Source(images, torch.tensor(labels), mean[:, None, None], std[:, None, None], n_test)


def _standardized(source: _Source, index: Tensor) -> Tensor:
    inputs = torch.empty(len(index), *source.images.shape[1:])
    for part, i in zip(
        torch.split(inputs, CHUNK), torch.split(index, CHUNK), strict=True
    ):  # float64 is for a chunk at a time
        part.copy_(torch.from_numpy((source.images[i.numpy()] - source.mean) / source.std))
    return inputs
