"""How much the loss rises around the weights in the worst case.

    worst case    S(rho) = max over ||T^-1 e||_p <= rho of L(w + e) - L(w)
    m-sharpness   the mean of S(rho) over batches of m examples each; it never falls when batches are split

An ascent finds a lower bound of the maximum. Sources: Foret et al., arXiv:2010.01412; Kwon et al., arXiv:2102.11600.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..checks import check_choice, check_count
from ..geometry import Geometry
from .ascent import Ascent, ascend, steepest
from .batches import Piece, grouped
from .draws import generator_of
from .evaluation import Evaluation
from .means import check_finite, mean, stderr
from .objective import Objective, check_objective, check_size
from .quadratic import Point
from .vectors import largest_magnitude

METHODS = ("auto_pgd", "one_step")


@dataclass(frozen=True)
class WorstCaseSharpness:
    """A worst-case sharpness.

    Attributes:
        value: ``perturbed_loss - base_loss`` >= 0, a lower bound of the true maximum; inf where the loss overflows, nan
            where it is a number at no point that was tried.
        stderr: standard error of the mean over the batches of m examples; nan for a single batch (m = None).
        base_loss: the loss at w.
        perturbed_loss: the loss at the worst point found, the mean over the batches.
        history: the best rise after 0, 1, ... steps, the mean over the batches; it never falls.
        converged: the last quarter of the steps added less than 1 %. The ascent has stopped rising, which does not
            mean that there is no higher point elsewhere.
        evaluations: forward and backward passes over the data (for m-sharpness the most of any batch); each restart
            takes one forward pass besides.
        noise_floor: what rounding of the weights and the loss may make of ``value``; a smaller value means nothing.
            Rounding inside the network comes on top: with cross entropy near 0, whose logits are far larger, it may
            be ten times as much.
        perturbation: the worst e, a tensor per parameter; None for m-sharpness.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).mean(), [torch.ones(4, 1)])
        >>> found = worst_case_sharpness(objective, 0.5, geometry=Geometry("none"))
        >>> round(found.value, 4), round(found.perturbation["weight"].item(), 4)  # the slope is 1
        (0.5, 0.5)
    """

    value: float
    stderr: float
    base_loss: float
    perturbed_loss: float
    history: tuple[float, ...]
    converged: bool
    evaluations: int
    noise_floor: float
    rho: float
    geometry: Geometry
    m: int | None
    examples: int
    perturbation: dict[str, Tensor] | None = field(repr=False, compare=False)


@dataclass(frozen=True)
class SharpnessProfile:
    """Worst-case sharpness over neighborhood sizes: ``rhos`` and ``values`` rise together.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).mean(), [torch.ones(4, 1)])
        >>> profile = sharpness_profile(objective, [0.2, 0.1], geometry=Geometry("none"))
        >>> profile.rhos, [result.rho for result in profile.results]
        ((0.1, 0.2), [0.1, 0.2])
    """

    rhos: tuple[float, ...]
    values: tuple[float, ...]
    results: tuple[WorstCaseSharpness, ...]


def worst_case_sharpness(
    objective: Objective,
    rho: float,
    *,
    geometry: Geometry,
    m: int | None = None,
    steps: int = 20,
    restarts: int = 1,
    method: str = "auto_pgd",
    seed: int = 0,
) -> WorstCaseSharpness:
    """The largest rise of the loss in the ball ``||T^-1 e||_p <= rho``.

    Args:
        objective: the loss as a function of the weights.
        rho: neighborhood size, >= 0.
        geometry: the ball. To measure, use eta = 0; with the eta of a training run it is what that run minimizes.
        m: examples in a batch, for m-sharpness; None: the loss over all the data. Values for different m are not
            comparable.
        steps: forward and backward passes of the ascent.
        restarts: ascents, the first from w and the others from random points; the best one counts.
        method: ``"auto_pgd"``, or ``"one_step"`` for the rise at the maximizer of the linearized loss, as SAM and ASAM
            take it: at a trained minimum it is a small part of the worst case. ``steps``, ``restarts`` and ``seed``
            are of no effect then.
        seed: of the random starts.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or the loss at w is not finite.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> objective = Objective(model, lambda model, x: (model(x) - 2).square().mean() / 2, [torch.ones(4, 1)])
        >>> result = worst_case_sharpness(objective, 0.5, geometry=Geometry(eta=0.0))
        >>> round(result.value, 6), result.converged  # e = 0.5 |w| = 1, and the loss is e^2 / 2
        (0.5, True)
    """
    return sharpness_profile(
        objective, [rho], geometry=geometry, m=m, steps=steps, restarts=restarts, method=method, seed=seed
    ).results[0]


def sharpness_profile(
    objective: Objective,
    rhos: Sequence[float],
    *,
    geometry: Geometry,
    m: int | None = None,
    steps: int = 20,
    restarts: int = 1,
    method: str = "auto_pgd",
    seed: int = 0,
) -> SharpnessProfile:
    """Worst-case sharpness for each of several rho, smallest first.

    A larger ball contains the worst point of a smaller one, so the values never fall (with ``"auto_pgd"``; one step
    may). The other arguments are those of `worst_case_sharpness`.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).mean(), [torch.ones(4, 1)])
        >>> profile = sharpness_profile(objective, [0.2, 0.1], geometry=Geometry("none"))
        >>> profile.rhos, [round(value, 4) for value in profile.values]
        ((0.1, 0.2), [0.1, 0.2])
    """
    check_objective(objective)
    if not isinstance(rhos, Iterable):
        raise TypeError(f"rhos must be a sequence of numbers, got {type(rhos).__name__}")
    given = list(rhos)
    if not given:
        raise ValueError("rhos is empty")
    for rho in given:
        check_size(objective, rho)
    rhos = sorted(map(float, given))  # those of NumPy may be of few bits
    check_count("steps", steps, 1)
    check_count("restarts", restarts, 1)
    if m is not None:
        check_count("m", m, 1)
    check_choice("method", method, METHODS)
    groups = [objective.pieces] if m is None else grouped(objective.pieces, m)

    def climbed(evaluation: Evaluation) -> tuple[Tensor, list[_Group]]:
        found: list[_Group] = []
        ball = _Ball(objective, evaluation, geometry)
        for index, group in enumerate(groups):
            climb = _Climb(ball, group)
            ascents: list[Ascent] = []
            evaluations: list[int] = []
            for rho in rhos:
                before = climb.evaluations
                if method == "one_step":
                    ascents.append(climb.one_step(rho))
                else:
                    generators = [generator_of(seed, index, restart) for restart in range(restarts)]
                    ascents.append(climb.auto_pgd(rho, steps, generators, ascents[-1] if ascents else None))
                evaluations.append(1 + climb.evaluations - before)
            if m is not None:  # a worst point each would be a copy of the network each
                ascents = [Ascent(ascent.u[:0], ascent.rise, ascent.history) for ascent in ascents]
            found.append(_Group(climb.examples, climb.base, climb.rounding, ascents, evaluations))
        return ball.scales, found

    scales, found = objective.run(climbed)
    results = []
    for i, rho in enumerate(rhos):
        worst = objective.named(scales * found[0].ascents[i].u) if m is None else None
        results.append(_result(found, i, rho, geometry, m, worst))
    return SharpnessProfile(tuple(rhos), tuple(result.value for result in results), tuple(results))


class _Ball:
    """The ball around the weights at hand, in u = T^-1 e."""

    def __init__(self, objective: Objective, evaluation: Evaluation, geometry: Geometry) -> None:
        self.evaluation = evaluation
        self.scales = objective.scales(geometry)
        self.factors = None if bool((self.scales == 1).all()) else evaluation.parts(self.scales)
        self.p = float(geometry.p)


class _Climb:
    """The ascents on one group of examples, for one rho after the other."""

    def __init__(self, ball: _Ball, pieces: list[Piece]) -> None:
        self.ball, self.pieces = ball, pieces
        self.examples = sum(piece.size for piece in pieces)
        self.evaluations = 0  # besides the one here
        ball.evaluation.move(None)
        self.base, gradient = ball.evaluation.loss_and_gradient(pieces)
        check_finite(self.base)
        # w + e is rounded to the precision of the weights, and the loss to its own
        largest = largest_magnitude(gradient) or 1.0
        parts = torch.split(gradient, [weight.numel() for weight in ball.evaluation.weights])
        norms = [
            float((part.view_as(weight).to(weight.device) / largest * weight).norm())
            for part, weight in zip(parts, ball.evaluation.weights, strict=True)
        ]
        evaluation = ball.evaluation
        self.rounding = evaluation.loss_eps * abs(self.base) + evaluation.eps * largest * math.hypot(*norms)
        nowhere = gradient.new_zeros(()).expand_as(gradient)  # 0 without memory
        self.origin = Point(nowhere, self.base, self._in_u(gradient))

    def evaluate(self, u: Tensor, with_gradient: bool) -> Point:
        self.ball.evaluation.move(u, self.ball.factors)
        if not with_gradient:
            return Point(u, self.ball.evaluation.means(self.pieces)["loss"], u[:0])
        self.evaluations += 1
        value, gradient = self.ball.evaluation.loss_and_gradient(self.pieces)
        return Point(u, value, self._in_u(gradient))

    def _in_u(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to u, written over that with respect to the weights."""
        return gradient if self.ball.factors is None else gradient.mul_(self.ball.scales)

    def one_step(self, rho: float) -> Ascent:
        """The rise at the maximizer of the linearized loss, or none where the loss falls there."""
        point = self.evaluate(rho * steepest(self.origin.gradient, self.ball.p), False)
        if point.value <= self.base:
            point = self.origin
        return Ascent(point.u, point.value - self.base, (0.0, point.value - self.base))

    def auto_pgd(self, rho: float, steps: int, generators: Sequence[torch.Generator], smaller: Ascent | None) -> Ascent:
        """The best of several ascents; its history is the best of all of them after so many steps.

        The worst point of a ``smaller`` ball, if it beats them all, counts as found at the last step.
        """
        if rho == 0:
            return Ascent(self.origin.u, 0.0, (0.0,) * (steps + 1))
        tries = [self._ascent(rho, steps, generator, restart > 0) for restart, generator in enumerate(generators)]
        history = tuple(map(_highest, zip(*(ascent.history for ascent in tries), strict=True)))
        best = max([*tries, smaller] if smaller else tries, key=lambda ascent: _highest((ascent.rise, -math.inf)))
        return Ascent(best.u, best.rise, (*history[:-1], best.rise))

    def _ascent(self, rho: float, steps: int, generator: torch.Generator, random_start: bool) -> Ascent:
        """An ascent, and where it ends before its last step, others from random points with the rest of them."""
        climb = partial(ascend, self.evaluate, self.origin, self.ball.scales > 0, p=self.ball.p, rho=rho)
        ascent = climb(steps=steps, generator=generator, random_start=random_start)
        while (left := steps + 1 - len(ascent.history)) > 0:
            more = climb(steps=left, generator=generator, random_start=True)
            history = (*ascent.history, *(_highest((ascent.rise, rise)) for rise in more.history[1:]))
            ascent = Ascent(more.u if more.rise > ascent.rise else ascent.u, history[-1], history)
        return ascent


