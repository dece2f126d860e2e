"""The average rise of losses for which it is known."""

import dataclasses
import math

import pytest
import torch
from quadratics import CHAINS, SCHEMES, Chain, Net, Quadratic, batches, cross_entropy, examples, net_objective

from asam import Geometry
from asam.measure import Objective, average_sharpness

VARIANCE = {"normal": 1.0, "uniform": 1 / 3}


def indefinite(seed=3):
    matrix = torch.randn(17, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("noise", VARIANCE)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("eta", "bias"), [(0.0, "unscaled"), (0.01, "scaled"), (0.01, "fixed")])
def test_quadratic(scheme, eta, bias, noise):
    geometry, rho = Geometry(SCHEMES[scheme], eta=eta, bias=bias), 0.7
    model = Quadratic()
    # a gradient so large that without its mirror image every sample would be far off
    model.hessian, model.gradient = indefinite() + torch.eye(17).double(), torch.full((17,), 1e3, dtype=torch.float64)
    t = model.scales(geometry)
    exact = rho**2 / 2 * VARIANCE[noise] * (t**2 * model.hessian.diagonal()).sum().item()
    result = average_sharpness(model.objective(), rho, geometry=geometry, noise=noise, samples=400)
    assert abs(result.value - exact) < 4 * result.stderr
    # the standard deviation of rho^2/2 z'THTz, for normal noise, over the root of the number of pairs
    if noise == "normal":
        expected = rho**2 / math.sqrt(2) * (t[:, None] * model.hessian * t).norm().item() / math.sqrt(200)
        assert result.stderr == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("noise", VARIANCE)
def test_many_samples(noise):
    model = Quadratic()
    model.hessian = torch.eye(17, dtype=torch.float64)
    result = average_sharpness(model.objective(), 0.5, geometry=Geometry("none"), noise=noise, samples=4000)
    assert result.value == pytest.approx(0.5**2 / 2 * VARIANCE[noise] * 17, rel=0.02)


@pytest.mark.parametrize("noise", VARIANCE)
@pytest.mark.parametrize("chain", CHAINS)
def test_scalar_chain(chain, noise):
    n, rho = len(CHAINS[chain]), 0.2
    exact = Chain.Y**2 * ((1 + rho**2 * VARIANCE[noise]) ** n - 1) / 2
    objective = Chain(CHAINS[chain]).objective()
    result = average_sharpness(objective, rho, geometry=Geometry(eta=0.0), noise=noise, samples=2000)
    assert abs(result.value - exact) < 4 * result.stderr
    assert result.value == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("noise", VARIANCE)
def test_a_linear_loss_has_none(noise):
    model = Quadratic()
    model.gradient = torch.full((17,), 1e3, dtype=torch.float64)
    result = average_sharpness(model.objective(), 1.0, geometry=Geometry(), noise=noise)
    assert abs(result.value) < 1e-10
    assert result.stderr < 1e-10


def test_it_is_negative_at_a_maximum():
    model = Quadratic()
    model.hessian = -torch.eye(17, dtype=torch.float64)
    result = average_sharpness(model.objective(), 0.5, geometry=Geometry("none"))
    assert result.value == pytest.approx(-(0.5**2) / 2 * 17, abs=4 * result.stderr)
    assert result.value < 0


@pytest.mark.parametrize("noise", VARIANCE)
def test_weights_whose_scale_is_zero_stay(noise):
    model = Quadratic()
    with torch.no_grad():
        model.kernel.zero_()
    objective = model.objective()
    assert average_sharpness(objective, 0, geometry=Geometry(), noise=noise).value == 0
    w, *seen = draws(objective, Geometry(eta=0.0, bias="fixed"), 8, noise)
    for weights in seen:
        assert torch.equal(weights[:8], torch.zeros(8, dtype=torch.float64))
        assert (weights[8:15] != w[8:15]).all()
        assert torch.equal(weights[15:], w[15:])


def draws(objective, geometry, samples, noise="normal", seed=0):
    """The weights at which the loss is taken."""
    seen = []

    def loss_fn(model, batch):
        seen.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
        return objective.loss_fn(model, batch)

    watched = Objective(objective.model, loss_fn, [piece.batch for piece in objective.pieces])
    seen.clear()
    average_sharpness(watched, 0.3, geometry=geometry, samples=samples, noise=noise, seed=seed)
    return seen


@pytest.mark.parametrize("noise", VARIANCE)
def test_a_sample_is_the_same_whatever_their_number(noise):
    few, many = (draws(net_objective(), Geometry(), samples, noise) for samples in (8, 16))
    assert len(few) == 9
    assert len(many) == 17
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert len({tuple(weights.tolist()) for weights in many}) == 17
    other = draws(net_objective(), Geometry(), 8, noise, seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(few[1:], other[1:], strict=True))


@pytest.mark.parametrize("noise", VARIANCE)
def test_samples_do_not_depend_on_how_the_data_is_cut(noise):
    cut = Objective(Net(), cross_entropy, batches(examples(), 5, 7))
    whole, seen = draws(net_objective(), Geometry(), 8, noise), draws(cut, Geometry(), 8, noise)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize("noise", VARIANCE)
def test_value_and_standard_error_by_hand(noise):
    objective, geometry = net_objective(), Geometry(p=math.inf)
    w, *seen = draws(objective, geometry, 12, noise)
    scales = objective.flat(geometry.scales({name: p.detach() for name, p in objective.params.items()}))
    z = (torch.stack(seen) - w) / (0.3 * scales)
    torch.testing.assert_close(z[::2], -z[1::2], rtol=0, atol=1e-12)
    assert z.abs().max() <= 1 + 1e-12 or noise == "normal"
    assert z.square().mean().item() == pytest.approx(VARIANCE[noise], rel=0.2)
    losses = torch.tensor([objective.loss(weights - w) for weights in seen], dtype=torch.float64)
    pairs = losses.view(6, 2).mean(1)

    result = average_sharpness(objective, 0.3, geometry=geometry, noise=noise, samples=12)

    assert result.value == pytest.approx(pairs.mean().item() - objective.loss(), rel=1e-10)
    assert result.stderr == pytest.approx(pairs.std().item() / math.sqrt(6), rel=1e-10)
    assert result.perturbed_loss - result.base_loss == result.value
    assert (result.base_loss, result.samples, result.examples) == (objective.loss(), 12, 12)
    assert (result.rho, result.noise, result.geometry) == (0.3, noise, geometry)
    # p has no part in it
    assert result.value == average_sharpness(objective, 0.3, geometry=Geometry(), noise=noise, samples=12).value
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'value'"):
        result.value = 1.0


def test_a_single_pair_has_no_standard_error():
    assert math.isnan(average_sharpness(net_objective(), 0.1, geometry=Geometry(), samples=2).stderr)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be a finite number >= 0, got -0.1"),
        ({"rho": math.nan}, ValueError, "rho must be a finite number >= 0, got nan"),
        ({"samples": 3}, ValueError, "samples must be even, for antithetic pairs, got 3"),
        ({"samples": 0}, ValueError, "samples must be an integer >= 2, got 0"),
        ({"samples": 4.0}, TypeError, "samples must be an integer >= 2, got float"),
        ({"noise": "signs"}, ValueError, "noise must be one of 'normal', 'uniform', got 'signs'"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        average_sharpness(net_objective(), **{"rho": 0.1, "geometry": Geometry(), **arguments})
