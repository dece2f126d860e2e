"""Projection onto the p-norm ball."""

import math

import torch
from torch import Tensor

from .norms import vector_norm


def nearest_in_ball(u: Tensor, p: float, rho: float) -> Tensor:
    """The nearest point to u with ``||.||_p <= rho``.

    In closed form for p = 2 and inf. Otherwise by the optimality conditions, elementwise with x = |result|:
    ``x + l p x^(p-1) = |u|`` for the one multiplier l that gives the norm rho; both are found by bisection.
    """
    if p == math.inf:
        return u.clamp(-rho, rho)
    norm = vector_norm(u, p)
    if p == 2:
        return u * (rho / norm.clamp(min=rho)) if rho > 0 else torch.zeros_like(u)
    if norm <= rho:
        return u.clone()
    if rho == 0:
        return torch.zeros_like(u)
    if not math.isfinite(norm):  # no bisection would end
        return torch.full_like(u, math.nan)
    target = u.abs().double()

    def shrunk(multiplier: float) -> Tensor:
        low, high = torch.zeros_like(target), target.clone()
        for _ in range(60):
            middle = (low + high) / 2
            above = middle + multiplier * p * middle ** (p - 1) > target
            high = torch.where(above, middle, high)
            low = torch.where(above, low, middle)
        return low

    low, high = 0.0, 1.0
    while vector_norm(shrunk(high), p) > rho:
        low, high = high, high * 4
    for _ in range(60):
        middle = (low + high) / 2
        if vector_norm(shrunk(middle), p) > rho:
            low = middle
        else:
            high = middle
    return (shrunk(high) * u.sign()).to(u.dtype)
