"""Worst cases where arithmetic is at its limits: zeros, tiny and huge gradients, losses that break down, rounding."""

import math

import pytest
import torch
from quadratics import Chain, Net, Quadratic, cross_entropy, examples, highest, net_objective
from torch import nn

from asam import Geometry
from asam.measure import Objective, average_sharpness, sharpness_profile, worst_case_sharpness

METHODS = ["one_step", "auto_pgd"]
ONE = [torch.ones(1, 1)]


def normal(seed):
    return torch.randn(Quadratic.SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(model):
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [2, math.inf])
def test_zero_weights_stay_where_they_are(p, method):
    model = Quadratic()
    with torch.no_grad():
        model.kernel[0] = 0
        model.weight.zero_()
    model.first = model.flat().detach().clone()
    model.gradient, model.hessian = normal(1), torch.diag(normal(2).abs())
    geometry = Geometry(p=p, eta=0.0)
    result = worst_case_sharpness(model.objective(), 0.3, geometry=geometry, method=method)
    for name, param in model.named_parameters():
        e = result.perturbation[name]
        assert (e[param == 0] == 0).all() if name != "bias" else (e != 0).all(), name
        assert e.isfinite().all(), name
    assert (result.perturbation["kernel"][1] != 0).all()
    assert geometry.norm(weights_of(model), result.perturbation).item() == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("p", [2, math.inf])
def test_a_random_start_lies_on_the_sphere_of_what_can_move(p):
    model = Quadratic()
    with torch.no_grad():
        model.kernel.zero_()
        model.weight.zero_()
    model.first = model.flat().detach().clone()
    model.hessian = torch.eye(model.SIZE, dtype=torch.float64)
    geometry = Geometry(p=p, eta=0.0)
    result = worst_case_sharpness(model.objective(), 0.3, geometry=geometry, steps=1)
    assert result.value > 0
    assert geometry.norm(weights_of(model), result.perturbation).item() == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("critical", [True, False])
def test_a_ball_of_one_point(critical, p, method):
    model = Quadratic()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    model.first.zero_()
    model.gradient, model.hessian = normal(1) * (not critical), torch.diag(normal(2).abs())
    geometry = Geometry(p=p, eta=0.0, bias="scaled")
    result = worst_case_sharpness(model.objective(), 0.3, geometry=geometry, method=method)
    assert result.value == 0
    assert all((e == 0).all() for e in result.perturbation.values())


@pytest.mark.parametrize("p", [2, math.inf])
def test_a_constant_loss_has_none(p):
    model = Quadratic()
    result = worst_case_sharpness(model.objective(), 0.3, geometry=Geometry(p=p))
    assert (result.value, result.history) == (0, (0.0,) * 21)
    assert result.converged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize(("factor", "tolerance"), [(1e-30, 1e-6), (1e-42, 4e-3), (1e20, 1e-6), (1e30, 1e-6)])
def test_the_size_of_the_loss_is_of_no_account(factor, tolerance, p, method):
    # in float32 the squares of 1e-30 are 0 and those of 1e30 inf; 1e-42 itself has three digits
    model = Quadratic(dtype=torch.float32)
    model.gradient = (normal(3) * factor).float()
    geometry, rho = Geometry(p=p, eta=0.0), 0.3
    scaled = model.scales(geometry).double() * model.gradient.double()
    exact = rho * torch.linalg.vector_norm(scaled, 2 if p == 2 else 1).item()

    result = worst_case_sharpness(model.objective(), rho, geometry=geometry, method=method)

    norm = geometry.norm(weights_of(model), result.perturbation).item()
    assert norm == pytest.approx(rho, rel=1e-6)
    e = model.objective().flat(result.perturbation).double()
    assert float(model.gradient.double() @ e) == pytest.approx(exact, rel=1e-6)
    assert result.value == pytest.approx(exact, rel=tolerance)
    assert 1e-9 * exact < result.noise_floor < 1e-4 * exact


