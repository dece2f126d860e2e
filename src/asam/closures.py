"""What the user hands over: closures that compute a loss, checked where they are run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Tensor]

NESTED_BACKWARD = (
    "the model's backward pass runs another one, which writes .grad (a reversible layer, a checkpoint of its own): "
    "torch.autograd.grad does not see that gradient, pass backward=torch.Tensor.backward"
)


def as_closures(argument: str, value: Closure | Sequence[Closure]) -> Sequence[Closure]:
    """The closures as a sequence, or an error that names the argument."""
    closures: Sequence[Closure] = value if isinstance(value, Sequence) else [value]
    if not closures:
        raise ValueError(f"{argument} must be a callable or a sequence of them, got an empty sequence")
    for item in closures:
        if not callable(item):
            raise TypeError(
                f"{argument} must be a callable that returns the loss, or a sequence of them, "
                f"got {type(item).__name__}: write backward(lambda: loss_fn(model(inputs), targets))"
            )
    return closures


def forward_only(closure: Closure, params: Sequence[Tensor]) -> Closure:
    """The closure, which is refused if it leaves something else in ``.grad``, as ``loss.backward()`` does."""

    def looked_at() -> Tensor:
        before = held(params)
        loss = closure()
        changed = [param.grad for param, then, now in zip(params, before, held(params), strict=True) if now != then]
        if any(grad is not None and (grad.layout != torch.strided or grad.any()) for grad in changed):
            raise RuntimeError(
                "the closure changes .grad: it must compute the loss and return it, without loss.backward(), which "
                "backward(closure) calls itself; a closure that does so is for SharpnessAwareOptimizer.step"
            )
        return loss

    return looked_at


def held(params: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """What is in .grad: which tensors, of which version."""
    grads = [param.grad for param in params]
    return [None if grad is None else (id(grad), grad._version) for grad in grads]


def loss_of(closure: Closure) -> Tensor:
    """The loss that a closure returns, once it is known to be a scalar with a graph."""
    loss = checked(closure())
    if not loss.requires_grad:
        raise RuntimeError(
            "the closure's loss has no graph: compute it from the model without torch.no_grad(), inference_mode() or "
            ".detach(), with a parameter that requires a gradient"
        )
    return loss


def checked(loss: Tensor) -> Tensor:
    """The loss, once it is known to be a scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"closure must return the loss, a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"closure must return a scalar tensor, got shape {tuple(loss.shape)}: take its mean or sum")
    if loss.is_complex():
        raise TypeError("closure must return a real loss, got a complex one: take its real part or magnitude")
    return loss


def check_reaches_parameters(loss: Tensor) -> None:
    """Refuse a graph with reentrant checkpoints in it."""
    if has_reentrant_checkpoint(loss):
        raise RuntimeError(
            "parameters behind torch.utils.checkpoint with use_reentrant=True have no gradient in the ascent pass: "
            "pass backward=torch.Tensor.backward, or checkpoint with use_reentrant=False"
        )


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether there is one in the graph of the loss, of which the parameters behind it are no part."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes_of(loss))


def nodes_of(loss: Tensor) -> set[Any]:
    """The nodes of the loss's graph."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return seen


def descend(closures: Sequence[Closure], backward: Callable[[Tensor], Any] | None, units: list[Tensor]) -> Tensor:
    """Run every closure and its backward pass, and return the sum of the losses.

    Into ``units`` goes by what the user's ``backward`` multiplies each loss, a loss scale or a share of a batch: it is
    the gradient that arrives at the loss.
    """
    losses = []
    for closure in closures:
        loss = loss_of(closure)
        with own_graph():
            if backward is None:
                torch.autograd.backward(loss)
            else:
                # a loss of shape (1,) is a scalar too
                handle = loss.register_hook(lambda unit: units.append(unit.detach().reshape(())))  # type: ignore[no-untyped-call]
                try:
                    backward(loss)
                finally:
                    handle.remove()  # a parameter that is the loss itself lives on
        losses.append(loss.detach())
    return total(losses)


@contextmanager
def own_graph() -> Iterator[None]:
    """Say what it most likely means here where a graph was used before, or is older than w + e."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            found = "part of the loss's graph was made outside the closure"
        elif "modified by an inplace operation" in str(error):
            found = "part of the loss's graph was made outside the closure, at w, or the closure changes it in place"
        else:
            raise
        raise RuntimeError(
            f"{found}: compute the model's outputs in the closure, which is called at w and at w + e"
        ) from error


def unit_of(units: Sequence[Tensor]) -> Tensor:
    """By what the losses were multiplied, by the largest number where they differ."""
    if len(units) == 1:
        return units[0]
    numbers = torch.stack(list(units))
    return numbers.take(numbers.abs().argmax())


def total(losses: Sequence[Tensor]) -> Tensor:
    """The sum of the losses."""
    scalars = [loss if loss.ndim == 0 else loss.reshape(()) for loss in losses]
    return scalars[0] if len(scalars) == 1 else torch.stack(scalars).sum()
