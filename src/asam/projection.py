"""Projection onto the p-norm ball."""

import math

import torch
from torch import Tensor

from .norms import safe_norm

NEWTON = 60  # steps at most; mostly three to seven are taken
TINY = torch.finfo(torch.float64).tiny
BLOCK = 2**16  # elements that are worked on at a time on the CPU: what is made of them stays in a core's cache
LARGEST = math.log(torch.finfo(torch.float64).max)


def nearest_in_ball(u: Tensor, p: float, rho: float) -> Tensor:
    """The nearest point to u with ``||.||_p <= rho``.

    In closed form for p = 2 and inf. Otherwise by the optimality conditions, elementwise with x = |result|:
    ``x + m x^(p-1) = |u|`` for the one multiplier m that gives the norm rho; both are found by Newton's method.
    """
    if p == math.inf:
        return u.clamp(-rho, rho)
    norm = safe_norm(u, p)
    if p == 2:
        return u * (rho / norm.clamp(min=rho)) if rho > 0 else torch.zeros_like(u)
    if norm <= rho:
        return u.clone()
    if rho == 0:
        return torch.zeros_like(u)
    if not math.isfinite(norm):  # Newton's method would find nothing
        return torch.full_like(u, math.nan)
    target = u.abs().double() / rho  # powers of numbers around 1, in a ball of size 1
    # of this multiplier and without the x in x + m x^(p-1) the norm would be 1
    low, high = 0.0, float(safe_norm(target, p / (p - 1)))
    # the same step as below, from 0: right for a point that is not far from the ball
    size = float(safe_norm(target, p))
    fall = float(((target / size) ** (2 * p - 2)).sum())
    multiplier = min(high, max(TINY, (size - size ** (2 - p)) / ((p - 1) * max(fall, TINY))))
    block = BLOCK if u.is_cpu else u.numel()
    close = 1e-13 if u.dtype == torch.float64 else 1e-8  # smaller than rounding
    for _ in range(NEWTON):
        x = torch.cat([_shrunk(part, multiplier, p) for part in torch.split(target, block)])
        size = float(safe_norm(x, p))
        if abs(size - 1) <= close:
            break
        low, high = (multiplier, high) if size > 1 else (low, multiplier)
        # of size^(1-p), which for p = 2 is linear in m; where that leads beyond what is known, the middle
        rest = target - x
        fall = float(((x / size) ** (p - 1) * x * rest / (x + (p - 1) * rest).clamp(min=TINY)).sum())
        growth = math.exp(min(p * math.log(size), LARGEST))
        multiplier *= 1 - (size - growth) / ((p - 1) * max(fall, TINY))
        if not low < multiplier < high:
            multiplier = (low + high) / 2
    return (rho * x / max(size, 1.0) * u.sign()).to(u.dtype)


def _shrunk(target: Tensor, multiplier: float, p: float) -> Tensor:
    """The x of ``x + m x^(p-1) = target``. For p < 2 it is y^(1/(p-1)) with ``m y + y^(1/(p-1)) = target``.

    Both have the form a y + b y^n with n >= 1, which is convex: Newton's method from above comes down to the root. It
    begins with at most twice that, where one of the two terms alone is the target.
    """
    a, b, n = (1.0, multiplier, p - 1) if p >= 2 else (multiplier, 1.0, 1 / (p - 1))
    y = torch.minimum(target / a, (target / b) ** (1 / n))
    for _ in range(NEWTON):
        power = y ** (n - 1)
        above, y = y, torch.addcmul(target, power, y, value=b * (n - 1)).div_(power.mul_(b * n).add_(a))
        if not bool((above.sub_(y) > y * (1e-8 / n)).any()):  # the next step would be the square of that
            break
    return y if p >= 2 else y**n
