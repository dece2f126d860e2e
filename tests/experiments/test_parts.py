"""Data, networks and statistics behind the comparison."""

import gzip
import struct

import numpy as np
import pytest
import torch
from scipy import stats

from asam.experiments import InputError
from asam.experiments.data import SIZES, load
from asam.experiments.models import MODELS, build, rescale_
from asam.experiments.statistics import paired_difference
from asam.experiments.run import Run
from asam.experiments.training import train


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
    assert not torch.equal(data.train.inputs, load("digits", None, 0.0, seed=1).train.inputs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_rescaling_keeps_the_function_and_changes_the_weights(model, factor):
    torch.manual_seed(0)
    network = build(model, (1, 8, 8), 10).double()
    for param in network.parameters():
        if param.ndim == 1:  # batch norm starts with biases of 0
            torch.nn.init.uniform_(param, 0.5, 1.5)
    inputs = torch.randn(16, 1, 8, 8, dtype=torch.float64)
    before, weights = network(inputs), [p.clone() for p in network.parameters()]
    rescale_(network, factor)
    torch.testing.assert_close(network(inputs), before, rtol=1e-9, atol=1e-9)
    assert sum(not torch.equal(p, q) for p, q in zip(network.parameters(), weights, strict=True)) == 3


def test_fashion_files_are_read_and_broken_ones_refused(tmp_path):
    random = np.random.default_rng(0)
    for part, n in (("train", 12000), ("t10k", 2000)):
        images, labels = random.integers(0, 256, (n, 4, 4), np.uint8), random.integers(0, 10, n, np.uint8)
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 4, 4)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">BBBBI", 0, 0, 8, 1, n)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    data = load("fashion-mnist", str(tmp_path), 0.0, seed=0)
    assert data.train.inputs.shape == (2000, 1, 4, 4)
    broken = tmp_path / "broken"
    broken.mkdir()
    for content in (b"no gzip", gzip.compress(b"\0\0\x08"), gzip.compress(b"\0\0\x08\x03" + b"\0" * 30)):
        (broken / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"train-images|t10k-images"):
            load("fashion-mnist", str(broken), 0.0, seed=0)


def test_paired_difference_against_scipy():
    random = np.random.default_rng(0)
    a, b = list(random.normal(0, 1, 12)), list(random.normal(1, 1, 12))
    found = paired_difference(a, b)
    interval = stats.ttest_rel(a, b).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert found.wins == sum(x < y for x, y in zip(a, b, strict=True))


def test_paired_difference_of_one_seed_and_of_equals():
    assert paired_difference([1.0], [2.0]).low is None
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0


def test_asam_memorizes_less_noise_than_sgd():
    sgd, _ = train(Run("sgd", seed=50, noise=0.4))
    asam, _ = train(Run("asam", seed=50, rho=3.0, noise=0.4))
    assert sgd["train_error"] < 10 < 30 < asam["train_error"]
    assert asam["test_error"] < sgd["test_error"] - 8
