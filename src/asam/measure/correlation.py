"""Rank correlation between a measure and the generalization gap, over many trained models.

    tau-a   mean over pairs of models of sign(mu_i - mu_j) sign(gap_i - gap_j)      (Jiang et al., arXiv:1912.02178)
    tau-b   the same sum over the square root of the numbers of pairs not tied in mu and not tied in gap
    psi_i   tau-a over pairs that differ in hyper-parameter i only, averaged over the settings of all others
    Psi     the mean of the psi_i

A correlation over few models is hardly known: the standard deviation of a tau near 0.3 is about 0.23 with 10 models
and 0.06 with 100. So every number comes with a bootstrap interval over models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_number
from .draws import generator_of

Interval = tuple[float, float]


@dataclass(frozen=True)
class Kendall:
    """Kendall's rank correlations of n models, each with its bootstrap percentile interval.

    nan where every pair is tied.

    Example:
        >>> found = kendall([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0])
        >>> found.tau_b, found.interval_b, found.n
        (1.0, (1.0, 1.0), 4)
    """

    tau_a: float
    tau_b: float
    interval_a: Interval
    interval_b: Interval
    n: int
    confidence: float


@dataclass(frozen=True)
class GranulatedKendall:
    """psi of every hyper-parameter and their mean Psi, with bootstrap percentile intervals.

    A psi is nan where no two models differ in that hyper-parameter only; Psi is the mean of the others.

    Example:
        >>> found = granulated_kendall([1, 2, 3], [10, 20, 30], {"lr": [0.1, 0.2, 0.3]})
        >>> found.psi, found.n, found.confidence
        ({'lr': 1.0}, 3, 0.95)
    """

    psi: dict[str, float]
    Psi: float
    intervals: dict[str, Interval]
    interval: Interval
    n: int
    confidence: float


def kendall(
    measure: Sequence[float],
    gap: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Kendall:
    """Kendall's tau-a and tau-b between a measure and the generalization gap.

    Args:
        measure: of every model, at least two of them.
        gap: the generalization gap of every model.
        confidence: of the intervals, between 0 and 1.
        resamples: of the bootstrap over models; a model's copies are not compared with each other.
        seed: of the bootstrap.

    Raises:
        ValueError: the lengths differ, there are fewer than two models, or a value is nan.

    Example:
        >>> result = kendall([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        >>> round(result.tau_a, 4), round(result.tau_b, 4)  # two pairs in order, one not
        (0.3333, 0.3333)
    """
    mu, g = _signs(measure, "measure"), _signs(gap, "gap")
    n = len(mu)
    _check(n, len(g), confidence, resamples)
    product, mu_apart, g_apart = mu * g, mu.abs(), g.abs()
    different = 1 - torch.eye(n, dtype=torch.float64, device="cpu")

    def taus(counts: Tensor) -> tuple[Tensor, Tensor]:
        agreement = _pairs(counts, product)
        spread = (_pairs(counts, mu_apart) * _pairs(counts, g_apart)).sqrt()
        return agreement / _pairs(counts, different), agreement / spread

    tau_a, tau_b = (float(tau) for tau in taus(_once(n)))
    resampled_a, resampled_b = taus(_resamples(n, resamples, seed))
    return Kendall(tau_a, tau_b, _interval(resampled_a, confidence), _interval(resampled_b, confidence), n, confidence)


def kendall_difference(
    a: Sequence[float],
    b: Sequence[float],
    gap: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, Interval]:
    """Kendall's tau-b of measure ``a`` minus that of measure ``b`` on the same models, with its bootstrap interval.

    Every resample holds the same models for both, so what they have in common does not widen the interval. The
    arguments and errors are those of `kendall`.

    Example:
        >>> kendall_difference([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [10.0, 20.0, 30.0])[0]
        2.0
    """
    signs = [_signs(values, name) for values, name in ((a, "a"), (b, "b"), (gap, "gap"))]
    for measure in signs[:2]:
        _check(len(measure), len(signs[2]), confidence, resamples)
    g = signs[2]

    def differences(counts: Tensor) -> Tensor:
        def tau(mu: Tensor) -> Tensor:
            return _pairs(counts, mu * g) / (_pairs(counts, mu.abs()) * _pairs(counts, g.abs())).sqrt()

        return tau(signs[0]) - tau(signs[1])

    estimate = float(differences(_once(len(g))))
    return estimate, _interval(differences(_resamples(len(g), resamples, seed)), confidence)


def granulated_kendall(
    measure: Sequence[float],
    gap: Sequence[float],
    hyperparameters: Mapping[str, Sequence[Any]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> GranulatedKendall:
    """The granulated rank correlation: only one hyper-parameter varies in each comparison.

    Args:
        measure: of every model.
        gap: the generalization gap of every model.
        hyperparameters: for every hyper-parameter its value in each model. Models that agree in all of them, such as
            those of several seeds, are replicates: they are not compared with each other.
        confidence: of the intervals.
        resamples: of the bootstrap over models.
        seed: of the bootstrap.

    Raises:
        ValueError: as in `kendall`, or no two models differ in exactly one hyper-parameter.

    Example:
        >>> lr, width = [0.1, 0.2, 0.1, 0.2], [8, 8, 16, 16]
        >>> result = granulated_kendall([1, 2, 3, 4], [1, 2, 4, 3], {"lr": lr, "width": width})
        >>> result.psi, result.Psi
        ({'lr': 0.0, 'width': 1.0}, 0.5)
    """
    mu, g = _signs(measure, "measure"), _signs(gap, "gap")
    n = len(mu)
    _check(n, len(g), confidence, resamples)
    if not isinstance(hyperparameters, Mapping):
        raise TypeError(
            "hyperparameters must be a mapping from names to a value for each model, got "
            f"{type(hyperparameters).__name__}"
        )
    for name, values in hyperparameters.items():
        if not hasattr(values, "__len__"):
            raise TypeError(f"hyper-parameter {name!r} must have a value for each model, got {type(values).__name__}")
        if len(values) != n:
            raise ValueError(
                f"hyper-parameter {name!r} must have a value for each of the {n} models, got {len(values)}"
            )
        unhashable = [value for value in map(_plain, values) if isinstance(value, list | dict | set)]
        if unhashable:
            kind = type(unhashable[0]).__name__
            raise TypeError(f"hyper-parameter {name!r} must have a number or a name for each model, got a {kind}")
    product = mu * g
    groups = {name: _groups(name, hyperparameters) for name in hyperparameters}
    if not any(groups.values()):
        raise ValueError("no two models differ in exactly one hyper-parameter")

    def psis(counts: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, settings in groups.items():
            taus = [
                _pairs(counts[:, members], product[members][:, members] * different)
                / _pairs(counts[:, members], different)
                for members, different in settings
            ]
            # a setting that a resample leaves with a single value is not counted
            found[name] = torch.stack(taus).nanmean(dim=0) if taus else counts.new_full((len(counts),), math.nan)
        return found

    psi = psis(_once(n))
    resampled = psis(_resamples(n, resamples, seed))
    return GranulatedKendall(
        psi={name: float(value) for name, value in psi.items()},
        Psi=float(torch.stack(list(psi.values())).nanmean()),
        intervals={name: _interval(values, confidence) for name, values in resampled.items()},
        interval=_interval(torch.stack(list(resampled.values())).nanmean(dim=0), confidence),
        n=n,
        confidence=confidence,
    )


def _groups(name: str, hyperparameters: Mapping[str, Sequence[Any]]) -> list[tuple[Tensor, Tensor]]:
    """The models of each setting of all other hyper-parameters, and which pairs of them differ in this one."""
    settings = {key: [_plain(value) for value in values] for key, values in hyperparameters.items()}
    values = settings[name]
    members: dict[tuple[Any, ...], list[int]] = {}
    for model in range(len(values)):
        others = tuple(other[model] for key, other in settings.items() if key != name)
        members.setdefault(others, []).append(model)
    groups = []
    for indices in members.values():
        apart = [[float(values[i] != values[j]) for j in indices] for i in indices]
        different = torch.tensor(apart, dtype=torch.float64, device="cpu")
        if different.any():
            groups.append((torch.tensor(indices, device="cpu"), different))
    return groups


def _plain(value: Any) -> Any:
    """A number of a tensor or an array as a number of Python, nan as None: those are equal to themselves only."""
    plain = value.item() if hasattr(value, "item") else value
    return plain if plain == plain else None


def _signs(values: Sequence[float], name: str) -> Tensor:
    """sign(value_i - value_j); an infinite value ties with itself."""
    try:  # tensors, arrays and columns of a table have tolist()
        numbers = values.tolist() if hasattr(values, "tolist") else list(values)
        v = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}") from None
    if v.ndim != 1 or v.isnan().any():
        raise ValueError(f"{name} must be a sequence of numbers without nan")
    return (v[:, None] > v).double() - (v[:, None] < v).double()


def _pairs(counts: Tensor, matrix: Tensor) -> Tensor:
    """The sum of a matrix over all pairs of models, each model counted as often as it was drawn."""
    return ((counts @ matrix) * counts).sum(dim=1)


def _once(n: int) -> Tensor:
    """Each model counted once."""
    return torch.ones(1, n, dtype=torch.float64, device="cpu")


def _resamples(n: int, resamples: int, seed: int) -> Tensor:
    drawn = torch.randint(n, (resamples, n), generator=generator_of(seed, 0), device="cpu")
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def _interval(values: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = values.double().nanquantile(values.new_tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _check(n: int, n_gap: int, confidence: float, resamples: int) -> None:
    if n != n_gap:
        raise ValueError(f"measure and gap must have the same length, got {n} and {n_gap}")
    if n < 2:
        raise ValueError(f"a rank correlation needs at least two models, got {n}")
    check_number("confidence", confidence, "a number between 0 and 1", lambda confidence: 0 < confidence < 1)
    check_count("resamples", resamples, 1)
