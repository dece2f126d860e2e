"""Parameters that are spread over processes: FSDP2 (``fully_shard``) and tensor parallelism, DTensors both.

The arithmetic is on the local shards. What a process needs to know of the others is how large things are: T g, whose
norm is over the whole model, and with layerwise scales each tensor. A size is a largest magnitude and the norm in units
of it, so that it neither underflows nor overflows. The sizes of all shards travel in one collective and are put
together in the same way on each process, so that all of them hold the same bits. Replicas hold equal gradients and are
not asked.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .kernels import nonzero

# A process group, or rather what stands for one in builds of torch without them.
Group = Any


def is_sharded(params: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and any(issubclass(its, kind) for its in set(map(type, params)))


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The local shards, tensors themselves where they are whole. To be called under ``torch.no_grad()``."""
    if not is_sharded(tensors):
        return list(tensors)
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def shard(tensor: Tensor, param: Tensor) -> Tensor:
    """The part of a tensor of the parameter's whole shape that lies here, as the parameter's does."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    spread: Any = param
    if kind is None or not isinstance(param, kind):
        return tensor
    whole: Any = tensor if isinstance(tensor, kind) else kind.from_local(tensor, spread.device_mesh, run_check=False)
    if whole.placements != spread.placements:
        whole = whole.redistribute(spread.device_mesh, spread.placements)
    result: Tensor = whole.to_local()
    return result


def groups(param: Tensor, *, across_rows: bool = False) -> tuple[Group, ...]:
    """The process groups over which a parameter, or each of its rows, is spread: one for each such mesh dimension."""
    mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", ())
    return tuple(
        mesh.get_group(i)
        for i, placement in enumerate(placements)
        if mesh is not None and not placement.is_replicate() and not (across_rows and placement.dim == 0)
    )


def over_shards(sizes: list[Tensor], spread: Sequence[tuple[Group, ...]], params: Sequence[Tensor], q: float) -> None:
    """Put the sizes of whole tensors in the place of those of their local shards, in one collective for each group.

    Args:
        sizes: of shape (2, k), units, such as largest magnitudes, and the q-norms in them, in float32 or float64.
        spread: the groups over which each is to be put together.
        params: the model's, which say on what device their groups communicate and in what dtype to compute.
        q: order of the norm.
    """
    mesh = next(param.device_mesh for param in params if hasattr(param, "device_mesh"))
    dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    for group in dict.fromkeys(group for among in spread for group in among):
        members = [i for i, among in enumerate(spread) if group in among]
        here = torch.cat([sizes[i].to(mesh.device_type, dtype) for i in members], dim=1)
        everywhere = here.new_empty((dist.get_world_size(group), *here.shape))
        dist.all_gather(list(everywhere), here, group=group)
        largest = nonzero(everywhere[:, 0].amax(dim=0))
        norm = torch.linalg.vector_norm(everywhere[:, 1] * (everywhere[:, 0] / largest), q, dim=0)
        parts = torch.split(torch.stack([largest, norm]), [sizes[i].shape[1] for i in members], dim=1)
        for i, part in zip(members, parts, strict=True):
            sizes[i] = part


def summed(values: Sequence[Tensor], spread: Sequence[tuple[Group, ...]]) -> Tensor:
    """The sum over tensors, of which each local shard has a part: one collective for each group.

    Args:
        values: of one shape and device each.
        spread: the groups over which each is to be added up.
    """
    parts: dict[tuple[Group, ...], list[Tensor]] = {}
    for layout, value in zip(spread, values, strict=True):
        parts.setdefault(layout, []).append(value)
    totals = {layout: torch.stack(members).sum(dim=0) for layout, members in parts.items()}
    for layout, total in totals.items():
        for group in layout:
            dist.all_reduce(total, group=group)
    return torch.stack(list(totals.values())).sum(dim=0)


def mean_(value: Tensor, params: Iterable[Tensor]) -> Tensor:
    """The mean over the processes that these parameters are spread over, in the tensor's place."""
    mesh = next(param.device_mesh for param in params if hasattr(param, "device_mesh"))
    for i in range(mesh.ndim):
        dist.all_reduce(value, group=mesh.get_group(i))
    return value.div_(mesh.size())


def widest(device: torch.device) -> torch.dtype:
    """The dtype to add up in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_sharding(model: nn.Module, chosen: Mapping[str, Tensor]) -> bool:
    """Whether any parameter of the model is spread over processes.

    Raises:
        TypeError: a module is wrapped by FSDP1, which has no such parameters.
        ValueError: FSDP2 has left out a parameter that is to be perturbed, so that its gradient is not the whole one.
    """
    first = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if first is not None and any(isinstance(module, first) for module in model.modules()):
        raise TypeError("model must not be wrapped by FullyShardedDataParallel: use fully_shard (FSDP2)")
    if _fsdp_modules(model):
        for name, param in chosen.items():
            if not is_sharded([param]):
                raise ValueError(
                    f"params must be sharded if the model is, and {name!r} is not: call fully_shard on the whole model "
                    "too, or leave it out with params=..."
                )
    return is_sharded(model.parameters())


def _fsdp_modules(model: nn.Module) -> list[Any]:
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


class Unsharded:
    """The whole parameters that FSDP2 modules may still hold, and would compute with after the shards have moved."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = _fsdp_modules(model)

    def let_go(self) -> None:
        """Have the shards gathered anew before the next pass, and be the parameters of the modules until then."""
        for module in self.modules:
            module.reshard()

    def abort(self) -> None:
        """The same after an exception, which may have left modules in the middle of a pass."""
        for module in self.modules:
            if hasattr(module, "reset_iter_state"):
                with suppress(RuntimeError):  # it is for roots; which modules are, none of them tells
                    module.reset_iter_state()


def _loaded(module: str, name: str) -> type[Any] | None:
    """A class, if its module has been imported: else there are no instances, and to import it takes long."""
    return getattr(sys.modules.get(module), name, None)
