"""Lanczos: the top eigenvalues of a symmetric operator, and the density of its spectrum.

Lanczos builds an orthonormal basis V of the space spanned by v, Av, A^2 v, ... in which A is a tridiagonal matrix
T = V'AV. The extreme eigenvalues of T converge to those of A first. Every new vector is orthogonalized against all
earlier ones, twice: without it the eigenvalues found come in false copies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..norms import vector_norm
from .draws import generator_of
from .vectors import inner, norm


class NotFinite(ValueError):  # noqa: N818
    """A product of an operator is not finite."""


class Operator(Protocol):
    """A symmetric operator on vectors."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector (k,) or with every column of a matrix (k, n)."""


def check_operator(operator: object) -> None:
    """Raise if it has no products."""
    if not hasattr(operator, "matvec"):
        raise TypeError(f"operator must have a matvec, such as hessian(objective), got {type(operator).__name__}")


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues.

    Attributes:
        values: in float64, the largest (not the largest in magnitude) first.
        vectors: their eigenvectors, one a row, shape (number, k).
        residuals: ``||A v - value v||``: up to rounding, an eigenvalue of A is no further from the value than this.
        converged: every residual is at most ``tol`` times the largest magnitude of an eigenvalue found.
        matvecs: products taken.

    Example:
        >>> from asam.measure import Objective, hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> found = top_eigenvalues(hessian(objective))  # H = 2 x x'
        >>> found.vectors.shape, found.converged, found.matvecs
        (torch.Size([1, 2]), True, 2)
    """

    values: Tensor
    vectors: Tensor = field(repr=False, compare=False)
    residuals: Tensor = field(compare=False)
    converged: bool
    matvecs: int


@dataclass(frozen=True)
class SpectralDensity:
    """The density of the eigenvalues: ``nodes`` carry the ``weights``, which sum to 1.

    Attributes:
        nodes, weights: Gauss quadrature, so that ``sum(weights * f(nodes))`` estimates ``tr f(A) / k``.
        grid, density: the same smoothed with Gaussians of standard deviation ``sigma``; it integrates to 1.

    Example:
        >>> from asam.measure import Objective, hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> density = spectral_density(hessian(objective), draws=1)  # the eigenvalues are 0 and 10
        >>> [abs(round(node, 4)) for node in density.nodes.tolist()], density.grid.shape == density.density.shape
        ([0.0, 10.0], True)
    """

    nodes: Tensor = field(repr=False, compare=False)
    weights: Tensor = field(repr=False, compare=False)
    grid: Tensor = field(repr=False, compare=False)
    density: Tensor = field(repr=False, compare=False)
    sigma: float
    matvecs: int


def top_eigenvalues(
    operator: Operator, k: int = 1, *, tol: float = 1e-4, max_matvecs: int = 100, seed: int = 0
) -> Eigenvalues:
    """The k largest eigenvalues of a symmetric operator, by Lanczos from a random vector.

    An eigenvalue that occurs several times is found several times only where rounding, or an exhausted Krylov space,
    lets its copies in.

    Args:
        operator: such as `hessian(objective)`.
        k: how many; all of them if the operator has fewer.
        tol: the residuals to reach, relative to the largest magnitude of an eigenvalue.
        max_matvecs: the products to stop after, converged or not; at least k.
        seed: of the first vector.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or a product is not finite.

    Example:
        >>> from asam.measure import Objective, hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> found = top_eigenvalues(hessian(objective))
        >>> [round(value, 4) for value in found.values.tolist()], found.converged  # 2 ||x||^2
        ([10.0], True)
    """
    check_operator(operator)
    check_count("k", k, 1)
    k = min(k, operator.shape[0])
    check_count("max_matvecs", max_matvecs, k)
    check_number("tol", tol, "a number >= 0", lambda tol: tol >= 0)
    vectors: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    for vector, alpha, beta in _lanczos(operator, seed):
        vectors.append(vector)
        alphas.append(alpha)
        betas.append(beta)
        if len(vectors) < k:
            continue
        values, coordinates = torch.linalg.eigh(_tridiagonal(alphas, betas))
        residuals = abs(beta) * coordinates[-1].abs()
        values, residuals, coordinates = values.flip(0), residuals.flip(0), coordinates.flip(1)
        converged = bool((residuals[:k] <= tol * values.abs().max()).all())
        if converged or len(vectors) >= max_matvecs:
            break
    found = (coordinates[:, :k].T.to(operator.device) @ torch.stack(vectors).double()).to(operator.dtype)
    return Eigenvalues(values[:k], found, residuals[:k], converged, len(vectors))


def spectral_density(
    operator: Operator,
    *,
    matvecs: int = 100,
    draws: int = 2,
    sigma: float | None = None,
    points: int = 1001,
    seed: int = 0,
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    Args:
        operator: such as `hessian(objective)`.
        matvecs: products in all, shared by the draws.
        draws: random vectors.
        sigma: width of the smoothing; None: 1 % of the range of the nodes.
        points: of the grid, which covers the nodes and four sigma beyond.
        seed: of the random vectors.

    Raises:
        ValueError, TypeError: an argument is not one of the above, a product is not finite, or sigma is below the
            spacing of the grid.

    Source: Ghorbani et al., 2019, arXiv:1901.10159.

    Example:
        >>> from asam.measure import Objective, hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> density = spectral_density(hessian(objective), draws=1)
        >>> round(float(density.nodes.max()), 4), round(float(density.weights.sum()), 4)
        (10.0, 1.0)
    """
    check_operator(operator)
    check_count("draws", draws, 1)
    check_count("matvecs", matvecs, draws)
    check_count("points", points, 2)
    if sigma is not None:
        check_number("sigma", sigma, "a finite number > 0", lambda sigma: 0 < sigma < math.inf)
    nodes, weights, used = [], [], 0
    for draw in range(draws):
        alphas, betas = [], []
        for _, alpha, beta in _lanczos(operator, seed, draw):
            alphas.append(alpha)
            betas.append(beta)
            if len(alphas) == matvecs // draws or beta == 0:
                break
        values, coordinates = torch.linalg.eigh(_tridiagonal(alphas, betas))
        nodes.append(values)
        weights.append(coordinates[0].square() / draws)
        used += len(alphas)
    node, weight = torch.cat(nodes), torch.cat(weights)
    low, high = float(node.min()), float(node.max())
    # nodes that differ by rounding only have no range
    width = sigma if sigma is not None else max(0.01 * (high - low), 1e-5 * max(-low, high)) or 1e-3
    if (high - low + 8 * width) / (points - 1) > width:
        raise ValueError(f"sigma = {width:.3g} is below the spacing of a grid of {points} points: take more points")
    grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64, device="cpu")
    bumps = torch.exp(-0.5 * ((grid[:, None] - node) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return SpectralDensity(node, weight, grid, bumps @ weight, width, used)


def _lanczos(operator: Operator, *seed: int) -> Iterator[tuple[Tensor, float, float]]:
    """The basis vectors with the diagonal and the next off-diagonal entry of the tridiagonal matrix.

    Where the Krylov space is exhausted the entry is 0 and the next vector a random one orthogonal to all earlier ones.
    """
    size = operator.shape[0]
    basis: list[Tensor] = []
    scale, index, vector = 0.0, 0, None
    while len(basis) < size:
        if vector is None:
            noise = torch.randn(size, generator=generator_of(*seed, index), dtype=torch.float32, device="cpu")
            start = noise.to(operator.device, operator.dtype)
            vector = _orthogonal(start / vector_norm(start), basis)
            vector = vector / vector_norm(vector)
            index += 1
        basis.append(vector)
        product = operator.matvec(vector)
        alpha = float(inner(product, vector))
        rest = _orthogonal(product, basis)
        beta = norm(rest)
        if not math.isfinite(alpha + beta):
            raise NotFinite("a product of the operator is not finite: it has no eigenvalues")
        scale = max(scale, abs(alpha), beta)
        exhausted = len(basis) == size or beta <= 100 * torch.finfo(operator.dtype).eps * scale
        yield vector, alpha, 0.0 if exhausted else beta
        vector = None if exhausted else rest / beta


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):
        for other in basis:
            vector = vector - inner(vector, other) * other
    return vector


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    diagonal = torch.tensor(alphas, dtype=torch.float64, device="cpu")
    beside = torch.tensor(betas[:-1], dtype=torch.float64, device="cpu")
    return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
