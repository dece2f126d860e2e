"""Arithmetic of long vectors."""

import math

import torch
from torch import Tensor

from ..norms import BLOCK, safe_norm

# Norms in units of which squares of float32 numbers are neither 0 nor inf.
SAFE = (1e-12, 1e12)


def norm(vector: Tensor) -> float:
    """The 2-norm, also where squares would underflow or overflow; nan if there is a nan."""
    size = math.sqrt(float(inner(vector, vector)))
    return size if SAFE[0] < size < SAFE[1] else float(safe_norm(vector, 2))


def plus(u: Tensor, vector: Tensor, size: float, length: float) -> Tensor:
    """Go so far from u along a vector, whose 2-norm is ``size``."""
    if SAFE[0] < size < SAFE[1]:
        return torch.add(u, vector, alpha=length / size)
    return (vector / size).mul_(length).add_(u)


def largest_magnitude(vector: Tensor) -> float:
    """The largest magnitude; nan if there is a nan."""
    low, high = torch.stack(torch.aminmax(vector)).tolist()
    return max(-low, high) if low == low else math.nan


def inner(u: Tensor, v: Tensor) -> Tensor:
    """The inner product of two vectors. torch's own of millions of numbers in float32 is off by 1e-4 on the CPU.

    That of a block is not; autocast would round in @.
    """
    if not u.is_cpu or len(u) <= BLOCK:
        return torch.dot(u, v)
    pairs = zip(torch.split(u, BLOCK), torch.split(v, BLOCK), strict=True)
    return torch.stack([torch.dot(a, b) for a, b in pairs]).sum()
