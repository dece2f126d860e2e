"""The quadratic through a few points of a function: where its maximum on a ball is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**16  # elements of a row: eight rows of them stay in a core's cache


@dataclass(frozen=True)
class Point:
    """A point u, the function's value there and its gradient; all of them are vectors of one length."""

    u: Tensor
    value: float
    gradient: Tensor


@dataclass(frozen=True)
class Maximum:
    """The maximizer, the gradient there, and how far along it the quadratic may rise (inf from the sphere)."""

    u: Tensor
    gradient: Tensor
    reach: float


class Path:
    """The last points of an ascent, and where the quadratic through them has its maximum in a ball.

    With S the points as offsets from the origin, u = 0, and Y = H S the differences of their gradients, a quadratic is
    known exactly on the span of S: no product with H is needed. The rows of S are the newest point and the steps that
    led to it, since points that are close to each other would be nearly parallel.
    """

    def __init__(self, origin: Point, length: int) -> None:
        self._origin = origin
        self._offsets = origin.u.new_empty(length, len(origin.u))
        self._changes = torch.empty_like(self._offsets)
        self._newest: Point | None = None
        self._smooth: list[bool] = []

    def restart(self, point: Point) -> None:
        """Forget all points but this one."""
        self._newest, self._smooth = None, []
        self.append(point)

    def append(self, point: Point) -> None:
        """Go on to a point, and forget the oldest."""
        before = self._newest or self._origin
        row = 1 + (len(self._smooth) - 1) % (len(self._offsets) - 1) if self._newest else 0
        self._take(point, before, row)
        # the trapezoid rule is exact for a quadratic; 2 % and rounding are allowed
        there = float(self._origin_products[row] + self._change_products[row, 0])
        trapezoid = there - 0.5 * float(self._change_products[row, row])
        change = point.value - before.value
        rounding = 4 * torch.finfo(point.u.dtype).eps * abs(point.value)
        self._smooth.append(abs(change - trapezoid) <= 0.02 * abs(change) + rounding)
        self._newest = point

    def _take(self, point: Point, before: Point, row: int) -> None:
        """Write the step to a point and the point itself into the rows, and take all products of the rows.

        A block at a time, so that what is written is multiplied while it is in the cache.
        """
        known = min(len(self._smooth) + 1, len(self._offsets))
        small = torch.zeros(known, known, dtype=torch.float64, device=point.u.device)
        self._products, self._change_products, self._origin_products = small, small.clone(), small[0].clone()
        for start in range(0, len(point.u), BLOCK):
            block = slice(start, start + BLOCK)
            offsets, changes = self._offsets[:known, block], self._changes[:known, block]
            torch.sub(point.u[block], before.u[block], out=offsets[row])
            torch.sub(point.gradient[block], before.gradient[block], out=changes[row])
            if row > 0:
                offsets[0] = point.u[block]
                torch.sub(point.gradient[block], self._origin.gradient[block], out=changes[0])
            self._products += offsets @ offsets.T
            self._change_products += offsets @ changes.T
            self._origin_products += offsets @ self._origin.gradient[block]

    def maximum(self, rho: float) -> Maximum | None:
        """The maximum in ``||u||_2 <= rho`` and the span, if the function has been quadratic all along the path."""
        if not self._smooth or not all(self._smooth[-len(self._offsets) :]):
            return None
        known = len(self._products)
        offsets, changes = self._offsets[:known], self._changes[:known]
        lengths = self._products.diagonal().sqrt()
        held = lengths > 0
        if not held.any():
            return None
        lengths = lengths[held]
        scale = lengths.outer(lengths)
        # an orthonormal basis of the span, without directions so short that rounding would tilt them
        squares, vectors = torch.linalg.eigh(self._products[held][:, held] / scale)
        kept = squares > 1e4 * torch.finfo(offsets.dtype).eps * squares[-1]
        basis = vectors[:, kept] / squares[kept].sqrt()
        hessian = basis.T @ (self._change_products[held][:, held] / scale) @ basis
        hessian = (hessian + hessian.T) / 2
        gradient = basis.T @ (self._origin_products[held] / lengths)
        coordinates = _trust_region(hessian, gradient, rho)
        weights = torch.zeros(len(offsets), dtype=torch.float64, device=offsets.device)
        weights[held] = (basis @ coordinates) / lengths
        weights = weights.to(offsets)
        gradient_there = torch.addmv(self._origin.gradient, changes.T, weights)
        reach = math.inf
        if coordinates.norm() < rho * (1 - 1e-6):
            reach = float(gradient_there.norm() / torch.linalg.eigvalsh(hessian).abs().max())
        return Maximum(offsets.T @ weights, gradient_there, reach)


def _trust_region(hessian: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """The maximizer of ``g'u + u'Hu/2`` on ``||u||_2 <= rho``, for a small matrix.

    It is ``(mu I - H)^-1 g`` with mu at least the largest eigenvalue and 0; mu is found by bisection on the norm.
    """
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    values: list[float] = eigenvalues.tolist()
    g: list[float] = (vectors.T @ gradient).tolist()
    top = values[-1]

    def at(mu: float) -> list[float]:
        return [part / (mu - value) if mu > value else 0.0 for part, value in zip(g, values, strict=True)]

    if top < 0 and math.hypot(*at(0.0)) <= rho:
        u = at(0.0)
    else:
        low = max(top, 0.0)
        high = low + math.hypot(*g) / rho
        for _ in range(40):  # to 1e-12 of the range
            middle = (low + high) / 2
            low, high = (middle, high) if math.hypot(*at(middle)) > rho else (low, middle)
        u = at(high)
        norm = math.hypot(*u)
        if norm > rho:  # mu - top was rounded: the gradient is next to nothing
            u = [part * rho / norm for part in u]
        elif top > 0:  # the gradient has no part along the top eigenvector: fill the ball up with it
            u[-1] = math.copysign(math.sqrt(rho**2 - norm**2 + u[-1] ** 2), g[-1])
    maximizer: Tensor = vectors @ vectors.new_tensor(u)
    return maximizer
