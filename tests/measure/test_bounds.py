"""Bounds: their numbers, worked by hand, and whether they hold."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta

from asam.measure import asam_bound, holdout_bound, sam_bound
from asam.measure.bounds import inverse_kl

SETTING = {"weight_norm": 10.0, "k": 1000, "n": 50000}
RESNET20 = {"weight_norm": 50.0, "k": 272474, "n": 50000}


def test_sam_by_hand():
    """Norm 3, rho 0.5, k = 4, n = 100: the ratio is 36, sqrt(log(100) / 4) = 1.072983."""
    bound = sam_bound(0.25, weight_norm=3.0, k=4, n=100, rho=0.5, delta=0.1)
    norm_term = 4 * math.log(1 + 36 * (1 + 1.0729830131446736) ** 2)
    assert bound.norm_term == pytest.approx(norm_term, rel=1e-14)
    assert norm_term == pytest.approx(20.19176, abs=1e-5)
    assert bound.confidence_term == pytest.approx(4 * math.log(1000), rel=1e-14)
    assert bound.grid_term == pytest.approx(8 * math.log(612), rel=1e-14)
    # (20.1918 + 27.6310 + 51.3339) / 99 = 1.001582
    assert bound.complexity == pytest.approx(1.000791, abs=1e-6)
    assert bound.value == 0.25 + bound.complexity
    assert (bound.perturbed_loss, bound.delta, bound.n, bound.method) == (0.25, 0.1, 100, "SAM")


@pytest.mark.parametrize("perturbed_loss", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("setting", [SETTING, RESNET20, {"weight_norm": 0.0, "k": 1, "n": 2}])
def test_terms_add_up(setting, perturbed_loss):
    bound = sam_bound(perturbed_loss, **setting, rho=0.05)
    total = bound.norm_term + bound.confidence_term + bound.grid_term
    assert bound.complexity == math.sqrt(total / (setting["n"] - 1))
    assert bound.value == perturbed_loss + bound.complexity
    assert bound.vacuous == (bound.value >= 1)


@pytest.mark.parametrize(("rho", "eta"), [(0.5, 0.01), (2.0, 0.1), (1.0, 1.0)])
def test_asam_is_sam_for_a_ball_of_eta_rho(rho, eta):
    asam, sam = asam_bound(0.1, **SETTING, rho=rho, eta=eta), sam_bound(0.1, **SETTING, rho=eta * rho)
    assert dataclasses.replace(asam, method="SAM") == sam
    assert asam.method == "ASAM"


@pytest.mark.parametrize("weight_norm", [0.0, 10.0])
def test_asam_is_infinite_without_eta(weight_norm):
    bound = asam_bound(0.1, **SETTING | {"weight_norm": weight_norm}, rho=1.0, eta=0.0)
    assert bound.value == bound.norm_term == bound.complexity == math.inf
    assert bound.vacuous
    assert "ASAM bound inf: vacuous" in bound.explain()


@pytest.mark.parametrize("eta", [1e-320, 1e-200, 1e-100])
def test_asam_with_hardly_any_eta(eta):
    assert asam_bound(0.1, **SETTING, rho=1.0, eta=eta).value > 2


@pytest.mark.parametrize(
    ("name", "values"), [("rho", (1, 0.1, 0.01)), ("k", (10, 100, 1000)), ("n", (10**6, 10**5, 10**4))]
)
def test_grows(name, values):
    bounds = [sam_bound(0.1, **SETTING | {"rho": 0.1} | {name: value}).value for value in values]
    assert bounds[0] < bounds[1] < bounds[2]


def test_certifies_nothing_for_a_deep_network():
    bound = sam_bound(0.0, **RESNET20, rho=0.05)
    assert bound.vacuous
    assert bound.value > 8
    assert bound.explain() == (
        f"SAM bound {bound.value:.3g}: vacuous, since a loss in [0, 1] is never above 1; complexity alone is "
        f"{bound.value:.3g} on 50000 examples."
    )


def test_certifies_a_tiny_model_on_many_examples():
    bound = sam_bound(0.01, weight_norm=1.0, k=10, n=10**7, rho=0.1)
    assert bound.value < 0.02
    assert not bound.vacuous
    assert bound.explain() == (
        f"SAM bound {bound.value:.3g}: with probability 0.95 over the sample the loss on new data is at most 0.01 in "
        f"the ball + {bound.complexity:.3g} for complexity."
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"perturbed_loss": 1.01}, ValueError, r"perturbed_loss must be in \[0, 1\], such as a 0-1 loss, got 1.01"),
        ({"perturbed_loss": -0.1}, ValueError, r"perturbed_loss must be in \[0, 1\], such as a 0-1 loss, got -0.1"),
        ({"perturbed_loss": math.nan}, ValueError, r"perturbed_loss must be in \[0, 1\], .* got nan"),
        ({"perturbed_loss": "0"}, TypeError, r"perturbed_loss must be in \[0, 1\], .* got str"),
        ({"weight_norm": math.inf}, ValueError, "weight_norm must be a finite number >= 0, got inf"),
        ({"rho": 0}, ValueError, "rho must be a finite number > 0, got 0"),
        ({"k": 0}, ValueError, "k must be an integer >= 1, got 0"),
        ({"n": 1}, ValueError, "n must be an integer >= 2, got 1"),
        ({"delta": 1}, ValueError, "delta must be a number between 0 and 1, got 1"),
        ({"eta": -0.01}, ValueError, "eta must be a finite number >= 0, got -0.01"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        asam_bound(**{"perturbed_loss": 0.1, **SETTING, "rho": 0.1, "eta": 0.01} | arguments)


@pytest.mark.parametrize("delta", [0.3, 0.05, 1e-6])
@pytest.mark.parametrize("n", [1, 2, 10, 333, 10000])
def test_holdout_matches_scipy(n, delta):
    for errors in {0, 1, n // 10, n // 2, n - 1} - {n}:
        bound = holdout_bound(errors, n, delta=delta)
        assert bound.value == pytest.approx(beta.ppf(1 - delta, errors + 1, n - errors), rel=1e-9)
        assert (bound.error, bound.n, bound.delta, bound.vacuous) == (errors / n, n, delta, False)
    assert holdout_bound(0, n, delta=delta).value == pytest.approx(1 - delta ** (1 / n), rel=1e-12)
    assert holdout_bound(n, n, delta=delta).value == 1
    assert holdout_bound(n, n, delta=delta).vacuous


def test_holdout_holds():
    error, n, delta = 0.1, 80, 0.1
    errors = torch.distributions.Binomial(n, torch.tensor(error)).sample((2000,)).int().tolist()
    bounds = {e: holdout_bound(e, n, delta=delta).value for e in set(errors)}
    missed = sum(bounds[e] < error for e in errors)
    # delta is not reached: errors are integers
    assert 0.05 * 2000 < missed < (delta + 3 * math.sqrt(delta / 2000)) * 2000


def test_holdout_explains_itself():
    bound = holdout_bound(5, 1000)
    assert bound.explain() == (
        f"Held-out bound {bound.value:.3g}: 5 of 1000 examples not used for training were wrong, so with "
        f"probability 0.95 the error on new data is at most {bound.value:.3g}."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"errors": 11}, "errors must be at most n = 10, got 11"),
        ({"errors": -1}, "errors must be an integer >= 0, got -1"),
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"delta": 0.0}, "delta must be a number between 0 and 1, got 0.0"),
    ],
)
def test_holdout_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        holdout_bound(**{"errors": 1, "n": 10} | arguments)


@pytest.mark.parametrize("bound", [1e-6, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9])
def test_inverse_kl_matches_scipy(q, bound):
    def kl(p):
        return (q * math.log(q / p) if q else 0) + (1 - q) * math.log((1 - q) / (1 - p))

    expected = brentq(lambda p: kl(p) - bound, max(q, 1e-15), 1 - 1e-15, xtol=1e-15)
    assert inverse_kl(q, bound) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("q", "bound", "expected"), [(0.3, 0.0, 0.3), (1.0, 0.1, 1), (0.2, math.inf, 1), (0.2, math.nan, 1)]
)
def test_inverse_kl_at_its_ends(q, bound, expected):
    # kl is quadratic in p - q, so rounding hides what is closer than the root of it
    assert inverse_kl(q, bound) == pytest.approx(expected, abs=1e-8)
    assert inverse_kl(q, bound) >= expected


def test_an_explanation_says_what_was_counted_and_is_never_certain():
    assert ": 100 of 100 examples" in holdout_bound(100, 100).explain()
    assert "with probability 1 - 1e-07 the error" in holdout_bound(1, 100, delta=1e-7).explain()
    bound = sam_bound(0.3, weight_norm=1.0, k=10, n=10**6, rho=1.0, delta=1e-9)
    assert "with probability 1 - 1e-09 over the sample" in bound.explain()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
def test_numbers_of_few_bits_are_computed_with_as_any(kind):
    n = kind(50_000)
    k = kind(30_000)
    exact = {"weight_norm": 300.0, "rho": 0.5}
    few = {name: np.float16(value) for name, value in exact.items()}
    assert sam_bound(0.25, k=k, n=n, **few) == sam_bound(0.25, k=30_000, n=50_000, **exact)
    asam = asam_bound(np.float16(0.25), k=k, n=n, eta=np.float16(0.125), **few)
    assert asam == asam_bound(0.25, k=30_000, n=50_000, eta=0.125, **exact)
    assert holdout_bound(kind(300), n) == holdout_bound(300, 50_000)
