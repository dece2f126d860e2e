"""The quadratic through a few points of a function: where its maximum on a ball is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """A point u, the function's value there and its gradient; all of them are vectors of one length."""

    u: Tensor
    value: float
    gradient: Tensor


def is_quadratic(a: Point, b: Point) -> bool:
    """Whether the function is a quadratic between two points, within 2 % and rounding.

    The trapezoid rule is exact for one.
    """
    change = a.value - b.value
    trapezoid = 0.5 * float((a.gradient + b.gradient) @ (a.u - b.u))
    rounding = 4 * torch.finfo(a.u.dtype).eps * abs(a.value)
    return abs(change - trapezoid) <= 0.02 * abs(change) + rounding


@dataclass(frozen=True)
class Maximum:
    """The maximizer, the gradient there, and how far along it the quadratic may rise (inf from the sphere)."""

    u: Tensor
    gradient: Tensor
    reach: float


def maximum(points: Sequence[Point], origin: Point, rho: float) -> Maximum | None:
    """The maximum of the quadratic in the ball ``||u||_2 <= rho`` of the span of the points.

    With S the points (as offsets from the origin, u = 0) and Y = H S the differences of their gradients, the function
    on the span of S is known exactly: no product with H is needed. None if the points span nothing.
    """
    # differences of consecutive points: close points as they are would be nearly parallel
    u = [point.u for point in points]
    g = [point.gradient for point in points]
    offsets = torch.stack([u[0], *(a - b for a, b in pairwise(u))])
    changes = torch.stack([g[0] - origin.gradient, *(a - b for a, b in pairwise(g))])
    lengths = offsets.norm(dim=1, keepdim=True)
    held = lengths[:, 0] > 0
    if not held.any():
        return None
    offsets, changes = offsets[held] / lengths[held], changes[held] / lengths[held]
    # an orthonormal basis of the span, without the directions that rounding has made
    squares, vectors = torch.linalg.eigh((offsets @ offsets.T).double())
    kept = squares > 100 * torch.finfo(offsets.dtype).eps * squares[-1]
    basis = vectors[:, kept] / squares[kept].sqrt()
    hessian = basis.T @ (offsets @ changes.T).double() @ basis
    hessian = (hessian + hessian.T) / 2
    coordinates = _trust_region(hessian, basis.T @ (offsets @ origin.gradient).double(), rho)
    weights = (basis @ coordinates).to(offsets)
    u_max, gradient = weights @ offsets, origin.gradient + weights @ changes
    reach = math.inf
    if coordinates.norm() < rho * (1 - 1e-6):
        reach = float(gradient.norm() / torch.linalg.eigvalsh(hessian).abs().max())
    return Maximum(u_max, gradient, reach)


def _trust_region(hessian: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """The maximizer of ``g'u + u'Hu/2`` on ``||u||_2 <= rho``, for a small matrix.

    It is ``(mu I - H)^-1 g`` with mu at least the largest eigenvalue and 0; mu is found by bisection on the norm.
    """
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient
    top = float(values[-1])
    if top < 0 and (g / values).norm() <= rho:
        inside: Tensor = vectors @ (-g / values)
        return inside

    def at(mu: float) -> Tensor:
        return torch.where(mu > values, g / (mu - values).clamp(min=1e-300), 0.0)

    low = max(top, 0.0)
    high = low + float(g.norm()) / rho
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).norm() > rho else (low, middle)
    u = at(high)
    missing = rho**2 - float(u.norm()) ** 2
    if top > 0 and missing > 0:  # the gradient has no part along the top eigenvector: fill the ball up with it
        u[-1] = math.copysign(math.sqrt(missing + float(u[-1]) ** 2), float(g[-1]))
    on_sphere: Tensor = vectors @ u
    return on_sphere
