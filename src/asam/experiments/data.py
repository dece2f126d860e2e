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

DATASETS = ("digits", "fashion-mnist")
# where Debian's package dataset-fashion-mnist puts the files
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# examples: training, validation, test
SIZES = {"digits": [500, 297, 1000], "fashion-mnist": [2000, 1000, 10000]}
CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images of shape (n, 1, height, width), of mean 0 and standard deviation 1 over all, and labels of shape (n,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Training data with noisy labels; clean validation and test data; the test data once more with noisy labels."""

    train: Split
    validation: Split
    test: Split
    noisy_test: Split


def load(dataset: str, folder: str | None, noise: float, seed: int) -> Data:
    """The data of one seed: ``noise`` is the share of labels replaced by another class, drawn uniformly.

    Raises:
        InputError: the files of the data set are not there or are not what they should be.
    """
    inputs, labels = _read(dataset, folder)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    parts = [Split(inputs[index], labels[index]) for index in torch.split(order[: sum(SIZES[dataset])], SIZES[dataset])]
    train, validation, test = parts
    return Data(_noisy(train, noise, generator), validation, test, _noisy(test, noise, generator))


def _noisy(split: Split, noise: float, generator: torch.Generator) -> Split:
    n = len(split.labels)
    changed = torch.randperm(n, generator=generator)[: round(noise * n)]
    labels = split.labels.clone()
    labels[changed] = (labels[changed] + torch.randint(1, CLASSES, changed.shape, generator=generator)) % CLASSES
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
