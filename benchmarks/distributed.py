"""What ASAM adds under DistributedDataParallel and FSDP2: two gloo processes on the CPU, one thread each.

    python benchmarks/distributed.py [--seconds S]

All variants once in each round, in an order shuffled by the round's number; wall clock between barriers, medians, and
ratios within a round with bootstrap 95 % intervals. The yardstick is two bare passes, the first in ``no_sync()``, since
the ascent reduces nothing; for ``sync_ascent=True``, and under FSDP2, whose gradients are shards of the whole, both are
reduced. "Again" is the yardstick once more.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from measure import hardware, median, ratio
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from workloads import CLASSES, mlp

from asam import ASAM

SIZES = {"670k parameters": (784, 512, 512), "10k parameters": (64, 128)}
BARE, REDUCED = "two bare passes, the second reduced", "two bare passes, both reduced"
BATCH, AT_LEAST = 128, 3


def network(widths: tuple[int, ...]) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """An MLP and the loss of a model on one fixed batch, the same on each process but for the draws."""
    torch.manual_seed(0)
    model = mlp(*widths)
    inputs = torch.randn(BATCH, widths[0])
    targets = torch.arange(BATCH) % CLASSES
    return model, lambda model: nn.functional.cross_entropy(model(inputs), targets)


def replicated(widths: tuple[int, ...]) -> tuple[nn.Module, dict[str, Callable[[], object]]]:
    bare, loss = network(widths)
    model = DistributedDataParallel(bare)

    def passes(first_reduced: bool) -> None:
        with nullcontext() if first_reduced else model.no_sync():
            loss(model).backward()
        model.zero_grad()
        loss(model).backward()

    local, shared = ASAM(model), ASAM(model, sync_ascent=True)
    return model, {
        BARE: lambda: passes(False),
        f"{BARE}, again": lambda: passes(False),
        "ASAM": lambda: local.backward(lambda: loss(model)),
        REDUCED: lambda: passes(True),
        "ASAM, sync_ascent": lambda: shared.backward(lambda: loss(model)),
    }


def sharded(widths: tuple[int, ...]) -> tuple[nn.Module, dict[str, Callable[[], object]]]:
    model, loss = network(widths)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)

    def passes() -> None:
        loss(model).backward()
        model.zero_grad()
        loss(model).backward()

    asam = ASAM(model)
    return model, {
        REDUCED: passes,
        f"{REDUCED}, again": passes,
        "ASAM, FSDP2": lambda: asam.backward(lambda: loss(model)),
    }


def measured(model: nn.Module, variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each variant, round by round, on this process."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    going, number, end = torch.ones(()), -1, 0.0
    while going:
        for name in random.Random(number).sample(list(variants), len(variants)):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            variants[name]()
            dist.barrier()
            if number >= 0:  # the round before pays for set-up
                samples[name].append(time.perf_counter() - start)
        end = end or time.monotonic() + seconds
        number += 1
        going.fill_(number < AT_LEAST or time.monotonic() < end)
        dist.broadcast(going, 0)  # all stop together
    return samples


def process(rank: int, meeting_point: str, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    for title, widths in SIZES.items():
        for name, parallel in (("DistributedDataParallel", replicated), ("FSDP2", sharded)):
            samples = measured(*parallel(widths), seconds)
            if rank == 0:
                yardstick: list[float] = []
                table = Table(
                    "variant", "milliseconds", "x its yardstick", title=f"{name}, {title}", title_justify="left"
                )
                for variant, times in samples.items():  # each after its yardstick
                    yardstick = times if variant in (BARE, REDUCED) else yardstick
                    table.add_row(variant, f"{1e3 * median(times):.3g}", str(ratio(times, yardstick)))
                Console(width=100).print(table, f"{len(times)} rounds")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network and each way")
    seconds = parser.parse_args().seconds
    if not 0 < seconds < math.inf:
        parser.error(f"--seconds must be a finite number > 0, got {seconds}")
    print(f"hardware: {hardware()}, torch: {torch.__version__}, two gloo processes")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, ((Path(folder) / "meeting-point").as_uri(), seconds), 2)


if __name__ == "__main__":
    main()
