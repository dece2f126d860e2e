"""The nearest point of the ball, in units of the weights."""

import math

import pytest
import torch
from slow_reference import assert_near, scale
from test_geometry import RHO, mappings

from asam import Geometry, projection
from asam.norms import safe_norm
from asam.projection import nearest_in_ball

optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
NORMS = [1.2, 1.5, 2, 3, 8, math.inf]
SCHEMES = ["elementwise", "filterwise", "layerwise", "none"]


def units(ball, params, e):
    scales = [scale(name, w, ball.normalization, ball.eta, ball.bias) for name, w in params.items()]
    return torch.cat([(value / s).flatten() for value, s in zip(e.values(), scales, strict=True)])


def outside():
    return mappings(0), {name: 3 * value for name, value in mappings(1).items()}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("normalization", SCHEMES)
def test_points_inside_stay(normalization, p):
    ball = Geometry(normalization, p=p)
    params, e = outside()
    size = ball.norm(params, e)
    e = {name: value * (0.9 * RHO / size) for name, value in e.items()}
    # to and from units of the weights: two roundings
    assert_near(ball.project(params, e, RHO), e, rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("normalization", SCHEMES)
def test_points_outside_come_to_the_surface_and_stay_there(normalization, p):
    ball = Geometry(normalization, p=p)
    params, e = outside()
    projected = ball.project(params, e, RHO)
    assert ball.norm(params, projected).item() == pytest.approx(RHO, rel=1e-12)
    assert ball.norm(params, projected).item() <= RHO * (1 + 1e-14)
    assert_near(ball.project(params, projected, RHO), projected)
    assert all((projected[name] * e[name] >= 0).all() for name in e)


@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_no_point_of_the_ball_is_nearer(p):
    ball = Geometry(p=p)
    params, e = outside()
    size = ball.norm(params, e)
    e = {name: value * (4 * RHO / size) for name, value in e.items()}
    target = units(ball, params, e).abs().numpy()
    found = optimize.minimize(
        lambda x: ((x - target) ** 2).sum(),
        x0=target * 0.01,
        jac=lambda x: 2 * (x - target),
        bounds=[(0, None)] * len(target),
        constraints={"type": "ineq", "fun": lambda x: RHO**p - (x**p).sum(), "jac": lambda x: -p * x ** (p - 1)},
        options={"ftol": 1e-14, "maxiter": 1000},
        method="SLSQP",
    )
    ours = units(ball, params, ball.project(params, e, RHO)).abs().numpy()
    assert found.status in (0, 8)  # 8: the line search finds nothing better, which rounding can do at the optimum
    # never farther than the best it finds, and the same point to its accuracy
    assert ((ours - target) ** 2).sum() <= found.fun + 1e-9
    assert abs(ours - found.x).max() < 1e-5


@pytest.mark.parametrize("p", [1.2, 1.5, 2, 3, 8])
def test_optimality_conditions(p):
    # |u| - x is a positive multiple of the normal p x^(p-1) of the ball
    ball = Geometry(p=p)
    params, e = outside()
    target = units(ball, params, e).abs()
    x = units(ball, params, ball.project(params, e, RHO)).abs()
    keep = x > 1e-9
    multiplier = ((target - x) / (p * x ** (p - 1)))[keep]
    assert (multiplier > 0).all()
    torch.testing.assert_close(multiplier, multiplier[0].expand_as(multiplier), rtol=1e-5, atol=0)


def test_closed_forms():
    params, e = outside()
    for p in (2, math.inf):
        ball = Geometry(p=p)
        u = units(ball, params, e)
        projected = units(ball, params, ball.project(params, e, RHO))
        expected = u * RHO / u.norm() if p == 2 else u.clamp(-RHO, RHO)
        torch.testing.assert_close(projected, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_a_ball_of_size_zero_holds_only_zero(p):
    params, e = outside()
    zeros = {name: torch.zeros_like(value) for name, value in e.items()}
    assert_near(Geometry(p=p).project(params, e, 0.0), zeros, rtol=0, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_what_cannot_move_is_projected_to_zero(p):
    params, e = outside()
    projected = Geometry(p=p, bias="fixed").project(params, e, RHO)
    movable = [name for name in params if name != "fc.bias"]
    alone = Geometry(p=p).project({n: params[n] for n in movable}, {n: e[n] for n in movable}, RHO)
    assert torch.equal(projected["fc.bias"], torch.zeros(4, dtype=torch.float64))
    assert_near({name: projected[name] for name in movable}, alone)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_a_non_finite_point_is_not_made_finite(p, value):
    params, e = outside()
    e["fc.weight"][0, 0] = value
    assert Geometry(p=p).project(params, e, RHO)["fc.weight"][0, 0].isnan()


@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
def test_zero_stays_zero_in_a_ball_of_any_size(p):
    for rho in (0.0, 1.0):
        assert torch.equal(nearest_in_ball(torch.zeros(3), p, rho), torch.zeros(3))
    assert torch.equal(nearest_in_ball(torch.tensor([3.0, -4.0]), p, 0.0), torch.zeros(2))


@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_a_ball_of_size_one(p):
    inside_another_ball = {1.5: [0.7, 0.7], 2: [0.9, 0.9], 3: [0.95, 0.95]}[p]  # that of the next larger p
    u = torch.tensor(inside_another_ball, dtype=torch.float64)
    projected = nearest_in_ball(u, p, 1.0)
    assert torch.linalg.vector_norm(projected, p).item() == pytest.approx(1, rel=1e-12)
    assert projected[0] == projected[1]


@pytest.mark.parametrize("p", [1.5, 3])
def test_a_point_on_the_sphere_is_its_own(p):
    u = torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64)
    assert torch.equal(nearest_in_ball(u, p, safe_norm(u, p).item()), u)


@pytest.mark.parametrize("p", [1.01, 20, 50, 1000])
@pytest.mark.parametrize("rho", [1e-20, 1e-4, 0.5, 1e20])
def test_any_p_in_a_ball_of_any_size(rho, p):
    # powers of such numbers underflow or overflow, in float64 too
    generator = torch.Generator().manual_seed(0)
    u = {"weight": rho * torch.rand(100, generator=generator)}
    ball = Geometry("none", p=p)
    shares = u["weight"].double() / u["weight"].max()
    size = u["weight"].max().double() * (shares**p).sum() ** (1 / p)
    assert ball.norm(u, u).item() == pytest.approx(size.item(), rel=1e-5)

    nearer = ball.project(u, u, rho / 10)

    assert ball.norm(u, nearer).item() == pytest.approx(rho / 10, rel=1e-5)
    rest = u["weight"].double() - nearer["weight"].double()
    assert (rest > -1e-6 * rho).all()
    if p == 1000:  # nearly a box
        torch.testing.assert_close(nearer["weight"], u["weight"].clamp(max=rho / 10), rtol=0.02, atol=0)


@pytest.mark.parametrize("p", [1.2, 1.9, 3, 20])
@pytest.mark.parametrize("outside", [1.01, 1.7, 1000.0])
def test_a_few_steps_find_it(outside, p, monkeypatch):
    real, calls = projection._shrunk, []
    monkeypatch.setattr(projection, "_shrunk", lambda *arguments: (calls.append(arguments), real(*arguments))[1])
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rho = safe_norm(u, p).item() / outside
    assert safe_norm(nearest_in_ball(u, p, rho), p).item() == pytest.approx(rho, rel=1e-12)
    assert len(calls) <= 12


@pytest.mark.parametrize("p", [1.2, 20])
def test_what_is_not_found_in_time_is_in_the_ball(p, monkeypatch):
    monkeypatch.setattr(projection, "NEWTON", 1)
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rho = safe_norm(u, p).item() / 1.7
    assert 0 < safe_norm(nearest_in_ball(u, p, rho), p).item() <= rho * (1 + 1e-12)


@pytest.mark.parametrize("p", [1.2, 3, 20])
def test_a_point_that_rounding_alone_puts_outside(p):
    rounded = 0
    for seed in range(40):
        u = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        u[::7] = 0
        rho = torch.linalg.vector_norm(u.double(), p).item()
        rounded += safe_norm(u, p).item() > rho
        torch.testing.assert_close(nearest_in_ball(u, p, rho), u, rtol=1e-6, atol=0)
    assert rounded  # in some of them


@pytest.mark.parametrize(("p", "spread"), [(1.001, 8), (1.2, 4), (3, 0), (20, 0)])
def test_one_multiplier_holds_for_elements_of_any_magnitude(p, spread):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(200, generator=generator, dtype=torch.float64)
    u *= (spread * torch.randn(200, generator=generator, dtype=torch.float64)).exp()
    rho = safe_norm(u, p).item() / 30
    x, target = nearest_in_ball(u, p, rho).abs() / rho, u.abs() / rho
    assert safe_norm(x, p).item() == pytest.approx(1, rel=1e-12)
    some = (x > 1e-9) & (x < 0.9 * target)  # of the others rounding leaves no multiplier
    multipliers = ((target - x) / x ** (p - 1))[some]
    assert len(multipliers) > (3 if p > 1.001 else 0)  # there one element is nearly all
    torch.testing.assert_close(multipliers, multipliers.mean().expand_as(multipliers), rtol=1e-7, atol=0)
