"""Real data without a download: scikit-learn's digits, and Fashion-MNIST where its files are.

A seed fixes the split into training, validation and test data, and which labels are noisy.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import InputError

# where Debian's package dataset-fashion-mnist puts the files
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# examples: training, validation, test
SIZES = {"digits": [500, 297, 1000], "fashion-mnist": [2000, 1000, 10000]}


@dataclass(frozen=True)
class Split:
    """Images of shape (n, 1, height, width), of mean 0 and standard deviation 1 over all, and labels of shape (n,)."""

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
    black: Tensor  # a pixel of value 0 after standardization, (channels, 1, 1)


def load(dataset: str, folder: str | None, noise: float, seed: int, train_size: int | None = None) -> Data:
    """The data of one seed: ``noise`` is the share of labels replaced by another class, drawn uniformly.

    Validation and test data do not depend on ``train_size``; fewer training examples are the first of more. Training on
    all that is not test data leaves no validation data. With a ``train_size``, the test data of Fashion-MNIST are its
    official 10,000.

    Raises:
        InputError: the files of the data set are not there or are not what they should be, or hold too few examples.
    """
    inputs, labels = _read(dataset, folder)
    generator = torch.Generator().manual_seed(seed)
    n_train, n_validation, n_test = SIZES[dataset]
    if train_size is None or dataset == "digits":
        order = torch.randperm(len(labels), generator=generator)
        train, validation, test, _ = torch.tensor_split(
            order, [n_train, n_train + n_validation, n_train + n_validation + n_test]
        )
    else:
        order = torch.randperm(len(labels) - n_test, generator=generator)
        validation, train = order[:n_validation], order[n_validation:]
        test = torch.arange(len(order), len(labels))
    train, validation = resized(train, validation, train_size)
    classes = 10
    parts = [Split(inputs[index], labels[index]) for index in (train, validation, test)]
    noisy = [_noisy(split, noise, classes, generator) for split in (parts[0], parts[2])]
    return Data(noisy[0], parts[1], parts[2], noisy[1], classes, False, inputs.amin((0, 2, 3))[:, None, None])


def resized(train: Tensor, validation: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
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
def _read(dataset: str, folder: str | None) -> tuple[Tensor, Tensor]:
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _standardized(digits.images), torch.tensor(digits.target)
    path = Path(folder) if folder else FASHION_FOLDER
    images = np.concatenate([_idx(path / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")])
    labels = np.concatenate([_idx(path / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")])
    if images.ndim != 3 or labels.shape != images.shape[:1] or len(labels) < sum(SIZES[dataset]):
        raise InputError(f"{path} does not hold the images and labels of Fashion-MNIST")
    return _standardized(images), torch.tensor(labels.astype(np.int64))


def _idx(path: Path) -> np.ndarray:
    """An array in the IDX format: two zeros, the type (8: uint8), the number of dimensions, the sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there: install Debian's dataset-fashion-mnist, or name its folder with --data-dir"
        ) from None
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", dimensions, 4) if len(content) > 4 + 4 * dimensions else np.zeros(0)
    values = np.frombuffer(content, np.uint8, offset=min(4 + 4 * dimensions, len(content)))
    if not dimensions or values.size != shape.prod():
        raise InputError(f"{path} is not an IDX file of bytes")
    return values.reshape(shape.astype(int))


def _standardized(images: np.ndarray) -> Tensor:
    return torch.tensor((images[:, None] - images.mean()) / images.std(), dtype=torch.float32)
