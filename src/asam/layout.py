"""How tensors lie in memory: several end to end, one without gaps, and back where they were."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def laid_out(tensors: Sequence[Tensor], shape: Sequence[int] | None = None) -> Tensor:
    """One tensor as it is; several end to end, in a new one. ``shape`` is that of each, if all have the same.

    Their elements are in the order of their indices, in whatever order they lie in memory.
    """
    if len(tensors) == 1:
        return tensors[0]
    if shape is not None:  # in half the time
        return torch.stack(list(tensors)).reshape(-1)  # a copy if all of them are channels_last: then so is the stack
    end_to_end: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return end_to_end


def views(end_to_end: Tensor, like: Sequence[Tensor], shape: Sequence[int] | None = None) -> list[Tensor]:
    """A tensor in which others lie end to end as tensors of their shapes, without a copy.

    ``shape`` is that of each, if all have the same.
    """
    if shape is not None:  # in a third of the time
        return list(end_to_end.view(len(like), *shape).unbind())
    return list(_unflatten_dense_tensors(end_to_end, like))  # type: ignore[no-untyped-call]


def common_order(param: Tensor, grad: Tensor) -> torch.memory_format | None:
    """The order in which both fill their memory without a gap, if there is one."""
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    for order in (torch.contiguous_format, orders.get(param.ndim)):
        if order and param.is_contiguous(memory_format=order) and grad.is_contiguous(memory_format=order):
            return order
    return None


def storage(tensor: Tensor) -> int | None:
    """Which memory a tensor is some of, None if it has none of its own."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else None


def flat(tensor: Tensor) -> Tensor:
    """A tensor that fills its memory without a gap, as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))


def put_back(targets: list[Tensor], originals: list[Tensor]) -> list[Tensor]:
    """Copy the originals into the targets, and return the targets whose shape had to be put back first."""
    try:
        torch._foreach_copy_(targets, originals)
    except RuntimeError:
        resized = []
        for target, original in zip(targets, originals, strict=True):
            if target.shape == original.shape and is_writable(target):
                target.copy_(original)
            else:
                target.data = original.clone()  # the original may be needed again
                resized.append(target)
        return resized
    return []


def is_writable(tensor: Tensor) -> bool:
    """Whether every element has a place of its own, as those of an expanded tensor have not."""
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
