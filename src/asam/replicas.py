"""Replicas of one model in several processes: DistributedDataParallel.

The descent pass is the wrapper's own synchronized backward pass, so the replicas stay equal to the bit. The ascent pass
is not synchronized: each process climbs on its own shard of the batch, which is m-sharpness with m the size of the
shard, as in the SAM paper (arXiv:2010.01412). No value of it leaves the process, unless the mean over all is asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Elements that travel together when gradients are averaged: 16 MB in float32.
BUCKET = 2**22


class Replicas:
    """The DistributedDataParallel wrappers in a model, none in most.

    Raises:
        ValueError: one casts the parameters itself, which only its own backward pass undoes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        if any(wrapper.mixed_precision is not None for wrapper in self._wrappers):
            raise ValueError(
                "model must not use the mixed_precision of DistributedDataParallel, which allows one kind of backward "
                "pass only: use torch.autocast"
            )

    def __bool__(self) -> bool:
        return bool(self._wrappers)

    @contextmanager
    def apart(self, *, accumulating: bool) -> Iterator[None]:
        """Run forward and backward passes that reduce nothing.

        Args:
            accumulating: whether the backward passes write ``.grad``, so that the wrappers' hooks run.

        Raises:
            RuntimeError: they do, and a wrapper counts its hooks (``static_graph``), as the descent pass relies on.
        """
        static = [wrapper for wrapper in self._wrappers if wrapper.static_graph]
        if static and accumulating:
            raise RuntimeError(
                "an ascent pass that writes .grad does not go with static_graph=True of DistributedDataParallel: call "
                "backward(closure) without backward=, or leave static_graph out"
            )
        with ExitStack() as stack:
            for wrapper in self._wrappers:
                stack.enter_context(wrapper.no_sync())
            try:
                for wrapper in static:
                    # else its first backward pass would start a reduction, whether or not it is synchronized
                    wrapper.static_graph = False
                yield
            finally:
                for wrapper in static:
                    wrapper.static_graph = True

    def average_(self, params: Sequence[Tensor], grads: list[Tensor | None]) -> None:
        """Put the means over the processes in the place of the gradients.

        The processes are those of the model's first wrapper, all if it has none. Where this one has no gradient,
        another may have one: it counts as 0. Where none has, there is none.
        """
        if not _connected():
            return
        for members in _buckets(params):
            # copies: autograd may hand out one buffer for two parameters
            values = [torch.zeros_like(params[i]) if (grad := grads[i]) is None else grad for i in members]
            there = values[0].new_tensor([grads[i] is not None for i in members])
            flat = self.mean_(torch.cat([*(value.reshape(-1) for value in values), there]))
            *parts, there = torch.split(flat, [*(value.numel() for value in values), len(members)])
            for i, part, found in zip(members, parts, there.unbind(), strict=True):
                if grads[i] is not None or found:  # which is read where this one has none
                    grads[i] = part.view_as(params[i])

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over those processes, in the tensor's place."""
        if _connected():
            group = self._wrappers[0].process_group if self._wrappers else None
            dist.all_reduce(tensor.div_(dist.get_world_size(group)), group=group)
        return tensor


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def _buckets(params: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the trainable ones, of one device and dtype each and no more elements than fit, or one alone."""
    buckets: list[list[int]] = []
    latest: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    room: dict[tuple[torch.device, torch.dtype], int] = {}
    for i, param in enumerate(params):
        if not param.requires_grad:
            continue
        key = (param.device, param.dtype)
        if key not in latest or param.numel() > room[key]:
            latest[key], room[key] = [], BUCKET
            buckets.append(latest[key])
        latest[key].append(i)
        room[key] -= param.numel()
    return buckets
