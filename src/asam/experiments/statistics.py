"""Paired comparisons over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over paired seeds, its 95 % interval (t) and p value (Wilcoxon signed rank), and where a < b.

    Interval and p value are None with a single pair.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    wins: int
    n: int


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two methods run on the same seeds."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean, wins = len(differences), fmean(differences), sum(d < 0 for d in differences)
    if n < 2:
        return Difference(mean, None, None, None, wins, n)
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5
    p_value = float(stats.wilcoxon(differences).pvalue) if any(differences) else 1.0
    return Difference(mean, mean - half, mean + half, p_value, wins, n)


def pair(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation, of a single one its value."""
    mean, sd = mean_sd(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
