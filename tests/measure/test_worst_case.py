"""The worst case of losses for which it is known."""

import itertools
import math

import pytest
import torch
from quadratics import CHAINS, SCHEMES, Chain, Quadratic, examples, highest, in_units
from torch import nn

from asam import Geometry
from asam.measure import Objective, worst_case_sharpness

SIZE = Quadratic.SIZE
BALLS = list(itertools.product(SCHEMES, [0.0, 0.01], ["unscaled", "scaled", "fixed"]))


def normal(seed):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spaced(low, high):
    return torch.linspace(low, high, SIZE, dtype=torch.float64)


def powers(low, high):
    return torch.logspace(low, high, SIZE, dtype=torch.float64)


ZERO = torch.zeros(SIZE, dtype=torch.float64)
NOT_TOP = (torch.arange(SIZE) < SIZE - 1).double()

# eigenvalues of THT in rising order, and Tg in the basis of their eigenvectors
SPECTRA = {
    "linear": (ZERO, normal(1)),
    "convex": (powers(-3, 1), normal(2)),
    "ill-conditioned": (powers(-6, 2), 1e-3 * normal(3)),
    "almost at the minimum": (powers(-3, 1), 1e-4 * normal(2)),
    "indefinite": (spaced(-3, 2), normal(4)),
    "concave, maximum inside": (-spaced(2, 9).flip(0), 0.05 * normal(5)),
    "concave, maximum on the sphere": (-spaced(0.1, 2).flip(0), normal(6)),
    "concave, at the maximum": (-spaced(0.1, 2).flip(0), ZERO),
    "concave, ill-conditioned": (-powers(-2, 2), 0.3 * normal(8)),
    "one flat way up": (torch.cat([ZERO[:1] + 0.05, -powers(-2, 2)[1:]]), 0.1 * normal(9)),
    "hard case": (spaced(-3, 2), 0.05 * normal(7) * NOT_TOP),
    "hard case, convex": (powers(-2, 0), 0.05 * normal(7) * NOT_TOP),
    "critical, one outlier": (torch.cat([powers(-4, 0)[1:], ZERO[:1] + 5]), ZERO),
    "critical, clustered": (spaced(0.9, 1), ZERO),
    "critical, saddle": (spaced(-3, 2), ZERO),
    "critical, repeated": (torch.cat([ZERO[5:] + 0.3, ZERO[:5] + 1]), ZERO),
}