def test_a_quadratic_of_tiny_numbers():
    model = Quadratic(dtype=torch.float32)
    geometry, rho = Geometry(eta=0.0), 0.3
    model.gradient, model.hessian = (normal(3) * 1e-30).float(), torch.diag(normal(4) * 1e-30).float()
    t = model.scales(geometry).double()
    exact = highest(torch.diag(t**2 * normal(4)), t * normal(3), rho) * 1e-30
    result = worst_case_sharpness(model.objective(), rho, geometry=geometry)
    assert result.value == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("seed", range(5))
def test_one_way_up_from_a_critical_point(seed, steps):
    # along it the loss rises, along 99 others it falls: hardly a random point is above
    model = nn.Linear(100, 1, bias=False).double()
    curvatures = torch.cat([torch.tensor([0.1]), -torch.linspace(0.01, 1, 99)]).double()
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=torch.float64)).Q
    nn.init.zeros_(model.weight)
    objective = Objective(model, lambda m, batch: curvatures @ (axes @ m.weight[0]).square() / 2, ONE)
    result = worst_case_sharpness(objective, 1.0, geometry=Geometry("none"), steps=steps, seed=seed)
    assert result.value == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("p", [1.2, 3, 20])
def test_the_ascent_begins_with_the_one_step(p):
    model = nn.Linear(30, 1)
    inputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    objective = Objective(model, lambda m, batch: m(batch).square().mean(), [inputs])
    one, many = (
        worst_case_sharpness(objective, 0.01, geometry=Geometry("none", p=p), method=method) for method in METHODS
    )
    assert many.value > 0.999 * one.value > 0


def test_millions_of_float32_weights():
    # torch's norm of so many is off by 2e-4
    model = nn.Linear(8_000_000, 1, bias=False)
    direction = torch.rand(8_000_000, generator=torch.Generator().manual_seed(0))
    objective = Objective(model, lambda model, batch: model.weight[0] @ direction, ONE)
    result = worst_case_sharpness(objective, 0.3, geometry=Geometry("none"), steps=2)
    assert result.perturbation["weight"].double().norm().item() == pytest.approx(0.3, rel=1e-5)


class Scalar(nn.Module):
    """``function(w)`` at w = 1, of one weight."""

    def __init__(self, function):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.function = function

    def objective(self):
        return Objective(self, lambda model, batch: model.function(model.w), ONE)


@pytest.mark.parametrize("p", [2, math.inf])
def test_an_infinite_loss_in_the_ball_is_the_worst(p):
    model = Scalar(lambda w: torch.where(w > 1.2, math.inf, 1.0) * w)
    result = worst_case_sharpness(model.objective(), 0.5, geometry=Geometry("none", p=p))
    assert result.value == result.perturbed_loss == math.inf
    assert result.history == (0.0, *[math.inf] * 20)
    assert model.objective().loss(result.perturbation) == math.inf
    assert model.w.item() == 1


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("gradient", ["nan", "finite"])
def test_a_loss_that_is_nan_in_the_ball_is_never_the_worst(gradient, p):
    def function(w):
        broken = torch.where(w.detach() > 1.2, math.nan, 0.0)
        return w + broken if gradient == "finite" else w * (1 + broken)

    model = Scalar(function)
    result = worst_case_sharpness(model.objective(), 0.5, geometry=Geometry("none", p=p))
    assert 0.1 < result.value <= 0.2
    assert model.objective().loss(result.perturbation) == pytest.approx(result.perturbed_loss)


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_a_number_at_the_weights_only_has_no_sharpness(method, p, restarts):
    objective = Scalar(lambda w: torch.where(w.detach() == 1, 0.0, math.nan) + w).objective()
    result = worst_case_sharpness(objective, 0.5, geometry=Geometry("none", p=p), method=method, restarts=restarts)
    assert math.isnan(result.value)
    assert math.isnan(result.history[-1])
    assert not result.converged


