"""Hutch++ against exact traces, and against its own standard error."""

import math

import pytest
import torch
from operators import Chain, Matrix, chain_loss, cross_entropy, dense_hessian, examples, loss_only, mlp, with_spectrum

from asam import Geometry
from asam.measure import Objective, hessian, trace

DECAYING = [100 * 0.8**i for i in range(80)]
FLAT = torch.linspace(-1, 3, 80).tolist()


@pytest.mark.parametrize(
    "matrix",
    [
        with_spectrum([4, -2, 1, *[0] * 50]),
        torch.outer(*[torch.arange(1.0, 40).double()] * 2),
        torch.zeros(30, 30).double(),
        with_spectrum([3, 2, -7, 0.5]),
        torch.tensor([[-2.5]]).double(),
    ],
    ids=["rank-3", "rank-1", "zero", "4x4", "1x1"],
)
def test_exact_for_small_and_low_rank_matrices(matrix):
    operator = Matrix(matrix)
    found = trace(operator)
    assert found.value == pytest.approx(matrix.trace().item(), rel=1e-12, abs=1e-12)
    assert found.stderr <= 1e-12 * (1 + abs(matrix.trace().item()))
    assert found.matvecs == operator.matvecs == (30 if len(matrix) > 10 else len(matrix))


@pytest.mark.parametrize("size", [9, 10, 11])
def test_exact_where_the_sketch_holds_everything(size):
    """10 of 30 products are a sketch; up to that size nothing is left to estimate."""
    found = trace(Matrix(with_spectrum(range(size))))
    assert found.value == pytest.approx(size * (size - 1) / 2, rel=1e-12 if size <= 10 else 0.5)
    assert (found.stderr == 0) == (size <= 10)
    assert found.matvecs == (size if size <= 10 else 30)


@pytest.mark.parametrize("geometry", [None, Geometry(eta=0, bias="scaled")])
def test_of_a_chain(geometry):
    """At the minimum H = a a' with a_i = y / w_i, and THT has y^2 everywhere."""
    weights, y = [2.0, -0.5, 3.0], -3.0
    objective = Objective(Chain(weights), chain_loss, [torch.full((1,), y).double()])
    expected = 3 * y**2 if geometry else sum((y / w) ** 2 for w in weights)
    assert trace(hessian(objective, geometry=geometry)).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("matvecs", [31, 62, 90])
@pytest.mark.parametrize("eigenvalues", [DECAYING, FLAT])
def test_within_its_standard_error(eigenvalues, matvecs):
    found = trace(Matrix(with_spectrum(eigenvalues)), matvecs=matvecs, seed=1)
    assert 0 < abs(found.value - sum(eigenvalues)) < 4 * found.stderr


@pytest.mark.parametrize("matvecs", [6, 7, 8, 30, 100])
def test_takes_the_products_it_is_given(matvecs):
    operator = Matrix(with_spectrum(DECAYING))
    assert trace(operator, matvecs=matvecs).matvecs == operator.matvecs == matvecs


@pytest.mark.parametrize("eigenvalues", [DECAYING, FLAT])
def test_unbiased_with_an_honest_standard_error(eigenvalues):
    operator = Matrix(with_spectrum(eigenvalues))
    found = [trace(operator, matvecs=30, seed=seed) for seed in range(200)]
    values = torch.tensor([one.value for one in found]).double()
    stderr = torch.tensor([one.stderr for one in found]).double()
    assert abs(values.mean() - sum(eigenvalues)) < 4 * values.std() / math.sqrt(200)
    assert 1 / 1.5 < values.std() / stderr.mean() < 1.5


def test_beats_hutchinson_on_a_decaying_spectrum():
    matrix = with_spectrum(DECAYING)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (50, 80, 30), generator=generator).double() * 2 - 1
    plain = torch.einsum("rkn,kl,rln->rn", signs, matrix, signs).mean(1) - matrix.trace()
    ours = torch.tensor([trace(Matrix(matrix), seed=seed).value for seed in range(50)]) - matrix.trace()
    assert ours.square().mean().sqrt() < plain.square().mean().sqrt() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", [None, Geometry(eta=0, bias="scaled")])
def test_of_a_network(geometry, dtype):
    model = mlp(dtype=dtype)
    diagonal = dense_hessian(mlp(), loss_only, examples()).diag()
    if geometry is not None:
        diagonal = diagonal * torch.cat([p.detach().flatten() for p in mlp().parameters()]) ** 2
    operator = hessian(Objective(model, cross_entropy, [examples(dtype)]), geometry=geometry)
    found = trace(operator, matvecs=100)
    assert found.value == pytest.approx(diagonal.sum().item(), rel=1e-10 if dtype == torch.float64 else 1e-4)
    assert found.matvecs == 31
    few = trace(operator, matvecs=24)
    assert abs(few.value - diagonal.sum().item()) < 4 * few.stderr


def test_deterministic_by_seed():
    matrix = with_spectrum(FLAT)
    one, again, other = (trace(Matrix(matrix), seed=seed) for seed in (5, 5, 6))
    assert one == again != other


@pytest.mark.parametrize("matvecs", [5, 0, -6])
def test_refuses_too_few_products(matvecs):
    with pytest.raises(ValueError, match=f"matvecs must be an integer >= 6, got {matvecs}"):
        trace(Matrix(torch.eye(3)), matvecs=matvecs)


def test_refuses_a_fraction_of_a_product():
    with pytest.raises(TypeError, match="matvecs must be an integer >= 6, got float"):
        trace(Matrix(torch.eye(3)), matvecs=30.0)
