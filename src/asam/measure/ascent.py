"""The worst loss in a ball, by projected gradient ascent in u = T^-1 e.

In u the ellipsoid of the perturbations is a ball: projecting is exact, and nothing is divided by a weight that may
be 0. The ascent is Auto-PGD (Croce and Hein, 2020, arXiv:2003.01690): steps of length 2 rho, halved at checkpoints
when too few of them improved, with a momentum of 0.75, and the best point kept. Two things are added, because sharpness
is taken at minima, where Auto-PGD is slow: while the function is quadratic along the path, which its values and
gradients show, momentum and halving are replaced by the exact maximum over conjugate directions; and where the gradient
hardly counts, the mirrored point is tried once, since a quadratic has its maxima in pairs and only one is the higher
one. A box has corners from which no step leads on: an ascent ends in the first one that is its best point.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms import safe_norm, vector_norm
from ..projection import nearest_in_ball
from .quadratic import Maximum, Path, Point
from .vectors import largest_magnitude, norm, plus

MOMENTUM = 0.75
SUCCESS = 0.75
NOISE = 3e-2
ROUNDING = 1e-6  # in units of rho: a way so short is none


@dataclass(frozen=True)
class Ascent:
    """The best point found, the rise of the function there, and the best rise after 0, 1, ... steps.

    The rise is nan where the function is a number nowhere but at the origin.
    """

    u: Tensor
    rise: float
    history: tuple[float, ...]


def steepest(gradient: Tensor, p: float) -> Tensor:
    """The vector of p-norm 1 along which a linear function rises most; 0 for a zero gradient."""
    if p == math.inf:
        return gradient.sign()
    largest = largest_magnitude(gradient)
    if not largest > 0:
        return torch.zeros_like(gradient)
    g = gradient / largest  # powers of small numbers underflow
    direction: Tensor = g.sign() * (g.abs() / vector_norm(g, p / (p - 1))) ** (1 / (p - 1))
    return direction


def climbed(u: Tensor, point: Point | Maximum, p: float, length: float) -> Tensor:
    """Go so far from u along the gradient of a point, or along its signs in a box.

    The projection is Euclidean: in a ball of another p the steepest direction would lead past the maximum.
    """
    if p == math.inf:
        return torch.add(u, point.gradient.sign(), alpha=length)
    return plus(u, point.gradient, point.norm, length)


def project_(u: Tensor, p: float, rho: float) -> Tensor:
    """The nearest point of the ball; u is written over: an allocation costs more than the arithmetic."""
    if p == math.inf:
        return u.clamp_(-rho, rho)
    if p == 2:
        size = norm(u)
        return u.mul_(rho / size) if size > rho else u
    return nearest_in_ball(u, p, rho)


def onto_sphere_(u: Tensor, p: float, rho: float) -> Tensor:
    """Stretched or shrunk to the p-norm ``rho``, in a box cut off; u is written over."""
    if p == math.inf:
        return u.clamp_(-rho, rho)
    size = float(safe_norm(u, p))
    return u.mul_(rho / size) if size else u  # so small that it has become 0


def random_on_sphere(movable: Tensor, p: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random vector of p-norm 1, which is 0 where ``movable`` is False."""
    z = torch.randn(movable.shape, generator=generator, dtype=torch.float32, device="cpu").to(movable.device, dtype)
    z = z.where(movable, 0)
    return z / safe_norm(z, p).clamp(min=1e-30)


def ascend(
    evaluate: Callable[[Tensor, bool], Point],
    origin: Point,
    movable: Tensor,
    *,
    p: float,
    rho: float,
    steps: int,
    generator: torch.Generator,
    random_start: bool,
) -> Ascent:
    """Climb from ``origin``, the point u = 0, or from a random point, with ``steps`` calls of ``evaluate``.

    ``evaluate(u, gradient)`` gives the point at u; the last one is asked for without its gradient. What ``movable``, a
    boolean vector, holds fixed stays 0. In a corner of a box it ends earlier: then the history is shorter.
    """
    here = best = origin
    previous = origin.u
    path = Path(origin) if p == 2 else None
    history = [0.0]
    length = 2 * rho
    checkpoints = _checkpoints(steps)
    improved, since, best_then, halved = 0, 0, best.value, True
    numbers = 0

    def random() -> Tensor:
        return rho * random_on_sphere(movable, p, generator, origin.u.dtype)

    def uphill() -> Tensor:
        return project_(climbed(here.u, here, p, length), p, rho)

    for step in range(1, steps + 1):
        mirrored = step == steps // 2 + 1 and _is_even(best, origin)
        guess = path.maximum(rho) if path else None
        if mirrored:
            u = -best.u
        elif (step == 1 and random_start) or not here.norm > 0:
            u = random()
        elif step == 1:
            # a little noise: the gradient may miss the direction of the largest curvature altogether
            u = onto_sphere_(steepest(origin.gradient, p).mul_(2 * rho).add_(random(), alpha=NOISE), p, rho)
        elif guess is not None and guess.norm > 0:
            u = guess.u if step == steps else climbed(guess.u, guess, p, min(length, guess.reach))
            u = project_(u, p, rho)
        else:
            target = uphill()
            while p == math.inf and largest_magnitude(target - here.u) <= ROUNDING * rho:  # in a corner
                if here is best:
                    return Ascent(best.u, history[-1], tuple(history))
                here, previous, length = best, best.u, length / 2
                target = uphill()
            momentum = target.mul_(MOMENTUM).add_(here.u, alpha=2 * (1 - MOMENTUM)).sub_(previous, alpha=1 - MOMENTUM)
            u = project_(momentum, p, rho)
        point = evaluate(u, step < steps)
        if point.value == math.inf:  # no worse point is to be found
            return Ascent(u, math.inf, (*history, *[math.inf] * (steps - step + 1)))
        numbers += not math.isnan(point.value)
        if math.isnan(point.value) or (step < steps and not math.isfinite(point.norm)):
            point = best
        improved += point.value > here.value
        if path and step < steps:
            path.append(point)
        previous, here = here.u, point
        if point.value > best.value:
            best = point
        history.append(best.value - origin.value)
        restart = mirrored and point is not best
        if step in checkpoints:
            few = improved < SUCCESS * (step - since) or (not halved and best_then >= best.value)
            halved = few and guess is None  # of a quadratic more is known than that, and a restart would forget it
            length = length / 2 if halved else length
            restart = restart or halved
            improved, since, best_then = 0, step, best.value
        if restart and step < steps and best.norm > 0:  # from a critical point no way would lead on
            here, previous = best, best.u
            if path:
                path.restart(best)
    if not numbers:
        return Ascent(origin.u, math.nan, (0.0, *[math.nan] * steps))
    return Ascent(best.u, history[-1], tuple(history))


def _is_even(best: Point, origin: Point) -> bool:
    """Whether the gradient at the origin makes up less than a tenth of the rise."""
    return best is not origin and abs(float(origin.gradient @ best.u)) < 0.1 * (best.value - origin.value)


def _checkpoints(steps: int) -> set[int]:
    """Where the step length is looked at: Auto-PGD's shares 0.22, 0.41, 0.57, ... of all steps."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}