def test_a_profile_keeps_what_a_smaller_ball_found():
    objective = Scalar(lambda w: torch.where(w.detach().sub(1).abs() <= 0.1001, 0.0, math.nan) + w).objective()
    profile = sharpness_profile(objective, [0.1, 1e6], geometry=Geometry("none"))
    assert profile.values[0] == pytest.approx(0.1)
    assert profile.values[1] == profile.values[0]
    assert not profile.results[1].converged


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_at_the_weights(value):
    objective = Scalar(lambda w: w * value).objective()
    for measure in (worst_case_sharpness, average_sharpness):
        with pytest.raises(ValueError, match=f"the loss at the weights themselves is {value}"):
            measure(objective, 0.1, geometry=Geometry())


@pytest.mark.parametrize("p", [2, math.inf])
def test_a_saddle_is_left(p):
    # the gradient is exactly 0 along the direction in which the loss rises most
    model = Scalar(lambda w: (w - 1) ** 2)
    model.v = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    model.function = lambda w: 0.1 * (w - 1) - (w - 1) ** 2 + 2 * (model.v - 1) ** 2
    exact = highest(torch.diag(torch.tensor([-2.0, 4.0])).double(), torch.tensor([0.1, 0.0]).double(), 0.5)
    if p == math.inf:
        exact = 0.1 * 0.05 - 0.05**2 + 2 * 0.5**2
    result = worst_case_sharpness(model.objective(), 0.5, geometry=Geometry("none", p=p), steps=50)
    assert result.value == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("rho", [1e-12, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_makes_is_below_the_noise_floor(dtype, rho, p, method):
    objective = net_objective(Net(dtype=dtype), examples(dtype=dtype))
    result = worst_case_sharpness(objective, rho, geometry=Geometry(p=p), method=method)
    assert 0 <= result.value < result.noise_floor < 0.1 * result.base_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rho", [1e-3, 0.05])
@pytest.mark.parametrize("p", [2, math.inf])
def test_lower_precision_agrees_with_float64_within_a_few_noise_floors(p, rho, dtype):
    # the weights themselves must be the same in both
    low = Net(dtype=dtype)
    high = Net()
    high.load_state_dict(low.state_dict())
    data = examples(dtype=dtype)
    geometry = Geometry(p=p)
    value = worst_case_sharpness(net_objective(high, (data[0].double(), data[1])), rho, geometry=geometry).value
    result = worst_case_sharpness(net_objective(low, data), rho, geometry=geometry)
    assert abs(result.value - value) < 3 * result.noise_floor


def test_noise_floor_of_the_average():
    values = [
        average_sharpness(net_objective(Net(dtype=dtype), examples(dtype=dtype)), 1e-9, geometry=Geometry())
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for value in values:
        assert abs(value.value) < 2 * value.noise_floor < 0.1 * value.base_loss


@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("scheme", ["none", "elementwise"])
def test_noise_floor_of_the_average_covers_the_rounding_of_the_weights(scheme, noise):
    """The loss is linear, so its average rise is exactly 0; w + e is rounded far more than the loss is."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(200, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(10 * torch.randn(1, 200, generator=generator))
    x = torch.randn(8, 200, generator=generator)
    objective = Objective(model, lambda model, batch: model(batch).double().mean(), [x])
    rho = 1e-6 if scheme == "none" else 1e-7
    result = average_sharpness(objective, rho, geometry=Geometry(scheme, eta=0), noise=noise)
    assert 0 < abs(result.value) < result.noise_floor < 1e-3


def test_weights_in_half_precision_are_rounded_once():
    model, data = Net(dtype=torch.bfloat16), examples(dtype=torch.bfloat16)
    seen = []

    def loss_fn(model, batch):
        seen.append(weights_of(model)["layers.0.weight"].clone())
        return cross_entropy(model, batch)

    objective = Objective(model, loss_fn, [data])
    e = torch.full((6, 4), 1 / 300)
    objective.loss({"layers.0.weight": e})
    assert torch.equal(seen[-1], (model.layers[0].weight.detach().float() + e).bfloat16())
    assert objective.gradient()["layers.0.weight"].dtype == torch.float32
    assert Chain((1.0, 1.0)).objective().gradient()["w0"].dtype == torch.float64


@pytest.mark.parametrize("rho", [1e39, 1e300])
def test_a_size_that_is_no_number_of_the_weights(rho):
    objective = Objective(nn.Linear(1, 1), lambda model, x: model(x).mean(), ONE)
    for measure in (worst_case_sharpness, average_sharpness):
        with pytest.raises(ValueError, match=r"^rho must be a number of torch\.float32, at most 3\.4e\+38, got 1e"):
            measure(objective, rho, geometry=Geometry())


def test_a_loss_whose_square_overflows():
    objective = Objective(
        nn.Linear(2, 1).double(), lambda model, x: model(x).square().mean(), [torch.ones(4, 2).double()]
    )
    geometry = Geometry("none")
    average = average_sharpness(objective, 1e90, geometry=geometry)
    assert 1e178 < average.value < 1e182
    assert 0 < average.stderr < math.inf
    assert worst_case_sharpness(objective, 1e90, geometry=geometry, m=2).stderr < math.inf
    assert average_sharpness(objective, 1e154, geometry=geometry).value > 1e307


@pytest.mark.parametrize("rho", [1e-3, 1e-7])
def test_the_noise_floor_is_that_of_a_loss_of_lower_precision(rho):
    inputs, targets = examples(dtype=torch.float64)
    exact = net_objective(Net(), (inputs, targets))
    coarse = Objective(exact.model, lambda model, batch: cross_entropy(model, batch).float(), [(inputs, targets)])
    geometry = Geometry("none")
    for measure in (average_sharpness, worst_case_sharpness):
        true, found = (measure(objective, rho, geometry=geometry) for objective in (exact, coarse))
        assert abs(found.value - true.value) < 3 * found.noise_floor
        assert 1e-9 < found.noise_floor < 1e-6


@pytest.mark.parametrize("p", [2, 3, math.inf])
@pytest.mark.parametrize(
    ("dtype", "rho"),
    [(torch.float32, rho) for rho in (1e-46, 1e-44, 1e-30, 3e19, 1e30)]
    + [(torch.float64, rho) for rho in (1e-320, 1e-155, 1e155, 1e300)],
)
def test_sizes_at_the_ends_of_floating_point(dtype, rho, p):
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 5, dtype=dtype), torch.randint(3, (8,))
    objective = Objective(nn.Linear(5, 3).to(dtype), cross_entropy, [(inputs, targets)])
    result = worst_case_sharpness(objective, rho, geometry=Geometry("none", p=p))
    if rho < 1:
        assert 0 <= result.value <= 1e-9
    else:  # far out the loss is linear along a ray
        nearer = worst_case_sharpness(objective, 1e6, geometry=Geometry("none", p=p)).value
        assert result.value >= 0.99 * nearer * (rho / 1e6)


@pytest.mark.parametrize("seed", range(10))
def test_one_flat_way_up_among_steep_ways_down(seed):
    """Where each step up is held short by curvature a hundred times as large, 50 steps need directions that add up."""
    generator = torch.Generator().manual_seed(seed)
    curvatures = -torch.rand(100, generator=generator, dtype=torch.float64)
    curvatures[0] = 0.01
    slopes = 1e-3 * torch.randn(100, generator=generator, dtype=torch.float64)
    model = nn.Linear(100, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def loss_fn(model, _):
        return (model.weight[0] * slopes + model.weight[0].square() * curvatures / 2).sum()

    found = worst_case_sharpness(Objective(model, loss_fn, ONE), 1.0, geometry=Geometry("none"), steps=50)
    # the maximum is where (mu - curvatures) u = slopes, on the sphere of radius 1
    low, high = 0.01, 1.0
    for _ in range(100):
        mu = (low + high) / 2
        low, high = (mu, high) if (slopes / (mu - curvatures)).norm() > 1 else (low, mu)
    u = slopes / (high - curvatures)
    highest = (slopes @ u + curvatures @ u.square() / 2).item()
    assert 0.95 * highest <= found.value <= highest * (1 + 1e-9)
