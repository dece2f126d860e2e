"""ASAM behind the optimizer interface, for code that insists on ``optimizer.step(closure)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .minimizer import ASAM


def _of_the_base(name: str) -> Any:
    """An attribute of the base optimizer, which a protocol such as Lightning's sees without asking for its value."""
    return property(
        lambda self: getattr(self.base_optimizer, name), lambda self, value: setattr(self.base_optimizer, name, value)
    )


class SharpnessAwareOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose ``step(closure)`` takes the base optimizer's step with the gradient at w + e.

    It owns nothing: ``param_groups``, ``state``, ``defaults``, hooks and ``state_dict`` are those of the base
    optimizer, so a checkpoint of either loads into the other and a scheduler may be built on either.

    Args:
        asam: an :class:`ASAM` or :class:`SAM`. It perturbs the parameters of its model, whatever groups are added.
        base_optimizer: any optimizer that evaluates the loss once a step.

    Raises:
        TypeError: the arguments are of other types, or the base is one that evaluates its closure itself (LBFGS).
        RuntimeError: ``asam`` has a ``combine``, a memory or ``replay_rng``, which ``asam.backward`` alone can do.

    Example:
        >>> from asam import ASAM
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SharpnessAwareOptimizer(ASAM(model), torch.optim.SGD(model.parameters(), lr=0.1))
        >>> inputs = torch.randn(8, 3)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(inputs).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    # has a gradient scaler leave its scale here when it calls step(), which tells step() who calls
    _step_supports_amp_scaling = True

    param_groups = _of_the_base("param_groups")
    state = _of_the_base("state")
    defaults = _of_the_base("defaults")

    def __init__(self, asam: ASAM, base_optimizer: Optimizer) -> None:
        # Optimizer.__init__ would make groups, state and hooks of its own: they are looked up in the base instead
        if not isinstance(asam, ASAM):
            raise TypeError(f"asam must be an ASAM or SAM, got {type(asam).__name__}")
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        if isinstance(base_optimizer, LBFGS | SharpnessAwareOptimizer):
            raise TypeError(
                f"base_optimizer must take its step from the gradient, got {type(base_optimizer).__name__}, which "
                "evaluates the closure itself at points of its own choice"
            )
        asam._check_passes_apart()
        self.asam = asam
        self.base_optimizer = base_optimizer

    def __getattr__(self, name: str) -> Any:
        if name in ("asam", "base_optimizer"):  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"asam": self.asam, "base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float:  # type: ignore[override]
        """Take one step and return the loss at w.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. It runs twice: at w
                and at w + e (once, if rho is 0). What is in ``.grad`` before is cleared too: to accumulate gradients,
                call ``asam.backward`` and the base optimizer's own step.

        Raises:
            RuntimeError: there is no closure, so that there could be no second pass; a gradient scaler is the caller;
                or DistributedDataParallel has ``static_graph``, which takes no ascent pass of this kind.
        """
        scaled = vars(self).pop("found_inf", None) is not None
        vars(self).pop("grad_scale", None)
        if closure is not None and not callable(closure):
            raise TypeError(f"step() takes a closure, got {type(closure).__name__}: write step(lambda: ...)")
        if closure is None:
            raise RuntimeError(
                "step() needs a closure that clears the gradients, computes the loss, calls backward and returns the "
                "loss. If you call asam.backward() yourself, step the base optimizer instead"
            )
        if scaled:
            raise RuntimeError(
                "step(closure) must not be called by a gradient scaler, which does not unscale the gradients that the "
                "closure makes: call asam.backward(closure, backward=...) and have the scaler step the base optimizer"
            )
        with torch.enable_grad():
            self.zero_grad()
            if self.asam.rho > 0:
                # in parameters that the base does not hold, the gradients of earlier steps would add up
                self.asam._clear_grads()
                with self.asam._replicas.apart(accumulating=True):
                    loss = closure()
                with self.asam.perturbed():
                    closure()
            else:
                loss = closure()
        self.base_optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base optimizer's parameters."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. Its parameters are perturbed if they are among those of ``asam``."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the base optimizer."""
        self.base_optimizer.load_state_dict(state_dict)
