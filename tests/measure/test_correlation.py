"""Kendall's rank correlations against SciPy and against double loops over pairs of models."""

import itertools
import math

import numpy
import pandas
import pytest
import torch
from scipy.stats import kendalltau

from asam.measure import granulated_kendall, kendall, kendall_difference
from asam.measure.draws import generator_of


def sign(x):
    return (x > 0) - (x < 0)


def agreement(measure, gap, pairs):
    """The mean over pairs of sign(mu_i - mu_j) sign(gap_i - gap_j), nan without any."""
    terms = [sign(measure[i] - measure[j]) * sign(gap[i] - gap[j]) for i, j in pairs]
    return sum(terms) / len(terms) if terms else math.nan


def granulated(measure, gap, hyperparameters, name):
    """The mean of tau-a over the settings of all the others, each over the pairs that differ in this one."""
    settings = {}
    for model in range(len(measure)):
        others = tuple(values[model] for key, values in hyperparameters.items() if key != name)
        settings.setdefault(others, []).append(model)
    values = hyperparameters[name]
    taus = [
        agreement(measure, gap, [(i, j) for i, j in itertools.combinations(models, 2) if values[i] != values[j]])
        for models in settings.values()
    ]
    taus = [tau for tau in taus if not math.isnan(tau)]
    return sum(taus) / len(taus) if taus else math.nan