def _highest(rises: Sequence[float]) -> float:
    """The highest rise that is a number; nan if there is none."""
    return max((rise for rise in rises if not math.isnan(rise)), default=math.nan)


@dataclass(frozen=True)
class _Group:
    """What was found for a group of examples: an ascent for each rho, and the evaluations that it took."""

    examples: int
    base: float
    rounding: float
    ascents: list[Ascent]
    evaluations: list[int]


def _result(
    groups: Sequence[_Group],
    i: int,
    rho: float,
    geometry: Geometry,
    m: int | None,
    perturbation: dict[str, Tensor] | None,
) -> WorstCaseSharpness:
    """The mean over the groups of examples, for the i-th rho."""
    sizes = [group.examples for group in groups]
    ascents = [group.ascents[i] for group in groups]
    rises = [ascent.rise for ascent in ascents]
    value, base = mean(rises, sizes), mean([group.base for group in groups], sizes)
    history = tuple(mean(step, sizes) for step in zip(*(ascent.history for ascent in ascents), strict=True))
    quarter = (len(history) - 1) // 4
    return WorstCaseSharpness(
        value=value,
        stderr=stderr(rises, sizes),
        base_loss=base,
        perturbed_loss=base + value,
        history=history,
        converged=quarter > 0 and (value == history[-1 - quarter] or value - history[-1 - quarter] <= 0.01 * value),
        evaluations=max(group.evaluations[i] for group in groups),
        noise_floor=mean([group.rounding for group in groups], sizes),
        rho=rho,
        geometry=geometry,
        m=m,
        examples=sum(sizes),
        perturbation=perturbation,
    )