def check(result, objective, rho):
    """That the perturbation lies in the ball and gives the loss that is reported."""
    weights = {name: param.detach() for name, param in objective.params.items()}
    assert result.geometry.norm(weights, result.perturbation) <= rho * (1 + 1e-9)
    assert objective.loss(result.perturbation) == pytest.approx(result.perturbed_loss, rel=1e-12, abs=1e-14)
    assert result.value == pytest.approx(result.perturbed_loss - result.base_loss, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_trust_region(spectrum, rho):
    for scheme, (eta, bias) in zip(SCHEMES, [(0.0, "unscaled"), (0.01, "scaled")] * 3, strict=False):
        geometry = Geometry(SCHEMES[scheme], eta=eta, bias=bias)
        model, hessian, gradient = in_units(geometry, *SPECTRA[spectrum])
        exact = highest(hessian, gradient, rho)
        objective = model.objective()

        result = worst_case_sharpness(objective, rho, geometry=geometry, steps=50)

        assert 0.998 * exact - 1e-12 <= result.value <= exact + 1e-9 * max(1, exact), scheme
        check(result, objective, rho)


@pytest.mark.parametrize(("scheme", "eta", "bias"), BALLS)
def test_trust_region_in_every_ball(scheme, eta, bias):
    geometry = Geometry(SCHEMES[scheme], eta=eta, bias=bias)
    model, hessian, gradient = in_units(geometry, *SPECTRA["indefinite"], seed=3)
    exact = highest(hessian, gradient, 0.5)
    result = worst_case_sharpness(model.objective(), 0.5, geometry=geometry)
    assert result.value == pytest.approx(exact, rel=1e-9)
    check(result, model.objective(), 0.5)


def test_the_oracle_is_what_a_search_finds():
    circle = torch.linspace(0, 2 * math.pi, 1001, dtype=torch.float64)
    disc = torch.stack([circle.cos(), circle.sin()]) * torch.linspace(0, 0.7, 701, dtype=torch.float64)[:, None, None]
    u = disc.transpose(0, 1).reshape(2, -1)
    for values, c in [((1, 2), (0.3, 0.1)), ((-1, 2), (0.3, 0)), ((-3, -2), (0.3, 0.1)), ((0, 0), (0.3, 0.1))]:
        hessian, c = torch.diag(torch.tensor(values, dtype=torch.float64)), torch.tensor(c, dtype=torch.float64)
        found = (c @ u + (u * (hessian @ u)).sum(0) / 2).max()
        assert highest(hessian, c, 0.7) == pytest.approx(found.item(), rel=1e-4)


@pytest.mark.parametrize(("scheme", "eta", "bias"), BALLS)
def test_diagonal_quadratic_in_a_box(scheme, eta, bias):
    geometry = Geometry(SCHEMES[scheme], p=math.inf, eta=eta, bias=bias)
    model = Quadratic()
    curvatures, rho = normal(9).abs(), 0.3
    model.gradient, model.hessian = normal(8), torch.diag(curvatures)
    t = model.scales(geometry)
    exact = (rho * t * model.gradient.abs() + rho**2 * t**2 * curvatures / 2).sum()
    result = worst_case_sharpness(model.objective(), rho, geometry=geometry)
    assert result.value == pytest.approx(exact.item(), rel=1e-12)
    check(result, model.objective(), rho)


@pytest.mark.parametrize(
    ("idle", "rho", "dtype"),  # weights of no gradient; numbers of which 3/4 + 1/2 - 1/4 is the number itself or not
    [
        (0, 1.0, torch.float64),
        (3, 1.0, torch.float64),
        (0, 0.3174339063922211, torch.float64),
        (3, 8e-3, torch.float32),
    ],
)
def test_convex_quadratics_in_a_box(idle, rho, dtype):
    # their maximum is in one of the 2^17 corners, many of which are the highest around
    corners = 1.0 - 2 * (torch.arange(2**SIZE)[:, None] >> torch.arange(SIZE) & 1).double()
    geometry, shares = Geometry("none", p=math.inf), []
    for seed in range(20):
        model = Quadratic(dtype=dtype)
        factors = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gradient = 10 ** (-seed / 5) * normal(seed)
        factors[:idle], gradient[:idle] = 0, 0
        hessian = factors @ factors.T / SIZE
        exact = (corners @ gradient + (corners @ hessian * corners).sum(1) / 2).max().item()
        model.hessian, model.gradient = (hessian / rho**2).to(dtype), (gradient / rho).to(dtype)
        result = worst_case_sharpness(model.objective(), rho, geometry=geometry, steps=50)
        assert result.evaluations == 50
        shares.append(result.value / exact)
    assert max(shares) <= 1 + (1e-9 if dtype == torch.float64 else 1e-5)
    assert min(shares) > 0.8
    assert sorted(shares)[10] > 0.95


@pytest.mark.parametrize(("scheme", "eta", "bias"), BALLS)
@pytest.mark.parametrize("p", [2, math.inf])
def test_rank_one_at_a_critical_point(scheme, eta, bias, p):
    geometry = Geometry(SCHEMES[scheme], p=p, eta=eta, bias=bias)
    model, a, rho = Quadratic(), normal(10), 0.3
    model.hessian = a.outer(a)
    length = torch.linalg.vector_norm(model.scales(geometry) * a, 2 if p == 2 else 1)
    result = worst_case_sharpness(model.objective(), rho, geometry=geometry)
    assert result.value == pytest.approx(rho**2 * length.item() ** 2 / 2, rel=1e-10)
    check(result, model.objective(), rho)


@pytest.mark.parametrize("p", [1.5, 3])
def test_other_norms(p):
    geometry, q = Geometry(p=p, eta=0.0), p / (p - 1)
    model, a, rho = Quadratic(), normal(11), 0.3
    length = torch.linalg.vector_norm(model.scales(geometry) * a, q).item()
    model.gradient = a
    linear = worst_case_sharpness(model.objective(), rho, geometry=geometry, steps=8)
    assert linear.value == pytest.approx(rho * length, rel=1e-3)
    assert linear.value <= rho * length * (1 + 1e-9)
    check(linear, model.objective(), rho)

    model.hessian = a.outer(a)
    both = worst_case_sharpness(model.objective(), rho, geometry=geometry, steps=8)
    assert both.value == pytest.approx(rho * length + (rho * length) ** 2 / 2, rel=1e-3)
    # the balls lie in each other
    values = {r: worst_case_sharpness(model.objective(), rho, geometry=Geometry(p=r, eta=0.0)) for r in (2, math.inf)}
    smaller, larger = (values[2], values[math.inf]) if p > 2 else (linear, values[2])
    assert smaller.value < both.value < larger.value


@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
@pytest.mark.parametrize(("scheme", "eta", "bias"), BALLS)
def test_one_step_is_exact_for_a_margin_loss_of_single_examples(scheme, eta, bias, p):
    geometry, rho, q = Geometry(SCHEMES[scheme], p=p, eta=eta, bias=bias), 0.4, 1 if p == math.inf else p / (p - 1)
    model = nn.Linear(4, 1).double()
    x, labels = examples(classes=2)
    y = labels * 2.0 - 1

    def loss_fn(model, batch):
        return nn.functional.softplus(-batch[1] * model(batch[0]).squeeze(1)).mean()

    scales = geometry.scales({name: param.detach() for name, param in model.named_parameters()})
    inputs = torch.cat([x * scales["weight"], scales["bias"].expand(len(x), 1)], dim=1)
    margin = y * model(x).squeeze(1).detach()
    worst = nn.functional.softplus(-margin + rho * torch.linalg.vector_norm(inputs, q, dim=1))
    rises = worst - nn.functional.softplus(-margin)

    result = worst_case_sharpness(Objective(model, loss_fn, [(x, y)]), rho, geometry=geometry, m=1, method="one_step")

    assert result.value == pytest.approx(rises.mean().item(), rel=1e-12)
    assert result.stderr == pytest.approx(rises.std().item() / math.sqrt(len(x)), rel=1e-12)


@pytest.mark.parametrize("rho", [0.1, 0.4])
@pytest.mark.parametrize("chain", CHAINS)
def test_scalar_chain(chain, rho):
    factors = CHAINS[chain]
    n = len(factors)
    for p, growth in ((math.inf, 1 + rho), (2, 1 + rho / math.sqrt(n))):
        objective = Chain(factors).objective()
        result = worst_case_sharpness(objective, rho, geometry=Geometry(p=p, eta=0.0))
        assert result.value == pytest.approx(Chain.Y**2 * (growth**n - 1) ** 2 / 2, rel=1e-9), p
        assert result.converged
        check(result, objective, rho)


@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_step_is_the_rise_at_the_maximizer(scheme, p):
    geometry, rho = Geometry(SCHEMES[scheme], p=p), 0.2
    model, _, _ = in_units(geometry, *SPECTRA["indefinite"])
    objective = model.objective()
    e = geometry.maximizer(dict(model.named_parameters()), objective.gradient(), rho)
    result = worst_case_sharpness(objective, rho, geometry=geometry, method="one_step")
    assert result.value == pytest.approx(objective.loss(e) - objective.loss(), rel=1e-12)
    for name in e:
        torch.testing.assert_close(result.perturbation[name], e[name], rtol=1e-12, atol=1e-15)


def test_one_step_that_leads_down_counts_as_none():
    geometry = Geometry("none")
    model, _, _ = in_units(geometry, -spaced(2, 9).flip(0), 0.01 * normal(5))
    result = worst_case_sharpness(model.objective(), 1.0, geometry=geometry, method="one_step")
    assert result.value == 0
    assert result.history == (0.0, 0.0)
    assert all((e == 0).all() for e in result.perturbation.values())
