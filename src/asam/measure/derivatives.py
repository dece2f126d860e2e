"""Second derivatives by autograd, and where there are none."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NO_DERIVATIVE = re.compile(r"derivative|differentiat|double backward|reentrant|donated buffers")
# What every backward pass runs that is marked so.
_ONCE = once_differentiable(lambda ctx: None).__code__


class NoSecondDerivative(ValueError):  # noqa: N818
    """The loss has a gradient that cannot be differentiated."""


def why_there_is_none(error: Exception) -> str | None:
    """What torch says if it cannot differentiate; all else that goes wrong in a backward pass is not about that."""
    message = str(error)
    return message.partition("\n")[0] if _NO_DERIVATIVE.search(message) else None


def check_twice_differentiable(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Raise if a function between the parameters and the loss has a backward pass that autograd does not follow.

    Autograd itself raises only where the parameters before that function have a part in its gradient: where they have
    none, their second derivatives would be taken for 0.
    """
    measured = {id(param) for param in params}
    users: dict[Any, list[Any]] = {loss.grad_fn: []}
    reached, nodes = [], [loss.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if id(getattr(node, "variable", None)) in measured:
            reached.append(node)
        for following, _ in getattr(node, "next_functions", ()):
            if following is not None and following not in users:
                nodes.append(following)
            users.setdefault(following, []).append(node)
    seen = set(reached)
    while reached:
        node = reached.pop()
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            name = getattr(function, "__name__", "a function")
            raise NoSecondDerivative(
                f"the loss has no second derivative: the backward pass of {name} is marked with @once_differentiable"
            )
        reached += [user for user in users[node] if user not in seen]
        seen.update(users[node])


def differentiated(
    outputs: Sequence[Tensor], params: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """A gradient that can be differentiated, or the product of its derivative with the weights; the graph is kept."""
    try:
        return torch.autograd.grad(
            outputs, params, weights, retain_graph=True, create_graph=weights is None, allow_unused=True
        )
    except RuntimeError as error:
        if reason := why_there_is_none(error):
            raise NoSecondDerivative(f"the loss has no second derivative: {reason}") from error
        raise
