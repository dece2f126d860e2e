"""The quadratic through a few points of a function: where its maximum on a ball is."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .vectors import norm

BLOCK = 2**16  # elements of a row: thirteen rows of them stay in a core's cache
ROWS = 6  # offsets that are kept
MORE_ROWS, FEW = 24, 2**12  # of vectors of up to so many elements, where more of them cost little
SHORT = 100  # roundings that a direction's squared length must be above, or rounding has tilted the direction
# How far from symmetric the Hessian on a span may be, in units of its largest eigenvalue: rounding adds up from maximum
# to maximum, and changes of curvature show.
ASYMMETRY = 1e-3
EVEN = 1e-6  # share of the gradient in a rise below which neither of two opposite points counts as higher
NEWTON = 40  # steps at most; about five are taken


@dataclass(frozen=True)
class Point:
    """A point u, the function's value there and its gradient; all of them are vectors of one length."""

    u: Tensor
    value: float
    gradient: Tensor

    @cached_property
    def norm(self) -> float:
        """The 2-norm of the gradient; nan if there is a nan."""
        return norm(self.gradient)


@dataclass(frozen=True)
class Maximum:
    """The maximizer, the gradient there and its 2-norm, and how far along it the quadratic may rise.

    From the sphere that is inf.
    """

    u: Tensor
    gradient: Tensor
    norm: float
    reach: float


