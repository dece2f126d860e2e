"""One process or several: where this one computes, and what a network and its state are then.

torchrun and accelerate launch tell a process its rank by environment variables. With ``ddp`` every process holds the
network and climbs on its own part of the batch; with ``fsdp`` each holds a part of it, and the ascent is that of the
whole batch. What is saved does not depend on either.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from . import InputError
from .run import Run
from .terminal import last_words, refusal

FULL = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Place:
    """Where this process computes, and which of how many it is."""

    device: torch.device
    rank: int = 0
    world: int = 1


@contextmanager
def joined(run: Run) -> Iterator[Place]:
    """This process's place; processes that were launched together are joined for the while.

    Raises:
        InputError: the batch cannot be shared among them, or there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(device_of(run))
        return
    device = device_of(run)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        place = Place(device, dist.get_rank(), world)
        with agreed(place):
            if run.batch_size % world:
                raise InputError(f"batch_size must be a multiple of the {world} processes, got {run.batch_size}")
        yield place
    finally:
        dist.destroy_process_group()


@contextmanager
def agreed(place: Place) -> Iterator[None]:
    """What one of several processes refuses in the block, all do: the first says why, and all leave with exit code 2.

    Without this they would wait for it, or end with errors of their own about its silence.
    """
    refused: InputError | OSError | None = None
    try:
        yield
    except (InputError, OSError) as error:
        if place.world == 1:
            raise
        refused = error
    who = from_all(refused is not None, place)
    if any(who):
        if refused is not None and who.index(True) == place.rank:
            last_words(refusal(refused))
        from_all(None, place)  # torchrun ends all as soon as one has left: none does before it is said
        sys.exit(2)


def device_of(run: Run) -> torch.device:
    """The kind of device of a run.

    Raises:
        InputError: there is none of this kind.
    """
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(run.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or auto, got {run.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {run.device}: there is no such GPU that this torch can use")
    return device


def spread(network: nn.Module, run: Run, place: Place) -> nn.Module:
    """The network to call in training: itself, or shared with the other processes."""
    if place.world == 1:
        return network
    if run.parallel == "fsdp":
        for child in network.children():
            if any(True for _ in child.parameters()):
                fully_shard(child)
        fully_shard(network)
        return network
    ids = [place.device.index] if place.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids)


def weights(network: nn.Module, run: Run, place: Place) -> dict[str, Tensor]:
    """The weights of the whole network, for the first process."""
    if place.world > 1 and run.parallel == "fsdp":
        whole: dict[str, Any] = sharded.get_model_state_dict(network, options=FULL)
        return whole
    return network.state_dict()


def load_weights(network: nn.Module, state: Mapping[str, Tensor], run: Run, place: Place) -> None:
    """Take up the weights of the whole network."""
    if place.world > 1 and run.parallel == "fsdp":
        sharded.set_model_state_dict(network, dict(state), options=FULL)
    else:
        network.load_state_dict(state)


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, run: Run, place: Place) -> dict[str, Any]:
    """The optimizer's state of the whole network, for the first process."""
    if place.world > 1 and run.parallel == "fsdp":
        whole: dict[str, Any] = sharded.get_optimizer_state_dict(network, optimizer, options=FULL)
        return whole
    return optimizer.state_dict()


def load_optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], run: Run, place: Place
) -> None:
    """Take up the optimizer's state of the whole network."""
    if place.world > 1 and run.parallel == "fsdp":
        sharded.set_optimizer_state_dict(network, optimizer, state, options=FULL)
    else:
        optimizer.load_state_dict(state)


def from_all(value: Any, place: Place) -> list[Any]:
    """The value of every process, by rank."""
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    dist.all_gather_object(values, value)
    return values
