"""Projection onto the p-norm ball."""

import math

import torch
from torch import Tensor

from .norms import safe_norm


def nearest_in_ball(u: Tensor, p: float, rho: float) -> Tensor:
    """The nearest point to u with ``||.||_p <= rho``.

    In closed form for p = 2 and inf. Otherwise by the optimality conditions, elementwise with x = |result|:
    ``x + l p x^(p-1) = |u|`` for the one multiplier l that gives the norm rho; both are found by bisection.
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
    if not math.isfinite(norm):  # no bisection would end
        return torch.full_like(u, math.nan)
    target = u.abs().double() / rho  # powers of numbers around 1, in a ball of size 1

    def shrunk(multiplier: float) -> Tensor:
        low, high = torch.zeros_like(target), target.clone()
        for _ in range(60):
            middle = (low + high) / 2
            above = middle + multiplier * p * middle ** (p - 1) > target
            high = torch.where(above, middle, high)
            low = torch.where(above, low, middle)
        return low

    low, high = 0.0, 1.0
    while safe_norm(shrunk(high), p) > 1:
        low, high = high, high * 4
    for _ in range(60):
        middle = (low + high) / 2
        if safe_norm(shrunk(middle), p) > 1:
            low = middle
        else:
            high = middle
    return (rho * shrunk(high) * u.sign()).to(u.dtype)
