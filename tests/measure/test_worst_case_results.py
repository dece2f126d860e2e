"""What a worst-case measurement reports: m-sharpness, the history of the ascent, its cost, profiles, its arguments."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from quadratics import SCHEMES, Net, Quadratic, batches, cross_entropy, examples, in_units, net_objective
from torch import nn

from asam import Geometry
from asam.measure import Objective, average_sharpness, sharpness_profile, worst_case_sharpness

BALLS = [Geometry(), Geometry("none"), Geometry(p=math.inf), Geometry("layerwise", p=math.inf, eta=0.0)]


def linear_objective(*sizes):
    """Examples with a linear loss each, g_i'w: the worst case of any of their means is rho ||T g||, in one step."""
    model = nn.Linear(3, 1, bias=False).double()
    x, _ = examples(sum(sizes), inputs=3)
    return Objective(model, lambda model, batch: model(batch[0]).mean(), batches((x,), *sizes)), x


@pytest.mark.parametrize("p", [2, math.inf])
def test_m_sharpness_is_the_mean_over_groups(p):
    geometry, rho = Geometry(p=p), 0.3
    objective, x = linear_objective(5, 6)
    t = geometry.scales({"weight": objective.model.weight.detach()})["weight"]
    rises = torch.stack([rho * torch.linalg.vector_norm(t * g.mean(0), 2 if p == 2 else 1) for g in x.split(4)])
    shares = torch.tensor([4, 4, 3], dtype=torch.float64) / 11
    value = (shares * rises).sum()

    result = worst_case_sharpness(objective, rho, geometry=geometry, m=4)

    assert result.value == pytest.approx(value.item(), rel=1e-9)
    error = (3 / 2 * (shares * (rises - value)).square().sum()).sqrt()
    assert result.stderr == pytest.approx(error.item(), rel=1e-6)
    assert (result.m, result.examples, result.perturbation) == (4, 11, None)
    assert result.base_loss == pytest.approx(objective.loss(), rel=1e-12)
    assert result.perturbed_loss == result.base_loss + result.value


@pytest.mark.parametrize("geometry", BALLS)
def test_m_sharpness_rises_as_batches_are_split(geometry):
    objective, _ = linear_objective(8)
    results = [worst_case_sharpness(objective, 0.3, geometry=geometry, m=m) for m in (8, 4, 2, 1)]
    values = [result.value for result in results]
    assert values == sorted(values)
    assert values[0] < 0.9 * values[-1]
    assert math.isnan(results[0].stderr)
    whole = worst_case_sharpness(objective, 0.3, geometry=geometry)
    assert results[0].value == whole.value
    assert whole.m is None
    assert math.isnan(whole.stderr)


@pytest.mark.parametrize("method", ["one_step", "auto_pgd"])
@pytest.mark.parametrize("m", [5, 1])
def test_m_sharpness_is_that_of_the_batches_alone(m, method):
    data = examples(12)
    together = worst_case_sharpness(net_objective(), 0.1, geometry=Geometry(), m=m, method=method, steps=50)
    total = 0
    for batch in zip(*(tensor.split(m) for tensor in data), strict=True):
        alone = worst_case_sharpness(net_objective(data=batch), 0.1, geometry=Geometry(), method=method, steps=50)
        total += alone.value * len(batch[0])
    # the ascents start from other noise
    assert together.value == pytest.approx(total / 12, rel=1e-12 if method == "one_step" else 2e-3)


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("geometry", BALLS)
def test_history(geometry, steps, restarts, m):
    result = worst_case_sharpness(net_objective(), 0.2, geometry=geometry, m=m, steps=steps, restarts=restarts)
    assert len(result.history) == steps + 1
    assert result.history[0] == 0
    assert list(result.history) == sorted(result.history)
    assert result.history[-1] == pytest.approx(result.value, rel=1e-14)
    assert result.value > 0


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize(
    ("arguments", "both", "forward"),
    [
        ({"method": "one_step"}, 1, 1),
        ({"method": "one_step", "steps": 20, "restarts": 5}, 1, 1),
        ({}, 20, 1),
        ({"steps": 1}, 1, 1),
        ({"steps": 7}, 7, 1),
        ({"steps": 7, "restarts": 3}, 19, 3),
        ({"rho": 0.0}, 1, 0),
    ],
)
def test_cost(arguments, both, forward, m):
    passes = {True: 0, False: 0}

    def loss_fn(model, batch):
        passes[torch.is_grad_enabled()] += len(batch[0])
        return cross_entropy(model, batch)

    objective = Objective(Net(), loss_fn, batches(examples(), 5, 7))
    passes.update({True: 0, False: 0})
    result = worst_case_sharpness(objective, **{"rho": 0.1, "geometry": Geometry(), "m": m, **arguments})
    assert passes == {True: 12 * both, False: 12 * forward}
    assert result.evaluations == both


def test_cost_of_the_average():
    calls = []

    def loss_fn(model, batch):
        calls.append(torch.is_grad_enabled())
        return cross_entropy(model, batch)

    objective = Objective(Net(), loss_fn, [examples()])
    calls.clear()
    average_sharpness(objective, 0.1, geometry=Geometry())
    assert calls == [False] * 33


