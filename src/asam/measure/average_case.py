"""How much the loss rises around the weights on average: ``E[L(w + rho T z)] - L(w)``.

z is normal or uniform on [-1, 1]. Source: Andriushchenko et al., arXiv:2302.07011.
"""

import math
from dataclasses import dataclass

from ..checks import check_choice, check_count
from ..geometry import Geometry
from .draws import draw
from .evaluation import Evaluation
from .means import check_finite, mean, stderr
from .objective import Objective, check_objective, check_size

NOISES = ("normal", "uniform")


@dataclass(frozen=True)
class AverageSharpness:
    """An average-case sharpness: ``value`` may be negative; ``stderr`` is its standard error over the pairs.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> found = average_sharpness(objective, 0.1, geometry=Geometry("none"), samples=8)
        >>> abs(found.perturbed_loss - found.base_loss - found.value) < 1e-6, found.samples, found.examples
        (True, 8, 1)
    """

    value: float
    stderr: float
    base_loss: float
    perturbed_loss: float
    noise_floor: float
    rho: float
    geometry: Geometry
    noise: str
    samples: int
    examples: int


def average_sharpness(
    objective: Objective,
    rho: float,
    *,
    geometry: Geometry,
    samples: int = 32,
    noise: str = "normal",
    seed: int = 0,
) -> AverageSharpness:
    """The mean rise of the loss at ``w + rho T z``, z drawn in antithetic pairs z and -z.

    On a quadratic it is ``rho^2 / 2 tr(T H T)`` for normal and ``rho^2 / 6 tr(T H T)`` for uniform noise. The ``p`` of
    the geometry has no part in it.

    Args:
        objective: the loss as a function of the weights.
        rho: the scale of the noise, >= 0.
        geometry: gives T.
        samples: evaluations of the loss, an even number.
        noise: ``"normal"``, of variance 1, or ``"uniform"`` on [-1, 1].
        seed: of the noise; sample i is the same whatever ``samples`` is.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or the loss at w is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).mean(), [torch.ones(4, 1)])
        >>> abs(average_sharpness(objective, 0.1, geometry=Geometry("none")).value) < 1e-7  # no curvature
        True
    """
    check_objective(objective)
    check_size(objective, rho)
    check_count("samples", samples, 2)
    if samples % 2:
        raise ValueError(f"samples must be even, for antithetic pairs, got {samples}")
    check_choice("noise", noise, NOISES)
    rho = float(rho)

    def sampled(evaluation: Evaluation) -> AverageSharpness:
        scales = objective.scales(geometry)
        magnitudes = objective.flat({name: param.detach().abs() for name, param in objective.params.items()})
        relative = float((magnitudes / scales).where(scales > 0, 0).max())
        del magnitudes
        base = evaluation.means(objective.pieces)["loss"]
        check_finite(base)
        pairs, slopes = [], []
        for index in range(samples // 2):
            z = draw(objective.like, seed, index, noise)
            pair = []
            for sign in (1, -1):
                evaluation.move(sign * rho * scales * z)
                pair.append(evaluation.means(objective.pieces)["loss"])
            pairs.append(sum(pair) / 2)
            slopes.append((pair[0] - pair[1]) / 2)
        perturbed = mean(pairs, [1] * len(pairs))
        # w + e is rounded to the precision of the weights, which moves the loss by eps ||w g||. The odd part of the
        # pairs gives rho ||T g||, without a gradient
        deviation = 1.0 if noise == "normal" else math.sqrt(1 / 3)
        steepness = (
            math.sqrt(mean([slope * slope for slope in slopes], [1] * len(slopes))) / (rho * deviation) if rho else 0.0
        )
        return AverageSharpness(
            value=perturbed - base,
            stderr=stderr(pairs, [1] * len(pairs)),
            base_loss=base,
            perturbed_loss=perturbed,
            noise_floor=evaluation.loss_eps * max(abs(base), abs(perturbed)) + evaluation.eps * steepness * relative,
            rho=rho,
            geometry=geometry,
            noise=noise,
            samples=samples,
            examples=objective.examples,
        )

    return objective.run(sampled)
