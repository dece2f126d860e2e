"""The worst loss in a ball, by projected gradient ascent in u = T^-1 e.

In u the ellipsoid of the perturbations is a ball: projecting is exact, and nothing is divided by a weight that may
be 0. The ascent is Auto-PGD (Croce and Hein, 2020, arXiv:2003.01690): steps of length 2 rho, halved at checkpoints
when too few of them improved, with a momentum of 0.75, and the best point kept. Two things are added, because sharpness
is taken at minima, where Auto-PGD is slow: while the function is quadratic along the path, which its values and
gradients show, the momentum is replaced by the exact maximum over the last points; and where the gradient hardly
counts, the mirrored point is tried once, since a quadratic has its maxima in pairs and only one is the higher one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..projection import nearest_in_ball
from .quadratic import Path, Point, largest_magnitude

MOMENTUM = 0.75
SUCCESS = 0.75
WINDOW = 4
NOISE = 1e-3


@dataclass(frozen=True)
class Ascent:
    """The best point found, the rise of the function there, and the best rise after 0, 1, ... steps.

    The rise is nan where the function is a number nowhere but at the origin.
    """

    u: Tensor
    rise: float
    history: tuple[float, ...]


def steepest(gradient: Tensor, p: float, largest: float) -> Tensor:
    """The vector of p-norm 1 along which a linear function rises most; 0 for a zero gradient.

    Scaled by the ``largest`` magnitude first: squares of small numbers underflow.
    """
    if p == math.inf:
        return gradient.sign()
    if not largest > 0:
        return torch.zeros_like(gradient)
    g = gradient / largest
    if p == 2:
        return g.div_(torch.linalg.vector_norm(g))
    q = p / (p - 1)
    direction: Tensor = g.sign() * (g.abs() / torch.linalg.vector_norm(g, q)) ** (q - 1)
    return direction


def project_(u: Tensor, p: float, rho: float) -> Tensor:
    """The nearest point of the ball; u is written over: an allocation costs more than the arithmetic."""
    if p == math.inf:
        return u.clamp_(-rho, rho)
    if p == 2:
        norm = float(torch.linalg.vector_norm(u))
        return u.mul_(rho / norm) if norm > rho else u
    return nearest_in_ball(u, p, rho)


def random_on_sphere(movable: Tensor, p: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random vector of p-norm 1, which is 0 where ``movable`` is False."""
    z = torch.randn(movable.shape, generator=generator, dtype=torch.float32).to(movable.device, dtype).where(movable, 0)
    norm: Tensor = torch.linalg.vector_norm(z, p)
    return z / norm.clamp(min=1e-30)


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
    boolean vector, holds fixed stays 0.
    """
    # the projection is Euclidean: another p-norm's steepest direction would lead past the maximum, but for the box
    metric = p if p == math.inf else 2
    here = best = origin
    previous = origin.u
    path = Path(origin, WINDOW) if p == 2 else None
    history = [0.0]
    length = 2 * rho
    checkpoints = _checkpoints(steps)
    improved, since, best_then, halved = 0, 0, best.value, True
    numbers = 0

    def random() -> Tensor:
        return rho * random_on_sphere(movable, p, generator, origin.u.dtype)

    for step in range(1, steps + 1):
        mirrored = step == steps // 2 + 1 and _is_even(best, origin)
        guess = path.maximum(rho) if path else None
        if mirrored:
            u = -best.u
        elif step == 1 and (random_start or not origin.largest > 0):
            u = random()
        elif step == 1:
            # a little noise: the gradient may miss the direction of the largest curvature altogether
            u = project_(
                steepest(origin.gradient, metric, origin.largest).mul_(length).add_(random(), alpha=NOISE), p, rho
            )
        elif guess is not None and (largest := largest_magnitude(guess.gradient)) > 0:
            u = guess.u
            if step < steps:
                u.add_(steepest(guess.gradient, p, largest), alpha=min(length, guess.reach))
            u = project_(u, p, rho)
        else:
            target = project_(steepest(here.gradient, metric, here.largest).mul_(length).add_(here.u), p, rho)
            momentum = target.mul_(MOMENTUM).add_(here.u, alpha=2 * (1 - MOMENTUM)).sub_(previous, alpha=1 - MOMENTUM)
            u = project_(momentum, p, rho)
        point = evaluate(u, step < steps)
        if point.value == math.inf:  # no worse point is to be found
            return Ascent(u, math.inf, (*history, *[math.inf] * (steps - step + 1)))
        numbers += not math.isnan(point.value)
        if math.isnan(point.value) or (step < steps and not math.isfinite(point.largest)):
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
            halved = improved < SUCCESS * (step - since) or (not halved and best_then >= best.value)
            length = length / 2 if halved else length
            restart = restart or halved
            improved, since, best_then = 0, step, best.value
        if restart and step < steps:
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
