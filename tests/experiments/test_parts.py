"""Statistics behind the comparison, and its outcome in small."""

import numpy as np
import pytest
from scipy import stats

from asam.experiments.run import Run
from asam.experiments.statistics import paired_difference
from asam.experiments.training import train


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
