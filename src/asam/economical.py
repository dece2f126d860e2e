"""ASAM for little more than plain training: against the momentum first, exact where it counts, at the end.

To climb against the mean of the gradients costs no pass of its own. What it loses of ASAM's gain comes back when the
last part of the training is exact: with a quarter of the steps exact, a training costs 1.25 times plain training.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import check_count, check_number
from .closures import NESTED_BACKWARD, Closure, as_closures, check_reaches_parameters, checked, held, nodes_of
from .direction import Momentum
from .minimizer import ASAM

# rho of the steps against the momentum, in units of that of exact steps, unless it is given.
MULTIPLE = 2.0


class EconomicalASAM:
    """ASAM at 1 + ``exact`` times the passes of plain training: rest, then against the momentum, then exact.

    Args:
        model: as for :class:`ASAM`.
        steps: how often ``backward`` will be called in the whole training. Later calls are exact.
        rho: neighborhood size of the exact steps.
        momentum_rho: that of the steps against the momentum, by default twice ``rho``.
        exact: share of the calls that are exact, the last ones, 0 to 1.
        warmup: the first calls, in which the gradient is the plain one: as many as the learning rate's warm-up.
        optimizer: climb against its momentum; by default against a mean of the gradients, with ``decay``.
        decay: of that mean, >= 0 and < 1.
        statistics_every: how often batch-norm statistics are taken while no pass is at w, see :class:`Momentum`.
        eta, normalization, p, bias, params, compile, rounding: as for :class:`ASAM`.

    Attributes:
        momentum, exact: the two :class:`ASAM`. Set their ``rho`` to follow a schedule.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> asam = EconomicalASAM(model, steps=100, rho=0.5)
        >>> inputs = torch.randn(8, 3)
        >>> for _ in range(100):
        ...     loss = asam.backward(lambda: model(inputs).square().mean())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        rho: float = 0.5,
        momentum_rho: float | None = None,
        exact: float = 0.25,
        warmup: int = 0,
        optimizer: Optimizer | None = None,
        decay: float = 0.9,
        statistics_every: int = 10,
        eta: float = 0.01,
        normalization: str | Callable[[Tensor], Tensor | float] = "elementwise",
        p: float = 2,
        bias: str = "unscaled",
        params: Iterable[str | Tensor] | None = None,
        compile: bool = False,
        rounding: str = "nearest",
    ) -> None:
        check_count("steps", steps, 1)
        check_count("warmup", warmup, 0)
        check_number("exact", exact, "a share from 0 to 1", lambda share: 0 <= share <= 1)
        if momentum_rho is not None:
            check_number("momentum_rho", momentum_rho, "a finite number >= 0", lambda size: 0 <= size < math.inf)
        chosen = list(params) if isinstance(params, Iterable) and not isinstance(params, str | Tensor) else params
        shape: dict[str, Any] = {"eta": eta, "normalization": normalization, "p": p, "bias": bias, "params": chosen}
        shape |= {"compile": compile, "rounding": rounding}
        self.exact = ASAM(model, rho=rho, **shape)
        self._direction = direction = Momentum(optimizer, decay=decay, statistics_every=statistics_every)
        size = MULTIPLE * rho if momentum_rho is None else momentum_rho
        with warnings.catch_warnings(action="ignore"):  # the first has told it
            self.momentum = ASAM(model, rho=size, direction=direction, **shape)
            # the memory of the momentum fills meanwhile
            self._resting = ASAM(model, rho=0, direction=direction, **shape)
        self._warmup = warmup
        self._exact_from = max(warmup, steps - round(exact * steps))
        self._calls = 0
        self._last = self.exact

    def __repr__(self) -> str:
        return f"{type(self).__name__}(exact={self.exact}, momentum={self.momentum}, calls={self._calls})"

    @property
    def rho(self) -> float:
        """Neighborhood size of the step that was last; to be set for both kinds of steps apart."""
        return self._last.rho

    @rho.setter
    def rho(self, rho: float) -> None:
        raise AttributeError("EconomicalASAM has two rho: set momentum.rho and exact.rho")

    @property
    def loss_at(self) -> str:
        """Where the loss that ``backward`` returned last was taken, ``"w"`` or ``"w + e"``."""
        return self._last.loss_at

    def backward(
        self,
        closure: Closure | Sequence[Closure],
        *,
        ascent: Closure | Sequence[Closure] | None = None,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """Add a gradient to ``.grad`` and return the loss, as :meth:`ASAM.backward` does.

        Returns:
            The loss at :attr:`loss_at`, detached: a scalar tensor.
        """
        if self._calls >= self._exact_from:
            self._last = self.exact
        else:
            self._last = self._resting if self._calls < self._warmup else self.momentum
        if self._last is self._resting and self.momentum.rho:
            self._direction.momenta(self.momentum._params)  # an optimizer that keeps none is told of now
        if self._calls == 0:
            loss = self._first(as_closures("closure", closure), ascent, backward)
        else:
            loss = self._last.backward(closure, ascent=ascent, backward=backward)
        self._calls += 1
        return loss

    def _first(
        self,
        closures: Sequence[Closure],
        ascent: Closure | Sequence[Closure] | None,
        backward: Callable[[Tensor], Any] | None,
    ) -> Tensor:
        """A step that tells what the exact ones would tell, at the end of a training."""
        passes, params = self.exact._passes, list(self.exact._params.values())
        if passes.through_grad(backward):
            with self.exact._replicas.apart(accumulating=True):
                pass  # but for what that refuses
            loss = self._last.backward(closures, ascent=ascent, backward=backward)
            if all(param.grad is None for param in params):  # shards may get theirs later, which is late for exact ones
                passes.present({}, [], averaged=False)
            return loss
        before, reached = held(params), set[int]()

        def looking(closure: Closure) -> Closure:
            def looked_at() -> Tensor:
                loss = checked(closure())
                check_reaches_parameters(loss)
                reached.update({id(loss)}, (id(node.variable) for node in nodes_of(loss) if hasattr(node, "variable")))
                return loss

            return looked_at

        loss = self._last.backward([looking(closure) for closure in closures], ascent=ascent)
        for param, then, now in zip(params, before, held(params), strict=True):
            if now != then and id(param) not in reached:
                raise RuntimeError(NESTED_BACKWARD)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, both rho and the memory."""
        return {"calls": self._calls, "exact": self.exact.state_dict(), "momentum": self.momentum.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`.

        Raises:
            ValueError, TypeError: it is no mapping, has other keys, or a value is not what that key holds.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        if set(state_dict) != {"calls", "exact", "momentum"}:
            raise ValueError(
                f"state_dict must have the keys 'calls', 'exact', 'momentum', got {sorted(map(str, state_dict))}"
            )
        check_count("calls", state_dict["calls"], 0)
        before = self.exact.state_dict()
        self.exact.load_state_dict(state_dict["exact"])
        try:
            self.momentum.load_state_dict(state_dict["momentum"])
        except BaseException:  # nothing is taken up by half
            self.exact.load_state_dict(before)
            raise
        self._calls = state_dict["calls"]
