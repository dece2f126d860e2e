"""Bounds on the error on new data that hold with probability 1 - delta over the training sample.

The sharpness bounds of SAM (Foret et al., arXiv:2010.01412) and of ASAM (Kwon et al., arXiv:2102.11600): if Gaussian
noise in the weights does not lower the expected loss, then, for a loss in [0, 1],

    L_D(w) <= max over the ball of L_S(w + e) + sqrt(complexity / (n - 1)),
    complexity = k log(1 + ||w||^2 / r^2 (1 + sqrt(log(n) / k))^2) + 4 log(n / delta) + 8 log(6 n + 3 k),

with r = rho for SAM and r = eta rho for ASAM, since T_w >= eta. For every deep network both are far above 1, and ASAM's
is never below SAM's for a ball of size eta rho: they motivate the methods and certify nothing. The binomial bound on
held-out data is the tightest and the cheapest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checks import check_count, check_number


@dataclass(frozen=True)
class SharpnessBound:
    """The bound of SAM or ASAM with all its terms.

    Attributes:
        value: the bound, ``perturbed_loss + complexity``; inf if r = 0.
        perturbed_loss: the largest training loss in the ball.
        complexity: ``sqrt((norm_term + confidence_term + grid_term) / (n - 1))``.
        norm_term: ``k log(1 + ||w||^2 / r^2 (1 + sqrt(log(n) / k))^2)``.
        confidence_term: ``4 log(n / delta)``.
        grid_term: ``8 log(6 n + 3 k)``, the price of choosing the width of the prior.
        vacuous: the value is at least 1, which holds for every loss in [0, 1] without any bound.

    Example:
        >>> bound = sam_bound(0.1, weight_norm=10.0, k=1000, n=50000, rho=0.1)
        >>> bound.value == bound.perturbed_loss + bound.complexity
        True
        >>> bound.norm_term > bound.grid_term > bound.confidence_term  # what makes it large
        True
    """

    method: str
    value: float
    perturbed_loss: float
    complexity: float
    norm_term: float
    confidence_term: float
    grid_term: float
    vacuous: bool
    delta: float
    n: int

    def explain(self) -> str:
        """The bound in one line."""
        if self.vacuous:
            return (
                f"{self.method} bound {self.value:.3g}: vacuous, since a loss in [0, 1] is never above 1; "
                f"complexity alone is {self.complexity:.3g} on {self.n} examples."
            )
        return (
            f"{self.method} bound {self.value:.3g}: {probability(self.delta)} over the sample the loss on "
            f"new data is at most {self.perturbed_loss:.3g} in the ball + {self.complexity:.3g} for complexity."
        )


@dataclass(frozen=True)
class HoldoutBound:
    """The bound from held-out data: the largest error rate that is still compatible with so few errors.

    Example:
        >>> holdout_bound(0, 100).explain().partition(":")[0]
        'Held-out bound 0.0295'
    """

    value: float
    error: float
    vacuous: bool
    delta: float
    n: int

    def explain(self) -> str:
        """The bound in one line."""
        return (
            f"Held-out bound {self.value:.3g}: {round(self.error * self.n)} of {self.n} examples not used for training "
            f"were wrong, so {probability(self.delta)} the error on new data is at most {self.value:.3g}."
        )


def sam_bound(
    perturbed_loss: float, *, weight_norm: float, k: int, n: int, rho: float, delta: float = 0.05
) -> SharpnessBound:
    """The generalization bound of SAM.

    Args:
        perturbed_loss: the largest mean training loss in the ball ``||e||_2 <= rho``, in [0, 1], such as a 0-1 loss.
        weight_norm: ``||w||_2`` over all weights.
        k: the number of weights.
        n: the number of training examples, at least 2.
        rho: neighborhood size.
        delta: the probability that the bound fails.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> bound = sam_bound(0.1, weight_norm=10.0, k=1000, n=50000, rho=0.1)
        >>> round(bound.value, 3), bound.vacuous
        (0.537, False)
    """
    return _sharpness_bound("SAM", perturbed_loss, weight_norm, k, n, rho, rho, delta)


def asam_bound(
    perturbed_loss: float, *, weight_norm: float, k: int, n: int, rho: float, eta: float, delta: float = 0.05
) -> SharpnessBound:
    """The generalization bound of ASAM, for the ball ``||T_w^-1 e||_2 <= rho`` with ``T_w = |w| + eta``.

    Only eta bounds T_w from below: at eta = 0 the bound is infinite. The arguments are those of `sam_bound`, and
    ``eta``, the stabilizer.

    Example:
        >>> bound = asam_bound(0.1, weight_norm=10.0, k=1000, n=50000, rho=1.0, eta=0.01)
        >>> round(bound.value, 3), bound.vacuous
        (0.632, False)
    """
    check_number("eta", eta, "a finite number >= 0", lambda eta: 0 <= eta < math.inf)
    check_number("rho", rho, "a finite number > 0", lambda rho: 0 < rho < math.inf)
    return _sharpness_bound("ASAM", perturbed_loss, weight_norm, k, n, rho, float(eta) * float(rho), delta)


def holdout_bound(errors: int, n: int, *, delta: float = 0.05) -> HoldoutBound:
    """The error on new data, bounded from the errors on n held-out examples by the binomial distribution.

    The largest p with ``P(Binomial(n, p) <= errors) >= delta``; exact (Clopper and Pearson, 1934). The examples must
    have had no part in training, nor in choosing the model.

    Args:
        errors: how many of them are classified wrongly.
        n: how many there are.
        delta: the probability that the bound fails.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> round(holdout_bound(0, 100).value, 4)  # 1 - 0.05^(1/100)
        0.0295
    """
    check_count("n", n, 1)
    check_count("errors", errors, 0)
    if errors > n:
        raise ValueError(f"errors must be at most n = {n}, got {errors}")
    errors, n = int(errors), int(n)  # those of NumPy may be of few bits
    _check_delta(delta)
    value = 1.0 if errors == n else _largest(lambda p: _log_binomial_cdf(errors, n, p) >= math.log(delta))
    return HoldoutBound(value, errors / n, value >= 1, delta, n)


def probability(delta: float) -> str:
    """That of 1 - delta, in words that are true however small delta is."""
    return f"with probability {1 - delta:g}" if delta >= 1e-5 else f"with probability 1 - {delta:.3g}"


def inverse_kl(q: float, bound: float) -> float:
    """The largest p with ``kl(q || p) <= bound``, kl between two coins.

    Example:
        >>> round(inverse_kl(0.0, 0.1), 4)  # 1 - exp(-0.1)
        0.0952
    """
    # a nan bounds nothing
    return _largest(lambda p: not _kl(q, p) > bound, above=q)


def _sharpness_bound(
    method: str, perturbed_loss: float, weight_norm: float, k: int, n: int, rho: float, r: float, delta: float
) -> SharpnessBound:
    check_number("perturbed_loss", perturbed_loss, "in [0, 1], such as a 0-1 loss", lambda loss: 0 <= loss <= 1)
    check_number("weight_norm", weight_norm, "a finite number >= 0", lambda norm: 0 <= norm < math.inf)
    check_number("rho", rho, "a finite number > 0", lambda rho: 0 < rho < math.inf)
    check_count("k", k, 1)
    check_count("n", n, 2)
    _check_delta(delta)
    # those of NumPy may be of few bits
    perturbed_loss, weight_norm, rho, r, delta = map(float, (perturbed_loss, weight_norm, rho, r, delta))
    k, n = int(k), int(n)
    ratio = math.inf if r == 0 else (weight_norm / r) * (weight_norm / r)
    norm_term = k * math.log1p(ratio * (1 + math.sqrt(math.log(n) / k)) ** 2)
    confidence_term, grid_term = 4 * math.log(n / delta), 8 * math.log(6 * n + 3 * k)
    complexity = math.sqrt((norm_term + confidence_term + grid_term) / (n - 1))
    value = perturbed_loss + complexity
    return SharpnessBound(
        method, value, perturbed_loss, complexity, norm_term, confidence_term, grid_term, value >= 1, delta, n
    )


def _kl(q: float, p: float) -> float:
    if p in (0.0, 1.0):
        return 0.0 if p == q else math.inf
    return (q * math.log(q / p) if q > 0 else 0.0) + ((1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0)


def _log_binomial_cdf(errors: int, n: int, p: float) -> float:
    """Log P(Binomial(n, p) <= errors) for 0 < p < 1."""
    i = torch.arange(errors + 1, dtype=torch.float64, device="cpu")
    choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return float(torch.logsumexp(choose + i * math.log(p) + (n - i) * math.log1p(-p), dim=0))


def _largest(holds: Callable[[float], bool], above: float = 0.0) -> float:
    """The largest number in [above, 1) for which a condition holds that holds up to some number."""
    low, high = above, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high  # on the safe side


def _check_delta(delta: object) -> None:
    check_number("delta", delta, "a number between 0 and 1", lambda delta: 0 < delta < 1)
