"""What is climbed: the gradient at w, alone or with a mean of earlier ones, or momentum, which costs no pass at w.

Nearly every relative of SAM climbs d = weight g + mean m, with g the gradient at w and m an exponential mean of such
gradients. With the momentum of a descent, e goes against it, as Momentum-SAM has it, to where the descent is heading.
It is there before the step, and a step then costs one forward-backward pass.

A maximizer depends on the direction of d alone, so d needs no bias correction and no unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .checks import check_count, check_number, warn
from .closures import unit_of
from .kernels import HALF, is_traced, wide
from .parameters import bare_names
from .sharding import groups, is_sharded, local, summed, widest

# Where torch's optimizers, and those built like them, keep a mean of their gradients.
MOMENTA = ("momentum_buffer", "exp_avg")


_NO_MOMENTUM = (
    "{} keeps no momentum to climb against: give it one, such as momentum=0.9, or hand over the optimizer that it "
    "wraps, or use Momentum() with a memory of its own"
)


class Mean:
    """An exponential mean of gradients, by the parameter's name. A gradient that is not finite leaves it as it was."""

    def __init__(self, decay: float) -> None:
        check_number("decay", decay, "a number >= 0 and < 1", lambda decay: 0 <= decay < 1)
        self.decay = float(decay)
        self.values: dict[str, Tensor] = {}
        # whether no gradient was finite yet, so that the mean is 0: a scalar, one for all that came in the same steps
        self._empty: dict[str, Tensor] = {}

    def update(self, names: Sequence[str], grads: Sequence[Tensor]) -> None:
        """Take up gradients; the first of a parameter is its mean."""
        with torch.no_grad():
            finite = all_finite(grads)
            # a fake of a tracer has no value, and one on an accelerator is not waited for
            known = type(finite) is Tensor and finite.is_cpu and not is_traced() and bool(finite)
            if known and self.holds(names, grads):
                torch._foreach_lerp_([self.values[name] for name in names], list(map(wide, grads)), 1 - self.decay)
                return
            weight = self.or_one(1 - self.decay)
            still = cache(lambda empty: empty & ~finite.to(empty.device, non_blocking=True))
            new = ~finite
            for name, grad in zip(names, grads, strict=True):
                here = finite.to(grad.device, non_blocking=True)
                if name not in self.values:
                    self.values[name] = torch.where(here, wide(grad), 0)
                    self._empty[name] = new
                else:
                    mean = self.values[name]
                    mean.lerp_(torch.where(here, grad.to(mean.dtype), mean), weight(name))
                    if name in self._empty:
                        self._empty[name] = still(self._empty[name])
                if known:
                    self._empty.pop(name, None)

    def holds(self, names: Sequence[str], grads: Sequence[Tensor]) -> bool:
        """Whether each of these has a mean for certain, and lists of them may be computed with as they are."""
        if not (self.values.keys() >= set(names) and self._empty.keys().isdisjoint(names)) or is_sharded(grads):
            return False
        pairs = zip(names, grads, strict=True)
        return all(self.values[name].dtype == (torch.float32 if g.dtype in HALF else g.dtype) for name, g in pairs)

    def or_one(self, weight: float) -> Callable[[str], Tensor]:
        """The weight of a new gradient of a parameter, as a scalar beside its mean: 1 as long as it has none."""

        @cache
        def beside(empty: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
            value = torch.full((), weight, dtype=dtype, device=device)
            return value if empty is None else value.masked_fill(empty.to(device, non_blocking=True), 1)

        return lambda name: beside(self._empty.get(name), self.values[name].device, self.values[name].dtype)

    def state_dict(self, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """The means of these parameters by their names, copies; nan for those that have none yet.

        So there is a place for each mean, which torch.distributed.checkpoint needs to load it into.
        """
        empty = {name for name, flag in self._empty.items() if flag}
        values = {name: value for name, value in self.values.items() if name not in empty}
        bare = bare_names(params)
        return {
            "mean": {
                bare[name]: values[name].clone() if name in values else torch.full_like(wide(param.detach()), math.nan)
                for name, param in params.items()
                if name in values or (param.requires_grad and not is_lazy(param))
            }
        }

    def load(self, values: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        """Take copies of the saved means that there are, of these parameters, whatever the model is wrapped in.

        Raises:
            TypeError: it is not a mapping to floating-point tensors.
            ValueError: a name is not one of theirs, or a shape is not that parameter's.
        """
        if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
            raise TypeError("state_dict's mean must be a mapping from names to tensors")
        ours = {short: name for name, short in bare_names(params).items()}
        theirs = bare_names(values)
        values = {ours.get(theirs[name], name): value for name, value in values.items()}
        for name, value in values.items():
            if name not in params:
                raise ValueError(f"state_dict has a mean for {name!r}, which is not a perturbed parameter")
            if value.shape != params[name].shape:
                raise ValueError(
                    f"state_dict has a mean of shape {tuple(value.shape)} for {name!r} of shape "
                    f"{tuple(params[name].shape)}"
                )
            if not value.is_floating_point():
                raise TypeError(f"state_dict has a mean of {value.dtype} for {name!r}, not of a floating-point type")
        self.values = {
            name: wide(value.detach()).to(params[name].device, copy=True)
            for name, value in values.items()
            if not value.numel() or summed([(~local([value])[0].isnan()).sum()], [groups(value)])
        }
        self._empty = {}


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element, of the shards of all processes, is finite, as a tensor: no value is read back."""
    shards = local(tensors)
    if any(tensor.is_cpu or tensor.dtype in HALF for tensor in shards):  # where a norm takes ten times as long
        sums = [tensor.sum(dtype=torch.float32 if tensor.dtype in HALF else None) for tensor in shards]
    else:
        sums = list(torch._foreach_norm(shards, 1))
    home = sums[0].device
    if len({(part.device, part.dtype) for part in sums}) > 1:
        sums = [part.to(home, widest(home), non_blocking=True) for part in sums]
    return summed(sums, [groups(tensor) for tensor in tensors]).isfinite()


def in_units(grads: list[Tensor], units: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the loss itself, where a loss scale or a share of a batch multiplied it."""
    if not units:
        return grads
    unit = unit_of(units)
    return [wide(grad) / unit.to(grad.device, non_blocking=True) for grad in grads]


class Gradient:
    """Climb the gradient at w, with a mean of earlier ones: ``d = weight g + mean m``.

    After it, ``m <- decay m + (1 - decay) g``. Where there is no m yet, d = g, which then is m. With ``mean=0``, the
    default, nothing is remembered. While rho is 0 there is no pass at w, and m stays as it is.

    Args:
        weight, mean: the two coefficients, finite numbers; ``weight`` > 0 where ``mean`` is 0, and of no effect then.
        decay: of the exponential mean, >= 0 and < 1.

    Friendly SAM (arXiv:2403.12350) removes the mean: ``Gradient(mean=-sigma, decay=lmbda)``. VaSSO (arXiv:2309.15639)
    climbs it: ``Gradient(weight=theta, mean=1 - theta, decay=1 - theta)``.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> import torch
        >>> from asam import ASAM
        >>> model = torch.nn.Linear(3, 1)
        >>> asam = ASAM(model, direction=Gradient(mean=-1.0, decay=0.6))
        >>> loss = asam.backward(lambda: model(torch.randn(8, 3)).square().mean())
    """

    needs_ascent = True

    def __init__(self, weight: float = 1.0, mean: float = 0.0, decay: float = 0.9) -> None:
        for name, value in (("weight", weight), ("mean", mean)):
            check_number(name, value, "a finite number", math.isfinite)
        if mean == 0 and weight <= 0:
            raise ValueError(f"weight must be a number > 0 where mean is 0, got {weight}")
        self.weight, self.mean = float(weight), float(mean)
        self._memory = Mean(decay)

    def __repr__(self) -> str:
        return f"Gradient(weight={self.weight}, mean={self.mean}, decay={self._memory.decay})"

    @property
    def remembers(self) -> bool:
        """Whether there is a memory, and the size of a loss scale would be in it."""
        return self.mean != 0

    def climbed(self, names: Sequence[str], grads: list[Tensor], units: Sequence[Tensor]) -> list[Tensor]:
        """The directions for these gradients, which are taken up in the mean."""
        if not self.remembers:
            return grads
        values = self._memory.values
        with torch.no_grad():
            grads = in_units(grads, units)
            if self._memory.holds(names, grads):
                # rounded as below: a memory that was saved and loaded is held for certain, one on an accelerator is not
                directions = list(torch._foreach_mul([values[name] for name in names], self.mean))
                torch._foreach_add_(directions, torch._foreach_mul(list(map(wide, grads)), self.weight))
            else:
                weight = self._memory.or_one(self.weight)
                directions = [
                    grad if name not in values else weight(name) * wide(grad) + self.mean * values[name]
                    for name, grad in zip(names, grads, strict=True)
                ]
        self._memory.update(names, grads)
        return directions

    def state_dict(self, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """The memory, if there is one."""
        return self._memory.state_dict(params) if self.remembers else {}

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        if self.remembers:
            self._memory.load(state_dict["mean"], params)


# Steps without any momentum after which a user is told.
PATIENCE = 10


class Momentum:
    """Climb against the momentum of the descent: one forward-backward pass a step, at w + e.

    Args:
        optimizer: climb against its momentum (SGD's ``momentum_buffer``, Adam's ``exp_avg``), as Momentum-SAM does
            (arXiv:2401.12033). By default the direction has a memory of its own, an exponential mean of the gradients
            at w + e.
        decay: of that mean, >= 0 and < 1.
        statistics_every: how often running statistics of batch normalization are taken, by a forward pass at w under
            ``torch.no_grad()``: in the first call and then every so many calls. Models without any do without it. A
            closure that takes gradients itself does so under ``torch.enable_grad()``.

    Before there is a momentum, e = 0; where ten steps leave none in the optimizer's state, a warning says so. The
    momentum of a parameter is climbed also in a step whose loss does not use it. rho is larger than that of a gradient:
    2 to 10 times.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> import torch
        >>> from asam import ASAM
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> asam = ASAM(model, rho=1.0, direction=Momentum(optimizer))
        >>> loss = asam.backward(lambda: model(torch.randn(8, 3)).square().mean())
    """

    needs_ascent = False

    def __init__(self, optimizer: Optimizer | None = None, *, decay: float = 0.9, statistics_every: int = 10) -> None:
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        check_count("statistics_every", statistics_every, 1)
        self._optimizer = optimizer
        if optimizer is not None and all(group.get("momentum") == 0 for group in optimizer.param_groups):
            raise ValueError(_NO_MOMENTUM.format(type(optimizer).__name__))
        self._memory = Mean(decay)
        self.statistics_every = statistics_every
        self._calls = 0
        self._looked = False  # at what the optimizer holds
        self._without = 0  # steps that left no momentum
        self._versions: int | None = None  # of the weights, after the last of them

    def __repr__(self) -> str:
        source = f"decay={self._memory.decay}" if self._optimizer is None else type(self._optimizer).__name__
        return f"Momentum({source})"

    @property
    def remembers(self) -> bool:
        """Whether there is a memory, of the gradients at w + e; the size of a loss scale would be in it."""
        return self._optimizer is None

    def momenta(self, params: Mapping[str, Tensor]) -> list[Tensor | None]:
        """The momentum of each parameter, the tensors themselves, None where there is none yet.

        Raises:
            RuntimeError: the optimizer keeps no momentum, none for these parameters, or one of another shape.
        """
        if self._optimizer is None:
            return [self._memory.values.get(name) for name in params]
        states = [self._optimizer.state.get(param, {}) for param in params.values()]
        found = [next((s[key] for key in MOMENTA if s.get(key) is not None), None) for s in states]
        for (name, param), value in zip(params.items(), found, strict=True):
            if value is not None and (value.shape != param.shape or value.layout != torch.strided):
                raise RuntimeError(
                    f"{type(self._optimizer).__name__} keeps a momentum of shape {tuple(value.shape)}, {value.layout}, "
                    f"for {name!r} of shape {tuple(param.shape)}: use Momentum() with a memory of its own"
                )
        if not self._looked:
            self._look_at_groups(self._optimizer, params)
            self._looked = True
        if all(value is None for value in found):
            if any(states):
                raise RuntimeError(_NO_MOMENTUM.format(type(self._optimizer).__name__))
            self._count(params)
        return found

    def _look_at_groups(self, optimizer: Optimizer, params: Mapping[str, Tensor]) -> None:
        """Raise if the optimizer has no momentum for any of these parameters, warn if it has none for some."""
        moving = {param for group in optimizer.param_groups if group.get("momentum") != 0 for param in group["params"]}
        if moving.isdisjoint(params.values()):
            raise RuntimeError(
                f"{type(optimizer).__name__} has no momentum for any of the parameters that are perturbed: give "
                "Momentum the optimizer that trains this model"
            )
        still = [name for name, param in params.items() if param.requires_grad and param not in moving]
        if still:
            warn(
                f"parameters stay at w, such as {still[0]!r} ({len(still)} of {len(params)}): "
                f"{type(optimizer).__name__} does not hold them, or holds them with momentum=0"
            )

    def _count(self, params: Mapping[str, Tensor]) -> None:
        """Warn, once, where steps move the weights and leave no momentum: the state may be elsewhere."""
        versions = sum([param._version for param in params.values()])
        if self._versions != versions:
            self._without += self._versions is not None
            self._versions = versions
            if self._without == PATIENCE:
                reason = _NO_MOMENTUM.format(type(self._optimizer).__name__)
                warn(f"in {PATIENCE} steps nothing was perturbed: {reason}")

    def looks(self) -> bool:
        """Whether the running statistics are due in this call."""
        due = self._calls % self.statistics_every == 0
        self._calls += 1
        return due

    def observe(self, names: Sequence[str], grads: list[Tensor], units: Sequence[Tensor]) -> None:
        """Take up the gradients at w + e."""
        with torch.no_grad():
            self._memory.update(names, in_units(grads, units))

    def state_dict(self, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """The memory, if there is one, and the number of calls."""
        return {"calls": self._calls, **(self._memory.state_dict(params) if self.remembers else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        check_count("calls", state_dict["calls"], 0)
        if self.remembers:
            self._memory.load(state_dict["mean"], params)
        self._calls = state_dict["calls"]
