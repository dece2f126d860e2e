"""Weights in half precision: told of once, and rounded by chance if asked."""

import warnings

import pytest
import torch
from torch import nn

from asam import ASAM, SAM, EconomicalASAM
from asam.kernels import rounded

RHO = 0.1
HALF = [torch.bfloat16, torch.float16]


def network(dtype):
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_over_draws_is_the_value(dtype):
    # from subnormal to large, and between two powers of two
    values = torch.tensor([3e-7, 1e-5, 0.1, 1.0001, 1.9999, 3.3, 1000.3]).repeat(40_000, 1)
    values = torch.cat([values, -values], dim=1)
    draws = rounded(values, dtype).double()
    digit = torch.nextafter(values[0].to(dtype), torch.full_like(values[0].to(dtype), torch.inf)) - values[0].to(dtype)
    error = (draws.mean(dim=0) - values[0].double()).abs() / digit.double().abs()
    assert error.max() < 0.015, error
    assert all(len(column.unique()) == 2 for column in draws.T)


@pytest.mark.parametrize("dtype", HALF)
def test_what_half_precision_holds_stays(dtype):
    held = torch.cat([torch.randn(1000).to(dtype).float(), torch.tensor([0.0, -0.0, 1.0, 2.0, torch.inf, -torch.inf])])
    assert torch.equal(rounded(held, dtype).float(), held)
    assert rounded(torch.tensor([torch.nan]), dtype).isnan().all()


def perturbation(dtype, rounding):
    """The perturbation of half-precision weights as it is, and as it would be in float64."""
    torch.manual_seed(0)
    model = network(dtype)
    with warnings.catch_warnings(action="ignore"):
        asam = ASAM(model, rho=RHO, bias="fixed", rounding=rounding)
    params = dict(model.named_parameters())
    for param in params.values():
        param.grad = torch.randn_like(param)
    before = {name: param.detach().double() for name, param in params.items()}
    exact = asam.geometry.maximizer(before, {name: param.grad.double() for name, param in params.items()}, RHO)
    with asam.perturbed():
        there = {name: param.detach().double() - before[name] for name, param in params.items()}
    assert all(torch.equal(param.double(), before[name]) for name, param in params.items())
    flat = [torch.cat([e.flatten() for e in tensors.values()]) for tensors in (there, exact)]
    return *flat, asam.geometry.norm(before, there).item()


def share(actual, exact):
    """How much of the perturbation is in what the weights do, 1 for all of it."""
    return (actual @ exact / (exact @ exact)).item()


def test_bfloat16_loses_it_to_the_nearest_and_keeps_it_by_chance():
    nearest, exact, _ = perturbation(torch.bfloat16, "nearest")
    assert (nearest == 0).double().mean() > 0.95
    assert share(nearest, exact) < 0.6
    by_chance, exact, norm = perturbation(torch.bfloat16, "stochastic")
    assert share(by_chance, exact) == pytest.approx(1, abs=0.05)
    # the price: the rounding itself moves weights too, by up to one last digit each
    assert 1.5 * RHO < norm < 3 * RHO


def test_float16_has_digits_enough_for_either():
    for rounding in ("nearest", "stochastic"):
        actual, exact, norm = perturbation(torch.float16, rounding)
        assert share(actual, exact) == pytest.approx(1, abs=0.01)
        assert norm == pytest.approx(RHO, rel=0.1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("make", [ASAM, SAM, lambda model, **options: EconomicalASAM(model, steps=10, **options)])
def test_one_warning(make, dtype):
    model = network(torch.float32)
    model[2].to(dtype)
    with pytest.warns(UserWarning, match=f"{str(dtype)[6:]} lose part") as told:
        make(model)
    assert len(told) == 1
    make(model, rounding="stochastic")
    make(network(torch.float32))


def test_the_random_numbers_are_torchs():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(rounded(torch.linspace(0, 1, 1000), torch.bfloat16))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_replayed_dropout_does_not_replay_the_rounding():
    model, inputs, seen = network(torch.bfloat16), torch.randn(8, 64).bfloat16(), []

    def closure():
        seen.append(model[0].weight.detach().clone())
        return model(inputs).square().mean()

    asam = ASAM(model, replay_rng=True, rounding="stochastic")
    for _ in range(2):
        asam.backward(closure)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])
