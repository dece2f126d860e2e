"""A PAC-Bayes certificate for a network with Gaussian noise in its weights: a bound that can be below 1.

The classifier draws its weights anew for each example, from Q = N(w, sigma^2 T_w^2). The prior P = N(w0, s^2 T_w0^2)
must not depend on the training sample: w0 are the weights before training. With probability 1 - delta over the sample
(Langford and Caruana, 2001; Maurer, 2004, arXiv:cs/0411099),

    kl(error on the sample || error on new data) <= (KL(Q || P) + log(2 sqrt(n) / delta')) / n.

The error of Q on the sample is itself estimated from draws and bounded by Chernoff's inequality, with
delta' = delta / 2 for each of the two steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..geometry import Geometry
from .bounds import inverse_kl, probability
from .draws import draw
from .evaluation import Evaluation
from .objective import Objective, check_objective


@dataclass(frozen=True)
class GibbsCertificate:
    """A bound on the error on new data of the classifier whose weights are drawn from N(w, sigma^2 T_w^2).

    Attributes:
        value: the bound.
        sample_error: mean error on the sample over the draws.
        sample_error_bound: upper bound of the error of Q on the sample, from so many draws.
        kl: ``KL(Q || P)`` in nats.
        vacuous: the value is at least 0.99.

    Example:
        >>> certificate = GibbsCertificate(
        ...     0.12, 0.04, 0.06, 30.0, vacuous=False, sigma=0.1, samples=100, delta=0.05, n=1000
        ... )
        >>> certificate.explain().partition(":")[0]
        'Gibbs certificate 0.12'
    """

    value: float
    sample_error: float
    sample_error_bound: float
    kl: float
    vacuous: bool
    sigma: float
    samples: int
    delta: float
    n: int

    def explain(self) -> str:
        """The certificate in one line."""
        if self.vacuous:
            return (
                f"Gibbs certificate {self.value:.3g}: vacuous; with noise of scale {self.sigma:g} T in the weights the "
                f"error on the sample is {self.sample_error:.3g}, and KL = {self.kl:.4g} nats for {self.n} examples."
            )
        return (
            f"Gibbs certificate {self.value:.3g}: {probability(self.delta)} over the sample the network with "
            f"noise of scale {self.sigma:g} T in its weights errs on new data at most so often; on the sample "
            f"{self.sample_error:.3g}."
        )


def gibbs_certificate(
    objective: Objective,
    sigma: float,
    *,
    geometry: Geometry,
    prior: Mapping[str, Tensor],
    prior_sigma: float | None = None,
    samples: int = 100,
    delta: float = 0.05,
    seed: int = 0,
) -> GibbsCertificate:
    """The PAC-Bayes-kl certificate of the Gibbs classifier N(w, sigma^2 T_w^2).

    It holds for one sigma chosen without looking at the sample; for the best of j values, give ``delta / j``.

    Args:
        objective: the whole training sample, with a ``loss_fn`` that returns the 0-1 error as ``"error"``.
        sigma: scale of the noise, > 0.
        geometry: gives T, for the posterior at w and for the prior at w0; an eta > 0 keeps it away from 0.
        prior: w0, a tensor per measured parameter: the weights before training, or any others that do not depend on
            the sample. Parameters that are not measured must not depend on it either, nor buffers: the running
            statistics of batch norm do, if they were collected on it.
        prior_sigma: scale of the prior, chosen without the sample; None: sigma.
        samples: draws of the weights.
        delta: the probability that the bound fails.
        seed: of the draws.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> before = {"weight": model.weight.detach().clone()}
        >>> data = [(torch.randn(1000, 2), torch.zeros(1000, dtype=torch.long))]
        >>> def loss_fn(model, batch):
        ...     logits = model(batch[0])
        ...     error = (logits.argmax(1) != batch[1]).float().mean()
        ...     return torch.nn.functional.cross_entropy(logits, batch[1]), {"error": error}
        >>> certificate = gibbs_certificate(
        ...     Objective(model, loss_fn, data), 1.0, geometry=Geometry("none"), prior=before
        ... )
        >>> certificate.kl, certificate.sample_error < certificate.value < 1  # untrained: the posterior is the prior
        (0.0, True)
    """
    check_objective(objective)
    check_number("sigma", sigma, "a finite number > 0", lambda sigma: 0 < sigma < math.inf)
    prior_sigma = sigma if prior_sigma is None else prior_sigma
    check_number("prior_sigma", prior_sigma, "a finite number > 0", lambda sigma: 0 < sigma < math.inf)
    sigma, prior_sigma = float(sigma), float(prior_sigma)  # those of NumPy may be of few bits
    check_number("delta", delta, "a number between 0 and 1", lambda delta: 0 < delta < 1)
    check_count("samples", samples, 1)
    if not isinstance(prior, Mapping):
        raise TypeError(
            f"prior must be a mapping from names to tensors, such as a state dict, got {type(prior).__name__}"
        )
    missing = [name for name in objective.params if name not in prior]
    if missing:
        raise ValueError(f"prior lacks the parameter {missing[0]!r}")
    for name in objective.params:
        if not isinstance(prior[name], Tensor):
            raise TypeError(f"prior must hold tensors, got {type(prior[name]).__name__} for {name!r}")
        if not prior[name].is_floating_point():
            raise TypeError(f"prior must hold real floating point, got {prior[name].dtype} for {name!r}")
    before = {name: prior[name].detach() for name in objective.params}

    def sampled(evaluation: Evaluation) -> tuple[float, list[float]]:
        weights = dict(zip(objective.params, evaluation.weights, strict=True))
        scales = objective.scales(geometry)
        # before the weights move: the prior may be the model's own parameters
        kl = _kl_of_gaussians(
            objective.flat(weights),
            sigma * scales,
            objective.flat(before),
            prior_sigma * objective.scales(geometry, before),
        )
        errors = []
        for index in range(samples):
            evaluation.move(sigma * scales * draw(objective.like, seed, index, "normal"))
            means = evaluation.means(objective.pieces)
            if "error" not in means:
                raise ValueError("loss_fn must return the 0-1 error: (loss, {'error': ...})")
            errors.append(means["error"])
        return kl, errors

    kl, errors = objective.run(sampled)
    sample_error = math.fsum(errors) / samples
    check_number("the error that loss_fn returns", sample_error, "in [0, 1]", lambda error: 0 <= error <= 1)
    sample_error_bound = inverse_kl(sample_error, math.log(2 / delta) / samples)
    n = objective.examples
    value = inverse_kl(sample_error_bound, (kl + math.log(4 * math.sqrt(n) / delta)) / n)
    return GibbsCertificate(value, sample_error, sample_error_bound, kl, value >= 0.99, sigma, samples, delta, n)


def _kl_of_gaussians(mean: Tensor, deviation: Tensor, prior_mean: Tensor, prior_deviation: Tensor) -> float:
    """KL(N(mean, deviation^2) || N(prior_mean, prior_deviation^2)), summed over elements, in float64.

    An element fixed at the same value in both counts 0.
    """
    w, s, w0, s0 = (t.double() for t in (mean, deviation, prior_mean, prior_deviation))
    terms = torch.log(s0 / s) + (s.square() + (w - w0).square()) / (2 * s0.square()) - 0.5
    same = (s == 0) & (s0 == 0) & (w == w0)
    # s = 0 against s0 > 0, or the other way round: the one is not absolutely continuous with respect to the other
    return float(terms.where((s > 0) & (s0 > 0), math.inf).where(~same, 0).sum())
