"""Splits, label noise and augmentation of images in memory."""

import gzip
import hashlib
import shutil
import struct

import numpy as np
import pytest
import torch

from asam.experiments import InputError
from asam.experiments import data as data_module
from asam.experiments.data import SIZES, augmented, load


def digest(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def images_of(split):
    return {image.numpy().tobytes() for image in split.inputs}


@pytest.fixture
def fashion(tmp_path):
    """The files of Fashion-MNIST with 12,000 and 2,000 images of 4x4."""
    random = np.random.default_rng(0)
    for part, n in (("train", 12000), ("t10k", 2000)):
        images, labels = random.integers(0, 256, (n, 4, 4), np.uint8), random.integers(0, 10, n, np.uint8)
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 4, 4)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">BBBBI", 0, 0, 8, 1, n)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return tmp_path


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_noise_changes_that_share_of_training_labels_and_no_test_label(noise):
    clean, noisy = load("digits", None, 0.0, seed=3), load("digits", None, noise, seed=3)
    assert torch.equal(clean.train.inputs, noisy.train.inputs)
    assert (clean.train.labels != noisy.train.labels).float().mean().item() == pytest.approx(noise)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert (noisy.test.labels != noisy.noisy_test.labels).float().mean().item() == pytest.approx(noise)


def test_parts_do_not_overlap_and_seeds_differ():
    data = load("digits", None, 0.0, seed=0)
    rows = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs]).flatten(1)
    assert len(rows) == sum(SIZES["digits"])
    assert len(images_of(data.train) | images_of(data.validation) | images_of(data.test)) == len(rows)
    assert not torch.equal(data.train.inputs, load("digits", None, 0.0, seed=1).train.inputs)


def test_the_published_figures_are_of_these_data():
    """Computed before there was a choice of the training size: the figures of the README depend on the split."""
    data = load("digits", None, 0.4, seed=0)
    assert digest(data.train.labels, data.noisy_test.labels) == "7fdc89b32a42cd14"
    assert digest(data.train.inputs, data.validation.inputs, data.test.inputs) == "c071905c71eccfaa"


@pytest.mark.parametrize("size", [1, 120, 500, 797])
def test_validation_and_test_data_do_not_depend_on_the_training_size(size):
    default, data = load("digits", None, 0.0, seed=2), load("digits", None, 0.0, seed=2, train_size=size)
    assert len(data.train.labels) == size
    assert torch.equal(data.test.inputs, default.test.inputs)
    if size <= 500:
        assert torch.equal(data.train.inputs, default.train.inputs[:size])
        assert torch.equal(data.validation.inputs, default.validation.inputs)
    else:
        assert len(data.validation.labels) == 0


@pytest.mark.parametrize("size", [501, 796, 798])
def test_more_training_data_than_there_is(size):
    with pytest.raises(InputError, match=f"at most 500, or 797 with no validation data, got {size}"):
        load("digits", None, 0.0, seed=0, train_size=size)


def test_fashion_files_are_read_and_broken_ones_refused(fashion):
    data = load("fashion-mnist", str(fashion), 0.0, seed=0)
    assert data.train.inputs.shape == (2000, 1, 4, 4)
    assert data.flips
    broken = fashion / "broken"
    broken.mkdir()
    for content in (b"no gzip", gzip.compress(b"\0\0\x08"), gzip.compress(b"\0\0\x08\x03" + b"\0" * 30)):
        (broken / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"train-images|t10k-images"):
            load("fashion-mnist", str(broken), 0.0, seed=0)


def test_a_damaged_file_and_labels_of_another_data_set(fashion):
    other = fashion / "other"
    shutil.copytree(fashion, other)
    labels = other / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[-1] = 46
    labels.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(InputError, match=r"other holds the label 46: fashion-mnist has those from 0 to 9$"):
        load("fashion-mnist", str(other), 0.0, seed=0)
    damaged = bytearray((fashion / "train-images-idx3-ubyte.gz").read_bytes())
    damaged[10:14] = b"\xff" * 4  # the first block
    (other / "train-images-idx3-ubyte.gz").write_bytes(damaged)
    data_module._read.cache_clear()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz cannot be read: Error -3"):
        load("fashion-mnist", str(other), 0.0, seed=0)


def test_with_a_training_size_the_test_data_of_fashion_are_the_official_ones(fashion):
    seeds = [load("fashion-mnist", str(fashion), 0.0, seed, train_size=11000) for seed in (0, 1)]
    assert torch.equal(seeds[0].test.inputs, seeds[1].test.inputs)
    assert not torch.equal(seeds[0].validation.inputs, seeds[1].validation.inputs)
    assert [len(split.labels) for split in (seeds[0].train, seeds[0].validation, seeds[0].test)] == [11000, 1000, 2000]
    assert not images_of(seeds[0].train) & (images_of(seeds[0].validation) | images_of(seeds[0].test))
    everything = load("fashion-mnist", str(fashion), 0.0, 0, train_size=12000)
    assert images_of(everything.train) == images_of(seeds[0].train) | images_of(seeds[0].validation)


def numbered(n, channels, side):
    """Images whose every pixel says which image, channel, row and column it is of."""
    return torch.arange(1, 1 + n * channels * side * side, dtype=torch.float64).reshape(n, channels, side, side)


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (28, 4), (32, 4)])
@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_crops_of_padded_ones(side, pad, flip):
    inputs, black = numbered(300, 2, side), torch.tensor([-1.0, -2.0], dtype=torch.float64)[:, None, None]
    padded = black.expand(300, 2, side + 2 * pad, side + 2 * pad).clone()
    padded[:, :, pad:-pad, pad:-pad] = inputs
    seen = set()
    for image, whole in zip(augmented(inputs, torch.Generator().manual_seed(0), flip, black), padded, strict=True):
        (found,) = [
            (top, left, mirrored)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, whole[:, top : top + side, left : left + side])
        ]
        seen.add(found)
    # of 300 draws all offsets are seen, and where there are flips about half are
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(2 * pad + 1))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_augmentation_draws_from_its_generator_only():
    inputs, generator = numbered(5, 1, 8), torch.Generator().manual_seed(1)
    before = torch.get_rng_state()
    first, second = augmented(inputs, generator), augmented(inputs, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(augmented(inputs, generator.manual_seed(1)), first)


def test_black_is_what_the_border_of_a_digit_is():
    data = load("digits", None, 0.0, seed=0)
    assert data.black.shape == (1, 1, 1)
    assert (data.black.item(), data.classes, data.flips) == (data.train.inputs.min().item(), 10, False)