def test_restarts_never_lower_the_value():
    higher = 0
    for seed in range(8):
        objective = net_objective(Net(seed))
        once, thrice = (
            worst_case_sharpness(objective, 1.0, geometry=Geometry("none", p=math.inf), restarts=restarts, seed=seed)
            for restarts in (1, 3)
        )
        assert thrice.value >= once.value
        assert all(a >= b for a, b in zip(thrice.history, once.history, strict=True))
        higher += thrice.value > once.value
    assert higher > 0


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("p", [2, math.inf])
def test_the_seed_decides(p, m):
    def measure(seed):
        return worst_case_sharpness(net_objective(), 0.5, geometry=Geometry(p=p), m=m, seed=seed, steps=7, restarts=2)

    torch.manual_seed(1)
    first = measure(3)
    torch.manual_seed(2)
    again, other = measure(3), measure(4)
    for field in dataclasses.fields(first):
        if field.name not in ("perturbation", "stderr"):
            assert getattr(first, field.name) == getattr(again, field.name), field.name
    assert again.stderr == pytest.approx(first.stderr, rel=0, nan_ok=True)
    if m is None:
        assert all(torch.equal(first.perturbation[name], again.perturbation[name]) for name in first.perturbation)
    assert first.history != other.history
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'value'"):
        first.value = 1.0


def test_convergence():
    geometry = Geometry()
    model, _, _ = in_units(
        geometry, torch.linspace(-1, 1, Quadratic.SIZE).double(), torch.ones(Quadratic.SIZE).double()
    )
    objective = model.objective()
    assert worst_case_sharpness(objective, 0.3, geometry=geometry).converged
    assert not worst_case_sharpness(objective, 0.3, geometry=geometry, steps=2).converged
    assert not worst_case_sharpness(objective, 0.3, geometry=geometry, method="one_step").converged


def test_a_ball_of_size_zero():
    for method in ("one_step", "auto_pgd"):
        result = worst_case_sharpness(net_objective(), 0, geometry=Geometry(), method=method)
        assert result.value == 0
        assert result.perturbed_loss == result.base_loss == net_objective().loss()
        assert all((e == 0).all() for e in result.perturbation.values())


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_profile(scheme, p, m):
    geometry = Geometry(SCHEMES[scheme], p=p)
    rhos = [0.3, 0.01, 0.0, 0.1]
    profile = sharpness_profile(net_objective(), rhos, geometry=geometry, m=m, steps=30)
    assert profile.rhos == (0.0, 0.01, 0.1, 0.3)
    assert list(profile.values) == sorted(profile.values)
    assert profile.values[0] == 0 < profile.values[1]
    for rho, value, result in zip(profile.rhos, profile.values, profile.results, strict=True):
        assert (result.rho, result.value) == (rho, value)
        single = worst_case_sharpness(net_objective(), rho, geometry=geometry, m=m, steps=30)
        # the worst point of a smaller ball may beat what is found in a larger one
        assert single.value <= value <= single.value * 1.01


def test_a_profile_never_falls_where_the_ascent_does():
    # one step leads from a maximum to nowhere: the point of the smaller ball is all that is left
    model = Quadratic()
    model.forward = lambda: torch.sin(20 * model.gain) * torch.exp(-((model.gain - model.first[14]) ** 2))
    rhos = [0.1 * i for i in range(1, 30)]
    profile = sharpness_profile(model.objective(), rhos, geometry=Geometry("none"), steps=1)
    assert list(profile.values) == sorted(profile.values)
    singles = [worst_case_sharpness(model.objective(), r, geometry=Geometry("none"), steps=1).value for r in rhos]
    assert singles != sorted(singles)
    for result in profile.results:
        assert model.objective().loss(result.perturbation) == pytest.approx(result.perturbed_loss, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, r"rho must be a finite number >= 0, got -0.1"),
        ({"rho": math.nan}, ValueError, r"rho must be a finite number >= 0, got nan"),
        ({"rho": math.inf}, ValueError, r"rho must be a finite number >= 0, got inf"),
        ({"rho": True}, TypeError, r"rho must be a finite number >= 0, got bool"),
        ({"rho": "big"}, TypeError, r"rho must be a finite number >= 0, got str"),
        ({"steps": 0}, ValueError, r"steps must be an integer >= 1, got 0"),
        ({"steps": 2.0}, TypeError, r"steps must be an integer >= 1, got float"),
        ({"steps": True}, TypeError, r"steps must be an integer >= 1, got bool"),
        ({"geometry": "none"}, TypeError, "geometry must be a Geometry, got str"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        ({"restarts": 0}, ValueError, r"restarts must be an integer >= 1, got 0"),
        ({"restarts": 1.5}, TypeError, r"restarts must be an integer >= 1, got float"),
        ({"m": 0}, ValueError, r"m must be an integer >= 1, got 0"),
        ({"m": 2.0}, TypeError, r"m must be an integer >= 1, got float"),
        ({"method": "pgd"}, ValueError, r"method must be one of 'auto_pgd', 'one_step', got 'pgd'"),
    ],
)
def test_arguments(arguments, error, message):
    arguments = {"rho": 0.1, "geometry": Geometry(), **arguments}
    with pytest.raises(error, match=message):
        worst_case_sharpness(net_objective(), **arguments)
    rho = arguments.pop("rho")
    with pytest.raises(error, match=message):
        sharpness_profile(net_objective(), [rho], **arguments)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, int])
def test_a_size_of_few_bits_is_the_number_that_it_is(kind):
    objective, _ = linear_objective(3)
    results = [worst_case_sharpness(objective, size, geometry=Geometry(), steps=5) for size in (kind(2), 2.0)]
    averages = [average_sharpness(objective, size, geometry=Geometry(), samples=2) for size in (kind(2), 2.0)]
    for one, other in (results, averages):
        assert (one.value, one.noise_floor) == (other.value, other.noise_floor)
        assert type(one.rho) is float


def test_an_empty_profile():
    with pytest.raises(ValueError, match="rhos is empty"):
        sharpness_profile(net_objective(), [], geometry=Geometry())


def test_a_profile_takes_several_sizes():
    with pytest.raises(TypeError, match=r"^rhos must be a sequence of numbers, got float$"):
        sharpness_profile(net_objective(), 0.1, geometry=Geometry())