class Path:
    """The last points of an ascent, and where the quadratic through them has its maximum in a ball.

    With S a few offsets and Y = H S the differences of the gradients there, a quadratic is known exactly on the span of
    S: no product with H is needed. The rows of S are the newest point, from the origin, u = 0; the way from it to the
    last maximum; and ways by which earlier maxima were reached. While these are few, the span holds all points there
    were. Then the oldest gives its place to the way by which the last maximum was reached from the one before. Since
    the newest point lies uphill of the last maximum, the first two and that way are the three directions of conjugate
    gradients: inside the ball the next maximum is, but for rounding, the one over all gradients there were. Without it
    a flat way up among steep ways down would take hundreds of steps; the older ways make up for the sphere, where
    three directions are not enough. (Points themselves, close to each other, would be nearly parallel.)
    """

    def __init__(self, origin: Point) -> None:
        self._origin = origin
        # the gradient at the origin, then the rows of S and Y in turns: what is known is one matrix, and its products
        # with the rows of S are all that a quadratic needs
        self._most = MORE_ROWS if len(origin.u) <= FEW else ROWS  # rows of S
        self._rows = origin.u.new_zeros(1 + 2 * self._most, len(origin.u))
        self._rows[0] = origin.gradient
        self._offsets, self._changes = self._rows[1::2], self._rows[2::2]
        self._newest: Point | None = None
        self._earlier: Point | Maximum | None = None  # to which the second row of S leads from the newest point
        self._maximum: Maximum | None = None
        self._smooth: list[bool] = []
        self._symmetric = True  # whether H was, when the last maximum was computed
        self._known = 0  # rows of S there are
        self._ways = 0  # that were put into the rows from the third on, one after the other
        self._products = [[0.0] * self._most for _ in range(1 + 2 * self._most)]

    def restart(self, point: Point) -> None:
        """Forget all points but this one."""
        self._newest, self._maximum, self._smooth = None, None, []
        self.append(point)

    def append(self, point: Point) -> None:
        """Go on to a point."""
        before = self._newest or self._origin
        step = point.u - before.u
        # the trapezoid rule is exact for a quadratic; 2 % and rounding are allowed
        trapezoid = 0.5 * (float(torch.dot(step, before.gradient)) + float(torch.dot(step, point.gradient)))
        change = point.value - before.value
        rounding = 4 * torch.finfo(point.u.dtype).eps * abs(point.value)
        smooth = abs(change - trapezoid) <= 0.02 * abs(change) + rounding
        self._smooth.append(smooth)
        trusted = smooth and self._symmetric and self._maximum is not None
        if not trusted:
            self._ways = 0
        # without a maximum that can be trusted, the way back to the point before
        earlier = self._maximum if trusted else self._newest
        self._newest, self._earlier = point, earlier if self._is_smooth() else None
        self._known = min(2 + self._ways, self._most) if self._earlier else 1

    def _is_smooth(self) -> bool:
        """Whether the function was quadratic on the last two steps."""
        return all(self._smooth[-2:])

    def maximum(self, rho: float) -> Maximum | None:
        """The maximum in ``||u||_2 <= rho`` and the span, if the function has been quadratic all along the path."""
        self._maximum = self._in_span(rho)
        return self._maximum

    def _in_span(self, rho: float) -> Maximum | None:
        if not self._newest or not self._is_smooth():
            return None
        known = self._known
        table = self._multiplied(self._newest, known)
        if not all(map(math.isfinite, chain(*table))):  # rho is as large as float32 takes
            return None
        axes = _axes(table, SHORT * torch.finfo(self._rows.dtype).eps)
        if not axes:
            return None
        curvatures, slope, newest = axes.curvatures, axes.slope, axes.newest
        steepest = max(map(abs, curvatures))
        self._symmetric = axes.asymmetry <= ASYMMETRY * steepest
        coordinates = _trust_region(curvatures, slope, rho)
        if not any(coordinates):  # the origin is a critical point: where it falls least, a way up may be near
            coordinates[-1] = rho
        straight, bent = _inner(slope, coordinates), _inner(curvatures, [u * u for u in coordinates])
        if _inner(newest, coordinates) < 0 and abs(straight) < EVEN * abs(bent):  # it is as high on this side
            coordinates = [-u for u in coordinates]
        weights = [_inner(row, coordinates) for row in axes.ways]
        factors = self._rows.new_tensor(weights)
        gradient_there = torch.addmv(self._origin.gradient, self._changes[:known].T, factors)
        size = norm(gradient_there)
        reach = math.inf
        if steepest > 0 and math.hypot(*coordinates) < rho * (1 - 1e-6):
            reach = size / steepest
        there = self._offsets[:known].T @ factors
        if self._symmetric:
            self._go_on(weights)
        return Maximum(there, gradient_there, size, reach)

    def _go_on(self, weights: list[float]) -> None:
        """Have the way by which the maximum of these weights was reached among the rows of S and Y.

        It is what the maximum has beside a multiple of the last one, of which the newest point falls short by the
        second row. That row will do while no other has to go for it: the rest is in the span.
        """
        if self._known == 1:
            return
        newest, way, *earlier = weights
        self._ways += 1
        row = self._last_row()
        for rows in self._offsets, self._changes:
            rows[row] = rows[1] if self._known < self._most else rows[1:].T @ rows.new_tensor([way - newest, *earlier])

    def _last_row(self) -> int:
        """The row that was put among the ways last."""
        return 2 + (self._ways - 1) % (self._most - 2)

    def _multiplied(self, newest: Point, known: int) -> list[list[float]]:
        """The products of g and of the rows of S and Y, in turns, with those of S, where the newest point is put first.

        Of those with rows that are as they were, H being symmetric, none is taken anew. A block at a time, so that what
        is written is multiplied while it is in the cache.
        """
        new = [*range(min(known, 2)), *([self._last_row()] if known > 2 else [])]
        sums: Any = 0.0
        for start in range(0, self._rows.shape[1], BLOCK):
            rows = self._rows[: 1 + 2 * known, start : start + BLOCK]
            u, gradient = newest.u[start : start + BLOCK], newest.gradient[start : start + BLOCK]
            rows[1] = u
            torch.sub(gradient, rows[0], out=rows[2])
            if self._earlier:
                torch.sub(self._earlier.u[start : start + BLOCK], u, out=rows[3])
                torch.sub(self._earlier.gradient[start : start + BLOCK], gradient, out=rows[4])
            sums = sums + torch.stack([rows @ rows[1 + 2 * column] for column in new]).double()
        self._earlier = None
        products = self._products
        for column, values in zip(new, sums.tolist(), strict=True):
            for row, value in zip(products, values, strict=False):
                row[column] = value
        for old in set(range(known)) - set(new):
            for column in new:
                for first in 1, 2:  # of S, of Y
                    products[first + 2 * column][old] = products[first + 2 * old][column]
        return [row[:known] for row in products[: 1 + 2 * known]]