def correlated(n, r, seed):
    """n draws of two normal variables with correlation r: tau = 2 / pi asin r."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return x, r * x + math.sqrt(1 - r * r) * y


def grid():
    """3 x 2 x 2 settings with 2 seeds each, in no order, and values with ties."""
    generator = torch.Generator().manual_seed(8)
    settings = [s for s in itertools.product([0.1, 0.2, 0.4], ["sgd", "adam"], [8, 16]) for _ in range(2)]
    settings = [settings[i] for i in torch.randperm(len(settings), generator=generator)]
    hyperparameters = dict(zip(["lr", "optimizer", "width"], zip(*settings, strict=True), strict=True))
    measure, gap = torch.randint(6, (2, len(settings)), generator=generator).tolist()
    return measure, gap, hyperparameters


@pytest.mark.parametrize("levels", [2, 4, 10**6])
@pytest.mark.parametrize("n", [2, 5, 23])
def test_matches_scipy_and_a_double_loop(n, levels):
    generator = torch.Generator().manual_seed(n * levels)
    for _ in range(10):
        measure, gap = torch.randint(levels, (2, n), generator=generator).tolist()
        found = kendall(measure, gap, resamples=1)
        expected = agreement(measure, gap, list(itertools.combinations(range(n), 2)))
        assert found.tau_a == pytest.approx(expected, abs=1e-14)
        assert found.tau_b == pytest.approx(kendalltau(measure, gap).statistic, abs=1e-14, nan_ok=True)
        assert math.isnan(found.tau_b) == (len(set(measure)) == 1 or len(set(gap)) == 1)
        assert found.n == n


def test_ranks_are_all_that_matters():
    measure, gap = correlated(20, 0.5, 0)
    assert kendall(measure.tolist(), gap.tolist()) == kendall(measure.exp() * 1e30, gap**3)


def test_an_infinite_value_is_the_largest_and_ties_with_itself():
    assert kendall([1, 2, math.inf, math.inf], [1, 2, 3, 4]).tau_a == 5 / 6


@pytest.mark.parametrize("direction", [1, -1])
def test_perfect_correlation_leaves_no_interval(direction):
    found = kendall(range(12), [direction * i**3 for i in range(12)])
    assert found.tau_a == found.tau_b == direction
    assert found.interval_a == found.interval_b == (direction, direction)


def test_intervals_contain_the_value_and_shrink():
    widths = []
    for n in (10, 40, 160):
        found = kendall(*correlated(n, 0.5, 2))
        for tau, (low, high) in [(found.tau_a, found.interval_a), (found.tau_b, found.interval_b)]:
            assert -1 <= low < tau < high <= 1
        widths.append(found.interval_a[1] - found.interval_a[0])
    assert widths[1] < 0.7 * widths[0]
    assert widths[2] < 0.7 * widths[1]


def test_a_wider_interval_for_more_confidence():
    (a, b), (c, d) = (kendall(*correlated(30, 0.5, 2), confidence=level).interval_b for level in (0.99, 0.5))
    assert a < c < d < b


def test_intervals_are_those_of_the_bootstrap():
    """Percentiles of tau over resampled models, copies of one model left out of the comparison."""
    x, y = (values.tolist() for values in correlated(9, 0.5, 3))
    generator = torch.Generator().manual_seed(1)
    taus = []
    for drawn in torch.randint(9, (1500, 9), generator=generator).tolist():
        pairs = [(i, j) for i, j in itertools.combinations(drawn, 2) if i != j]
        taus.append(agreement(x, y, pairs))
    low, high = torch.tensor(taus, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    found = kendall(x, y, confidence=0.8, resamples=20000)
    assert found.interval_a == pytest.approx((low.item(), high.item()), abs=0.06)
    assert found.confidence == 0.8


def test_coverage():
    r = 0.5
    tau = 2 / math.pi * math.asin(r)
    covered = 0
    for seed in range(100):
        low, high = kendall(*correlated(60, r, seed), resamples=400).interval_b
        covered += low <= tau <= high
    assert 85 <= covered <= 100


def test_spread_with_thirty_models():
    """The reason for the intervals: a tau near 0.3 from 30 models has a standard deviation of 0.12."""
    r = math.sin(0.3 * math.pi / 2)
    taus = torch.tensor([kendall(*correlated(30, r, seed), resamples=1).tau_b for seed in range(400)])
    assert taus.mean().item() == pytest.approx(0.3, abs=0.02)
    assert taus.std().item() == pytest.approx(0.12, abs=0.015)


@pytest.mark.parametrize("levels", [4, 10**6])
def test_a_difference_is_that_of_the_taus_and_changes_its_sign_with_the_order(levels):
    generator = torch.Generator().manual_seed(levels)
    a, b, gap = torch.randint(levels, (3, 15), generator=generator).tolist()
    value, (low, high) = kendall_difference(a, b, gap)
    assert value == kendall(a, gap).tau_b - kendall(b, gap).tau_b
    assert low < value < high
    other, interval = kendall_difference(b, a, gap)
    assert other == -value
    assert interval == pytest.approx((-high, -low), abs=1e-12)  # a quantile's interpolation rounds
    assert kendall_difference(a, a, gap) == (0.0, (0.0, 0.0))


def test_the_interval_of_a_difference_is_that_of_a_bootstrap_by_hand():
    """The same drawn models for both measures; SciPy ranks them with their copies, which tie."""
    n, resamples = 10, 300
    generator = torch.Generator().manual_seed(4)
    a, b, gap = torch.randint(7, (3, n), generator=generator).tolist()
    drawn = torch.randint(n, (resamples, n), generator=generator_of(5, 0))
    differences = []
    for models in drawn.tolist():
        taus = [kendalltau([m[i] for i in models], [gap[i] for i in models]).statistic for m in (a, b)]
        differences.append(taus[0] - taus[1])
    level = torch.tensor([0.1, 0.9], dtype=torch.float64)
    expected = torch.tensor(differences, dtype=torch.float64).nanquantile(level).tolist()
    _, interval = kendall_difference(a, b, gap, confidence=0.8, resamples=resamples, seed=5)
    assert interval == pytest.approx(expected, abs=1e-12)


def test_what_two_measures_share_does_not_widen_their_difference():
    gap, a = correlated(40, 0.5, 6)
    b = a + 0.01 * torch.randn(40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    _, (low, high) = kendall_difference(a, b, gap)
    alone = kendall(a, gap).interval_b
    assert high - low < 0.2 * (alone[1] - alone[0])


def test_a_difference_to_a_measure_that_is_the_same_everywhere_is_nan():
    value, interval = kendall_difference([1, 2, 3], [1, 1, 1], [1, 2, 3])
    assert math.isnan(value)
    assert all(map(math.isnan, interval))


def test_granulated_matches_a_loop():
    measure, gap, hyperparameters = grid()
    found = granulated_kendall(measure, gap, hyperparameters, resamples=50)
    expected = {name: granulated(measure, gap, hyperparameters, name) for name in hyperparameters}
    assert len(set(expected.values())) == 3
    assert found.psi == pytest.approx(expected, abs=1e-14)
    assert found.Psi == pytest.approx(sum(expected.values()) / 3, abs=1e-14)
    assert list(found.intervals) == list(hyperparameters)
    for name, (low, high) in found.intervals.items():
        assert -1 <= low < found.psi[name] < high <= 1
    assert found.interval[0] < found.Psi < found.interval[1]
    assert found.n == 24


def test_replicates_are_not_compared():
    """Two seeds that disagree with each other and agree about the learning rate."""
    found = granulated_kendall([1, 2, 5, 6], [2, 1, 6, 5], {"lr": [0.1, 0.1, 0.2, 0.2]})
    assert found.psi == {"lr": 1.0}
    assert found.intervals == {"lr": (1.0, 1.0)}
    assert kendall([1, 2, 5, 6], [2, 1, 6, 5]).tau_a == pytest.approx(1 / 3)


def test_settings_count_equally():
    """One setting of two models (tau 1) and one of three (tau -1): their mean, not that over pairs."""
    found = granulated_kendall([1, 2, 1, 2, 3], [1, 2, 3, 2, 1], {"lr": [1, 2, 1, 2, 3], "width": [8, 8, 16, 16, 16]})
    assert found.psi["lr"] == 0
    assert found.psi["width"] == 0  # at lr 1 and at lr 2 the measure is tied


def test_nan_as_a_setting_is_equal_to_itself():
    # the first two are replicates
    assert granulated_kendall([2, 1, 3], [1, 2, 3], {"clip": [math.nan, float("nan"), 1.0]}).psi == {"clip": 1.0}


def test_a_hyperparameter_that_never_varies_alone():
    hyperparameters = {"lr": [1, 2, 3, 3], "width": [8, 16, 32, 32], "seed": [0, 0, 0, 1]}
    found = granulated_kendall([1, 2, 3, 4], [1, 2, 3, 4], hyperparameters)
    assert math.isnan(found.psi["lr"])
    assert math.isnan(found.psi["width"])
    assert found.psi["seed"] == found.Psi == 1
    assert all(map(math.isnan, found.intervals["lr"]))
    assert found.interval == (1, 1)


@pytest.mark.parametrize(
    "hyperparameters",
    [{}, {"lr": [1, 1, 1]}, {"lr": [1, 2, 3], "width": [8, 16, 32]}],
    ids=["none", "replicates-only", "no-grid"],
)
def test_nothing_to_compare(hyperparameters):
    with pytest.raises(ValueError, match="no two models differ in exactly one hyper-parameter"):
        granulated_kendall([1, 2, 3], [1, 2, 3], hyperparameters)


@pytest.mark.parametrize("function", [kendall, lambda *a, **k: granulated_kendall(*a, {"lr": range(len(a[0]))}, **k)])
@pytest.mark.parametrize(
    ("measure", "gap", "arguments", "message"),
    [
        ([1, 2, 3], [1, 2], {}, "measure and gap must have the same length, got 3 and 2"),
        ([1], [1], {}, "a rank correlation needs at least two models, got 1"),
        ([1, math.nan], [1, 2], {}, "measure must be a sequence of numbers without nan"),
        ([1, 2], [math.nan, 2], {}, "gap must be a sequence of numbers without nan"),
        ([[1, 2]], [1, 2], {}, "measure must be a sequence of numbers without nan"),
        ([1, 2], [1, 2], {"confidence": 95}, "confidence must be a number between 0 and 1, got 95"),
        ([1, 2], [1, 2], {"confidence": math.nan}, "confidence must be a number between 0 and 1, got nan"),
        ([1, 2], [1, 2], {"resamples": 0}, "resamples must be an integer >= 1, got 0"),
    ],
)
def test_refuses(function, measure, gap, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(measure, gap, **arguments)


@pytest.mark.parametrize(
    ("a", "b", "gap", "arguments", "message"),
    [
        ([1, 2, 3], [1, 2], [1, 2], {}, "measure and gap must have the same length, got 3 and 2"),
        ([1, 2], [1, 2, 3], [1, 2], {}, "measure and gap must have the same length, got 3 and 2"),
        ([1], [1], [1], {}, "a rank correlation needs at least two models, got 1"),
        ([1, math.nan], [1, 2], [1, 2], {}, "a must be a sequence of numbers without nan"),
        ([1, 2], [1, math.nan], [1, 2], {}, "b must be a sequence of numbers without nan"),
        ([1, 2], [1, 2], [1, math.nan], {}, "gap must be a sequence of numbers without nan"),
        ([1, 2], [1, 2], [1, 2], {"confidence": 95}, "confidence must be a number between 0 and 1, got 95"),
        ([1, 2], [1, 2], [1, 2], {"resamples": 0}, "resamples must be an integer >= 1, got 0"),
    ],
)
def test_a_difference_refuses(a, b, gap, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kendall_difference(a, b, gap, **arguments)


def test_refuses_values_for_other_models():
    with pytest.raises(ValueError, match="hyper-parameter 'lr' must have a value for each of the 3 models, got 2"):
        granulated_kendall([1, 2, 3], [1, 2, 3], {"lr": [1, 2]})


def test_columns_of_tables_and_any_arrays():
    rising, falling = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    frame = pandas.DataFrame({"lr": [0.1, 0.2, 0.2, 0.2, 0.2], "measure": [9.0, *rising]})
    column = frame[frame.lr == 0.2]["measure"]  # without the label 0
    read_only = numpy.array(rising)
    read_only.flags.writeable = False
    for values in (
        column,
        column.to_numpy(),
        read_only,
        numpy.array(falling)[::-1],
        torch.tensor(rising),
        iter(rising),
    ):
        assert kendall(values, rising).tau_a == 1
        assert kendall_difference(rising, falling, rising)[0] == 2


@pytest.mark.parametrize("values", [["a", "b"], 3.0, [[1.0], [2.0, 3.0]], [None, 1.0]])
def test_what_is_no_sequence_of_numbers(values):
    with pytest.raises(TypeError, match=r"^measure must be a sequence of numbers, got "):
        kendall(values, [1.0, 2.0])


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ([1, 2], "^hyperparameters must be a mapping from names to a value for each model, got list$"),
        ({"lr": 3}, "^hyper-parameter 'lr' must have a value for each model, got int$"),
        ({"lr": [[1], [2]]}, "^hyper-parameter 'lr' must have a number or a name for each model, got a list$"),
    ],
)
def test_what_are_no_hyperparameters(hyperparameters, message):
    with pytest.raises(TypeError, match=message):
        granulated_kendall([1, 2], [1, 2], hyperparameters)
