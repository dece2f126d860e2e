"""Forward and backward passes, and the gradients that they leave for the parameters that are perturbed.

The ascent pass leaves ``.grad`` alone: what earlier micro-batches have put there is to be added to, not climbed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .closures import (
    NESTED_BACKWARD,
    Closure,
    check_reaches_parameters,
    descend,
    held,
    loss_of,
    own_graph,
    total,
    unit_of,
)
from .perturbation import modules_of, parameters_of
from .replicas import Replicas
from .sharding import Unsharded, is_sharded, mean_


class Ascent(NamedTuple):
    """The loss at w, the parameters that have a gradient there, and by what a ``backward`` multiplied the losses."""

    loss: Tensor
    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    units: list[Tensor]


class Passes:
    """The passes of a model.

    Args:
        model: the module.
        params: what is perturbed, by name.
        replicas, unsharded: the wrappers in the model that have a word in its passes.
        sharded: whether any parameter of the model is spread over processes.
        caller: who does not take sparse gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        replicas: Replicas,
        unsharded: Unsharded,
        sharded: bool,
        caller: str,
    ) -> None:
        self._model, self._params = model, params
        self._replicas, self._unsharded, self._sharded = replicas, unsharded, sharded
        self._caller = caller
        self._missing: list[bool] | None = None  # the parameters without a gradient, last time

    def through_grad(self, backward: Callable[[Tensor], Any] | None) -> bool:
        """Whether the gradients at w can be had in ``.grad`` alone."""
        # the graph of a sharded model ends in whole parameters that come and go
        return self._sharded or backward is not None

    def ascend(
        self, closures: Sequence[Closure], backward: Callable[[Tensor], Any] | None, *, averaged: bool
    ) -> Ascent:
        """Run the closures at w for their gradients; no ``.grad`` is changed.

        Args:
            closures: the losses, which add up.
            backward: the user's, None for ``loss.backward()``.
            averaged: whether the gradients are averaged over the replicas.
        """
        through = self.through_grad(backward)
        units: list[Tensor] = []
        with self._replicas.apart(accumulating=through) if self._replicas else nullcontext():
            if through:
                params = dict(self._params)
                loss, grads = self._into_grad(closures, backward, units)
                self.look_at_missing(grads)
            else:
                params = {name: param for name, param in self._params.items() if param.requires_grad}
                loss, grads = self._apart_from_grad(closures, list(params.values()))
            return Ascent(loss, *self.present(params, grads, averaged=averaged), units)

    def _into_grad(
        self, closures: Sequence[Closure], backward: Callable[[Tensor], Any] | None, units: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients by a backward pass into ``.grad``, with what was there set aside for the while."""
        everything = self._everything()
        earlier = [param.grad for param in everything]
        try:
            _clear(everything)
            loss = descend(closures, backward, units)
            return loss, [param.grad for param in self._params.values()]
        finally:
            for param, grad in zip(everything, earlier, strict=True):
                param.grad = grad

    def _apart_from_grad(
        self, closures: Sequence[Closure], params: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of these parameters alone."""
        losses: list[Tensor] = []
        grads: list[Tensor | None] = []
        for closure in closures:
            loss = loss_of(closure)
            if params:
                before = held(params)
                with own_graph():
                    new = torch.autograd.grad(loss, params, allow_unused=True)
                if held(params) != before:
                    raise RuntimeError(NESTED_BACKWARD)
                # not in place: autograd may hand out one buffer for two parameters
                grads = [_sum(grad, more) for grad, more in zip(grads, new, strict=True)] if grads else list(new)
                self.look_at_missing(new, loss)
            losses.append(loss.detach())
        return total(losses), grads

    def look_at_missing(self, grads: Sequence[Tensor | None], loss: Tensor | None = None) -> None:
        """Raise if parameters have no gradient for a reason that should be told.

        To find out takes long: it is done when others are missing than before.
        """
        missing = [grad is None for grad in grads]
        if missing != self._missing:
            if loss is not None:
                check_reaches_parameters(loss)
            self._check_still_the_models()
            self._missing = missing

    def present(
        self, params: Mapping[str, nn.Parameter], grads: list[Tensor | None], *, averaged: bool
    ) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, parameters and gradients of the parameters that have a gradient, on any process if averaged."""
        self.check_dense(params, grads)
        if averaged and not self._sharded:
            self._replicas.average_(list(params.values()), grads)
        there = [grad is not None for grad in grads]
        if not any(there):
            raise RuntimeError(
                "no perturbed parameter has a gradient: the loss must depend on a parameter of the model that "
                "requires one, and perturbed() needs loss.backward() before it"
                + (
                    "; with FSDP2, make ASAM after fully_shard, and leave set_requires_gradient_sync(True)"
                    if is_sharded(self._model.parameters())
                    else ""
                )
            )
        values = [grad for grad in grads if grad is not None]
        return list(compress(params, there)), list(compress(params.values(), there)), values

    def unit(self, units: list[Tensor], *, averaged: bool) -> list[Tensor]:
        """By what the losses were multiplied whose gradients these are, of all processes where those are averaged."""
        if not units or not (averaged or self._sharded):
            return units
        unit = unit_of(units).clone()
        return [mean_(unit, self._params.values()) if self._sharded else self._replicas.mean_(unit)]

    def look_for_any(self, grads: Sequence[Tensor | None]) -> None:
        """Raise if no parameter has a gradient; those of shards may come in a later call."""
        if not self._sharded and all(grad is None for grad in grads):
            self.present({}, [], averaged=False)

    def check_dense(self, params: Mapping[str, nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        """Raise if any of the gradients of these parameters is sparse."""
        layouts = [torch.strided if grad is None else grad.layout for grad in grads]
        if layouts.count(torch.strided) < len(layouts):
            name = next(name for name, layout in zip(params, layouts, strict=True) if layout != torch.strided)
            raise RuntimeError(
                f"{self._caller} does not take sparse gradients, and {name!r} has one: build the layer with "
                "sparse=False, or leave it out with params=..."
            )

    def _check_still_the_models(self) -> None:
        """Raise if the model has got another parameter in the place of one that was there at first."""
        now = dict(self._model.named_parameters(remove_duplicate=False))
        ours = {id(param) for param in self._params.values()}
        replaced = [
            name
            for name, param in self._params.items()
            if name in now and id(now[name]) not in ours and now[name].requires_grad and param.requires_grad
        ]
        # FSDP2 puts shards in the place of parameters, and whole ones in the place of shards for a while
        if replaced and not (self._sharded or is_sharded(now.values())):
            raise RuntimeError(
                f"the model has another parameter {replaced[0]!r} than when {self._caller} was made, as after "
                f"load_state_dict(..., assign=True): make {self._caller} and the optimizer again"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run a block that finds no gradients, and add what it leaves in ``.grad`` to those that were there.

        Raises:
            RuntimeError: there were some, under DistributedDataParallel, which reduces what is accumulated as a whole.
        """
        if self._replicas and any(param.grad is not None for param in self._everything()):
            raise RuntimeError(
                "combine, and a Momentum with a memory of its own, need the gradient of one call alone, which "
                "DistributedDataParallel does not give where gradients accumulate: set them to None after each call "
                "with optimizer.zero_grad(), without set_to_none=False, or use Momentum(optimizer)"
            )
        everything = self._everything()
        earlier = [param.grad for param in everything]
        new: list[Tensor | None] = [None] * len(everything)
        try:
            _clear(everything)
            yield
            new = [param.grad for param in everything]
        finally:
            for param, before, grad in zip(everything, earlier, new, strict=True):
                if before is None or grad is None:
                    param.grad = grad if before is None else before
                elif before.layout == torch.strided:
                    param.grad = before.add_(grad)
                else:  # a sparse one may be added to a dense one, not the other way round
                    param.grad = grad + before

    def _everything(self) -> list[Tensor]:
        """The parameters of the model, those that are perturbed among them."""
        self._unsharded.let_go()
        # a sharded model may hold whole parameters in place of the shards
        everything = [*parameters_of(self._model, modules_of(self._model)), *self._params.values()]
        return list({id(param): param for param in everything}.values())


def _clear(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad = None


def _sum(grad: Tensor | None, more: Tensor | None) -> Tensor | None:
    if grad is None or more is None:
        return more if grad is None else grad
    return grad + more
