"""Norms that neither underflow nor overflow: a unit, such as the largest magnitude, and the norm in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import nonzero, norm_, wide

BLOCK = 2**16  # elements that are worked on at a time on the CPU: their squares stay in a core's cache


@dataclass(frozen=True)
class DualNorm:
    """``||T g||_q`` as the product of a unit, such as the largest magnitude, and the norm in it."""

    unit: Tensor
    norm: Tensor

    def pair(self) -> Tensor:
        """Both numbers as one tensor of shape (2, 1)."""
        return torch.stack([self.unit, self.norm]).unsqueeze(1)


def together(parts: Sequence[tuple[Tensor, Tensor]], q: float) -> DualNorm:
    """The norm over several parts, from the unit of each and the norm in it."""
    unit, norm = parts[0]
    if len(parts) > 1:
        home = unit.device
        dtype = torch.float64 if any(part[0].dtype == torch.float64 for part in parts) else torch.float32
        units = torch.stack([part[0].to(home, dtype, non_blocking=True) for part in parts])
        norms = torch.stack([part[1].to(home, dtype, non_blocking=True) for part in parts])
        unit = units.max()
        norm = torch.linalg.vector_norm(norms * (units / unit), q)
    # at least 1, unless the gradient is zero (or denormal), and then e must be 0 instead of 0 / 0
    return DualNorm(unit, norm.clamp(min=0.5))


def vector_norm(vector: Tensor, p: float = 2) -> Tensor:
    """The p-norm of a vector. On the CPU torch's own of 40 million numbers in float32 is off by 0.3 %."""
    if p == math.inf:
        largest: Tensor = torch.linalg.vector_norm(vector, p)
        return largest
    if vector.is_cpu and len(vector) > BLOCK:
        vector = torch.stack([_norm(part, p) for part in torch.split(vector, BLOCK)])
    return _norm(vector, p)


def _norm(vector: Tensor, p: float) -> Tensor:
    return norm_(vector if p == 2 else vector.clone(), p)


def safe_norm(vector: Tensor, p: float) -> Tensor:
    """The p-norm of any vector: powers of its elements may be out of the range of floating point."""
    if vector.numel() == 0:
        return vector.sum()
    largest = nonzero(vector.abs().amax())
    return torch.where(largest.isfinite(), largest * vector_norm(vector / largest, p), largest)


def norms(param: Tensor, *, keep_first: bool) -> Tensor:
    """2-norm over all dimensions, or all but the first: keeps them as 1. Scaled, since squares underflow.

    In float32 at least: half precision would round it.
    """
    dims = list(range(1 if keep_first else 0, param.ndim))
    if param.numel() == 0:
        return wide(param).sum(dim=dims, keepdim=True)
    values = wide(param)
    largest = nonzero(values.abs().amax(dim=dims, keepdim=True))
    shares = values / largest  # not square_(): torch.func.vmap has no rule for it
    result: Tensor = shares.mul_(shares).sum(dim=dims, keepdim=True).sqrt_() * largest
    return result
