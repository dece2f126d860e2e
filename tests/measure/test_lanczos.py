"""The top of the spectrum and its density, against matrices whose spectrum is known."""

import pytest
import torch
from operators import Matrix, cross_entropy, dense_hessian, examples, loss_only, mlp, with_spectrum
from scipy.sparse.linalg import eigsh

from asam import Geometry
from asam.measure import Objective, hessian, spectral_density, top_eigenvalues

DECAYING = [10 * 0.8**i for i in range(60)]
SPECTRA = {
    "decaying": DECAYING,
    "indefinite": [5, 3, 2, 1, 0.5, *[-0.1 * i for i in range(40)], -20],
    "negative": [-0.5 - 0.3 * i for i in range(40)],
    "wide": [1e6, 1e3, 1, *[1e-3] * 20],
    "tiny": [1e-12 * 0.5**i for i in range(12)],
}


def exact(matrix):
    return torch.linalg.eigvalsh(matrix).flip(0)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_matches_a_dense_solver(name, k):
    matrix = with_spectrum(SPECTRA[name])
    operator = Matrix(matrix)
    found = top_eigenvalues(operator, k, tol=1e-8)
    assert found.converged
    assert found.matvecs == operator.matvecs <= 100
    assert found.values.dtype == torch.float64
    size = matrix.abs().max().item()
    torch.testing.assert_close(found.values, exact(matrix)[:k], rtol=1e-6, atol=1e-12 * size)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k).double(), rtol=0, atol=1e-12)
    residuals = (matrix @ found.vectors.T - found.vectors.T * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-13 * exact(matrix).abs().max().item())


@pytest.mark.parametrize("geometry", [None, Geometry(eta=0, bias="scaled")])
@pytest.mark.parametrize("k", [1, 3])
def test_of_a_network(k, geometry):
    objective = Objective(mlp(), cross_entropy, [examples()])
    matrix = dense_hessian(mlp(), loss_only, examples())
    if geometry is not None:
        scales = torch.cat([p.detach().abs().flatten() for p in objective.params.values()])
        matrix = scales[:, None] * matrix * scales
    operator = hessian(objective, geometry=geometry)
    found = top_eigenvalues(operator, k, tol=1e-7)
    assert found.converged
    torch.testing.assert_close(found.values, exact(matrix)[:k], rtol=1e-6, atol=0)
    scipy = torch.from_numpy(eigsh(operator.as_scipy(), k=k, which="LA", return_eigenvectors=False))
    torch.testing.assert_close(found.values, scipy.sort(descending=True).values, rtol=1e-6, atol=0)


class RankOne:
    """The matrix ``c c'`` of a vector c."""

    def __init__(self, c):
        self.c, self.shape, self.dtype, self.device = c, (len(c), len(c)), c.dtype, c.device

    def matvec(self, vector):
        return self.c * (self.c.double() @ vector.double()).float()


def test_millions_of_rows_in_float32():
    # torch's norm of so many is off by 2e-4, and an eigenvalue by twice that
    c = torch.rand(8_000_000, generator=torch.Generator().manual_seed(0))
    found = top_eigenvalues(RankOne(c), 1, max_matvecs=4)
    assert found.values.item() == pytest.approx(c.double().square().sum().item(), rel=2e-5)


def test_residuals_before_convergence_are_true():
    matrix = with_spectrum(DECAYING)
    found = top_eigenvalues(Matrix(matrix), 3, tol=1e-12, max_matvecs=8)
    assert not found.converged
    assert found.matvecs == 8
    assert found.residuals.min() > 1e-3
    residuals = (matrix @ found.vectors.T - found.vectors.T * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-9, atol=0)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (exact(matrix) - value).abs().min() <= residual


@pytest.mark.parametrize(
    ("matrix", "k"),
    [
        (torch.eye(7).double(), 3),
        (torch.zeros(5, 5).double(), 2),
        (3 * torch.ones(6, 6).double(), 6),
        (torch.tensor([[-4.0]]).double(), 1),
        (torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), 5),
        (with_spectrum([4, 2, 2, 2, 2, 2, 2, -1]), 8),
        (with_spectrum([2, 2, 2, 2, 2, 0, 0, 0]), 8),
        (with_spectrum([5, 0, 0, 0, -5, -5]), 6),
    ],
    ids=["identity", "zero", "rank-one", "1x1", "k-larger", "block", "projection", "mixed"],
)
def test_multiplicities(matrix, k):
    """Where the Krylov space is exhausted the search goes on from a new vector."""
    found = top_eigenvalues(Matrix(matrix), k)
    k = min(k, len(matrix))
    assert found.converged
    assert found.matvecs <= len(matrix)
    torch.testing.assert_close(found.values, exact(matrix)[:k], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ found.vectors.T, found.vectors.T * found.values, rtol=0, atol=1e-10)


def test_an_eigenvalue_comes_once_from_one_krylov_space():
    """False copies, which rounding lets in without full reorthogonalization, would fill the list."""
    values = [100, 50, 25, *[0.01 * i for i in range(200)]]
    found = top_eigenvalues(Matrix(with_spectrum(values)), 3, tol=1e-14, max_matvecs=60)
    torch.testing.assert_close(found.values, torch.tensor([100.0, 50.0, 25.0]).double(), rtol=1e-12, atol=0)