def _inner(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class _Axes:
    """The orthonormal axes of a quadratic on the span of S.

    Attributes:
        ways: of how much of each row of S each axis is made, a list for each row.
        curvatures: the eigenvalues of H on the span, rising.
        asymmetry: how far H is from symmetric there.
        slope, newest: the gradient at the origin and the newest point along the axes.
    """

    ways: list[list[float]]
    curvatures: list[float]
    asymmetry: float
    slope: list[float]
    newest: list[float]


def _axes(products: list[list[float]], shortest: float) -> _Axes | None:
    """The axes from the products of g and of the rows of S and Y, in turns, with those of S; None if all S is 0.

    Directions whose squared length is not above ``shortest`` times the largest are left out. Little is done by
    operations of torch: between two passes, which have filled the caches, each takes a while.
    """
    known = len(products[0])
    lengths = [products[1 + 2 * i][i] for i in range(known)]  # squared
    units = [length**-0.5 if length > 0 else 0.0 for length in lengths]
    g, *rows = ([value * unit for value, unit in zip(row, units, strict=True)] for row in products)
    gram, changes = (
        [[value * unit for value in row] for row, unit in zip(part, units, strict=True)]
        for part in (rows[::2], rows[1::2])
    )
    small = torch.tensor([*gram, *changes, g, rows[0]], dtype=torch.float64, device="cpu")
    squares, vectors = torch.linalg.eigh(small[:known])
    values = squares.tolist()
    first = sum(square <= shortest * values[-1] for square in values)
    if first == known:
        return None
    basis = vectors[:, first:] * squares[first:].rsqrt()
    seen = small[known:] @ basis
    hessian = basis.T @ seen[:known]
    twice, turns = torch.linalg.eigh(hessian + hessian.T)
    entries = hessian.tolist()
    slope, newest = (seen[known:] @ turns).tolist()
    return _Axes(
        ways=[[value * unit for value in row] for row, unit in zip((basis @ turns).tolist(), units, strict=True)],
        curvatures=[value / 2 for value in twice.tolist()],
        asymmetry=max(abs(entries[i][j] - entries[j][i]) for i in range(len(entries)) for j in range(i + 1)),
        slope=slope,
        newest=newest,
    )


def _trust_region(values: list[float], g: list[float], rho: float) -> list[float]:
    """The maximizer of ``g'u + u'Hu/2`` on ``||u||_2 <= rho``, for a diagonal H whose ``values`` rise.

    It is ``(mu I - H)^-1 g`` with mu at least the largest eigenvalue and 0. Where that has a norm of rho is found by
    Newton's method on 1 / norm, which is concave in mu: from the left it comes close quickly and never goes beyond.
    """
    top = values[-1]

    def at(mu: float) -> list[float]:
        return [part / (mu - value) if mu > value else 0.0 for part, value in zip(g, values, strict=True)]

    if top < 0 and math.hypot(*at(0.0)) <= rho:
        return at(0.0)
    mu = max(0.0, *(value + abs(part) / rho for part, value in zip(g, values, strict=True)))  # one part alone is rho
    for _ in range(NEWTON):
        u = at(mu)
        norm = math.hypot(*u)
        slope = sum(part**2 / (mu - value) for part, value in zip(u, values, strict=True) if part)
        if norm <= rho * (1 + 1e-12) or slope == 0:  # squares of tiny numbers are 0
            break
        mu += norm**2 / slope * (norm - rho) / rho
    rest = math.hypot(*u[:-1])
    if top > 0 and rest < rho:  # mu - top was rounded, or no gradient along the top eigenvector fills the ball
        u[-1] = math.copysign(math.sqrt(rho**2 - rest**2), g[-1])
    elif norm > rho:
        u = [part * rho / norm for part in u]
    return u
