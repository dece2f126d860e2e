"""The gradient that is handed on: ``c0 g0 + c1 g1``, with g0 the gradient at w and g1 that at w + e.

The coefficients are a function of the inner products <g0, g0>, <g0, g1> and <g1, g1> over the whole model, so that
WSAM, GNP, GSAM and StableSAM are one line each. They stay on the device; no value is read back.
"""

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from .closures import unit_of
from .kernels import wide
from .sharding import groups, local, summed, widest

Combine = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | float, Tensor | float]]


def combine_(
    combine: Combine,
    params: Sequence[Tensor],
    at_w: Sequence[Tensor | None],
    units: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> None:
    """Put ``c0 g0 + c1 g1`` in the place of g1 in ``.grad``.

    Args:
        combine: the coefficients from the three inner products, scalar tensors.
        params: those that have a gradient at w or at w + e.
        at_w: their gradients g0, None for 0.
        units: by what the losses of the two passes were multiplied before their backward passes, empty for nothing.

    Raises:
        TypeError: ``combine`` does not return two coefficients, numbers or tensors.
    """
    with torch.no_grad():
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        before = [torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, at_w, strict=True)]
        g0, g1 = local(before), local([param.grad for param in params if param.grad is not None])
        products = _inner_products(g0, g1, params)
        unit0, unit1 = (unit_of(unit).to(products) if unit else 1.0 for unit in units)
        # to be divided by: for a gradient of zero too
        least = torch.finfo(products.dtype).tiny
        squares = (products[0] / unit0**2).clamp(min=least), (products[2] / unit1**2).clamp(min=least)
        coefficients = combine(squares[0], products[1] / (unit0 * unit1), squares[1])
        if not isinstance(coefficients, tuple) or len(coefficients) != 2:
            got = f"{len(coefficients)} of them" if isinstance(coefficients, tuple) else type(coefficients).__name__
            raise TypeError(f"combine must return two coefficients (c0, c1), got {got}")
        for coefficient in coefficients:
            if not isinstance(coefficient, Tensor | Real):
                raise TypeError(f"combine must return numbers or scalar tensors, got {type(coefficient).__name__}")
            if isinstance(coefficient, Tensor) and coefficient.is_complex():
                raise TypeError(f"combine must return real numbers, got {coefficient.dtype}")
            if isinstance(coefficient, Tensor) and coefficient.numel() != 1:
                raise ValueError(f"combine must return scalar tensors, got shape {tuple(coefficient.shape)}")
        c0, c1 = (torch.as_tensor(c, dtype=products.dtype, device=products.device).reshape(()) for c in coefficients)
        # whatever has become of the coefficient of a gradient of zero
        c0 = (c0 * (unit1 / unit0)).masked_fill(products[0] == 0, 0)
        c1 = c1.masked_fill(products[2] == 0, 0)
        for gradient, now in zip(g0, g1, strict=True):
            now.mul_(c1.to(now, non_blocking=True)).add_(gradient * c0.to(gradient, non_blocking=True))


def _inner_products(g0: Sequence[Tensor], g1: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """<g0, g0>, <g0, g1> and <g1, g1> over the shards of all processes, in float64 where the device has it."""
    home = g0[0].device
    dtype = widest(home)
    parts = [
        torch.stack([torch.sum(x * y, dtype=dtype) for x, y in ((a, a), (a, b), (b, b))]).to(home, non_blocking=True)
        for a, b in ((wide(x), wide(y)) for x, y in zip(g0, g1, strict=True))
    ]
    return summed(parts, [groups(param) for param in params])