def test_single_precision():
    matrix = with_spectrum(DECAYING).float()
    found = top_eigenvalues(Matrix(matrix), 3, tol=1e-5)
    assert found.converged
    assert found.vectors.dtype == torch.float32
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, torch.tensor(DECAYING[:3]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-22, 1e22, 1e36])
def test_products_whose_squares_are_no_numbers_of_their_precision(size):
    matrix = with_spectrum([-0.1, 0, 0.3, 0.5, 0.8, 1])
    operator = Matrix((size * matrix).float())
    found = top_eigenvalues(operator, 2, tol=1e-6)
    assert found.converged
    assert found.matvecs > 2
    torch.testing.assert_close(found.values / size, exact(matrix)[:2], rtol=1e-5, atol=0)
    density = spectral_density(operator, draws=1)
    torch.testing.assert_close(density.nodes.sort(descending=True).values / size, exact(matrix), rtol=1e-5, atol=1e-6)


def test_deterministic_by_seed():
    matrix = with_spectrum(DECAYING)
    one, again, other = (top_eigenvalues(Matrix(matrix), max_matvecs=5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.values, again.values)
    assert torch.equal(one.vectors, again.vectors)
    assert not torch.equal(one.values, other.values)


@pytest.mark.parametrize("argument", ["k", "max_matvecs"])
def test_refuses_counts_below_one(argument):
    with pytest.raises(ValueError, match=f"{argument} must be an integer >= 1, got 0"):
        top_eigenvalues(Matrix(torch.eye(2)), **{argument: 0})


def test_density_of_a_full_krylov_space_is_exact():
    """With a node at every eigenvalue the rule integrates to what the random vector sees: v'f(A)v."""
    values = [-3.0, -1.0, 0.0, 2.0, 7.0]
    density = spectral_density(Matrix(with_spectrum(values)), matvecs=50, draws=1)
    torch.testing.assert_close(density.nodes.sort().values, torch.tensor(values).double(), rtol=0, atol=1e-12)
    assert density.matvecs == 5
    assert density.weights.sum().item() == pytest.approx(1, abs=1e-14)


def test_density_of_an_isotropic_matrix_is_one_node():
    density = spectral_density(Matrix(2.5 * torch.eye(50).double()), draws=3)
    torch.testing.assert_close(density.nodes, torch.full((3,), 2.5, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(density.weights, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-14, atol=0)
    assert density.matvecs == 3


def test_density_has_the_moments_of_the_spectrum():
    """Each power's mean under the nodes is that of the eigenvalues, within the error of the random vectors."""
    matrix = with_spectrum(torch.linspace(-2, 3, 100).tolist())
    density = spectral_density(Matrix(matrix), matvecs=800, draws=80)
    assert density.matvecs == len(density.nodes.unique()) == 800
    assert density.weights.sum().item() == pytest.approx(1, abs=1e-12)
    for power in (1, 2, 3):
        values = exact(matrix) ** power
        # the variance of v'Av for a unit normal vector, 2 / (k + 2) of that of the eigenvalues, over the draws
        stderr = (2 * values.var(correction=0) / 102 / 80).sqrt().item()
        assert abs((density.weights * density.nodes**power).sum() - values.mean()) < 4 * stderr


@pytest.mark.parametrize("sigma", [None, 0.25])
@pytest.mark.parametrize(
    "matrix",
    [with_spectrum(DECAYING), torch.zeros(4, 4).double(), -3 * torch.eye(4).double(), with_spectrum([-0.7] * 50)],
    ids=["decaying", "zero", "isotropic", "isotropic-but-for-rounding"],
)
def test_density_integrates_to_one(matrix, sigma):
    density = spectral_density(Matrix(matrix), sigma=sigma, points=801)
    assert len(density.grid) == len(density.density) == 801
    width = 0.01 * (density.nodes.max() - density.nodes.min()).item()
    assert density.sigma == sigma or (sigma is None and (density.sigma == width or width < 1e-12))
    assert density.density.isfinite().all()
    assert density.grid[0].item() == pytest.approx(density.nodes.min().item() - 4 * density.sigma)
    assert density.grid[-1].item() == pytest.approx(density.nodes.max().item() + 4 * density.sigma)
    # a normal distribution has 6.3e-5 of its mass beyond four standard deviations
    assert torch.trapezoid(density.density, density.grid).item() == pytest.approx(1, abs=1e-4)


def test_density_is_a_sum_of_gaussians():
    density = spectral_density(Matrix(with_spectrum([0.0, 4.0])), sigma=0.5, draws=1)
    normals = torch.distributions.Normal(density.nodes, 0.5)
    expected = (normals.log_prob(density.grid[:, None]).exp() * density.weights).sum(1)
    torch.testing.assert_close(density.density, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws must be an integer >= 1, got 0"),
        ({"draws": 3, "matvecs": 2}, "matvecs must be an integer >= 3, got 2"),
        ({"points": 1}, "points must be an integer >= 2, got 1"),
        ({"sigma": 0.0}, "sigma must be a finite number > 0, got 0.0"),
        ({"sigma": -0.5}, "sigma must be a finite number > 0, got -0.5"),
    ],
)
def test_density_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(Matrix(torch.eye(2)), **arguments)
