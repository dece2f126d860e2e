"""Means over batches, weighted by their sizes."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean, weighted by sizes."""
    products = [value * size for value, size in zip(values, sizes, strict=True)]
    try:
        return math.fsum(products) / sum(sizes)
    except OverflowError:
        return sum(products) / sum(sizes)  # inf


def stderr(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of a mean weighted by sizes."""
    n, center, total = len(values), mean(values, sizes), sum(sizes)
    if n < 2:
        return math.nan
    shares = (size / total * (value - center) for value, size in zip(values, sizes, strict=True))
    return math.hypot(*shares) * math.sqrt(n / (n - 1))


def check_finite(loss: float) -> None:
    """Raise unless the loss at the weights themselves is finite."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss at the weights themselves is {loss}: there is nothing to compare with")
