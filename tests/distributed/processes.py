"""Checks that several processes run together, each started once for all of them, and what the checks share.

They are forked from one that has imported torch already, so that a launch takes less than a second.
"""

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from slow_reference import Shapes
from torch import nn


def launch(folder, count, *checks):
    """Run the checks one after the other in ``count`` processes; what fails in one of them fails here."""
    arguments = ((folder / "meeting-point").as_uri(), count, checks)
    torch.multiprocessing.start_processes(_process, arguments, count, start_method="forkserver")


def _process(rank, meeting_point, count, checks):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "weights in .* lose part")  # as in pyproject.toml
    # where one process fails, the others wait for it
    minute = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=count, timeout=minute)
    for check in checks:
        torch.manual_seed(0)
        try:
            check(rank)
        except Exception as error:
            error.add_note(f"in {check.__name__}, process {rank} of {count}")
            raise
    dist.destroy_process_group()


def network():
    """A :class:`Shapes` in float64, the same in every process."""
    torch.manual_seed(1)
    return Shapes().double()


def batch(step, rank, size=6):
    """Inputs and targets, others at each step and for each process."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(size, 2, 5, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (size,), generator=generator)


def whole_batch(step, count=2):
    """The batches of all processes as one."""
    return [torch.cat(parts) for parts in zip(*(batch(step, rank) for rank in range(count)), strict=True)]


def loss(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


def everywhere(tensor):
    """The tensors of all processes."""
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor)
    return tensors
