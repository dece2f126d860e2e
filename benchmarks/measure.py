"""Paired timing, peak memory and the settings that both need.

Two clocks of the same machine do not agree from one minute to the next, but two variants measured in the same round
do: a round runs every variant once, in an order shuffled by the round's number, and only ratios within a round are
compared. The clock is the process's CPU time, the statistic the median over rounds, the interval a bootstrap of it.
"""

import gc
import multiprocessing
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# glibc gives large blocks back to the system as they are freed; the page faults of getting them again bias ratios by
# 3 to 6 %. It reads these before main() runs, hence the second start.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "KINETO_LOG_LEVEL": "99",  # the profiler announces itself on stderr
}


def settle() -> None:
    """Start the process again under ENVIRONMENT, unless it is set, and keep it on one thread of one core."""
    environment = {**ENVIRONMENT, **os.environ}
    if environment != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, environment)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def in_a_process_of_its_own(call: Callable[[], Any]) -> Any:
    """What the call returns, in a fork of this process: in memory that was in use before, all is slower."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(call).result()


def hardware() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds_of(step: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of one call, from the time of ``repeats`` in a row."""
    start = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - start) / repeats


def clocked(step: Callable[[], object], repeats: int = 1, length: int = 1) -> Callable[[], float]:
    """The step, or each of the ``length`` steps that it takes, as something that returns its CPU seconds."""
    return lambda: seconds_of(step, repeats) / length


def rounds_of(variants: dict[str, Callable[[], float]], budget: float, at_least: int = 3) -> dict[str, list[float]]:
    """What each variant returned in each round, for as many rounds as begin within ``budget`` seconds of wall clock."""
    for variant in variants.values():  # the first call of anything pays for set-up
        variant()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        end, number = time.monotonic() + budget, 0
        while number < at_least or time.monotonic() < end:
            order = list(variants)
            random.Random(number).shuffle(order)
            for name in order:
                samples[name].append(variants[name]())
            number += 1
    finally:
        gc.enable()
    return samples


@dataclass(frozen=True)
class Interval:
    """A median and its bootstrap 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3f}"
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def ratio(samples: list[float], reference: list[float], resamples: int = 1000) -> Interval:
    """The median over rounds of ``samples / reference``."""
    ratios = torch.tensor(samples, dtype=torch.float64) / torch.tensor(reference, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ratios), (resamples, len(ratios)), generator=generator)
    low, high = ratios[draws].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(ratios.quantile(0.5)), float(low), float(high))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of(step: Callable[[], object]) -> int:
    """Operations that torch dispatches in a call, views included; one on a list of tensors is one."""
    with _Operations() as operations:
        step()
    return operations.count


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes of tensors alive during the call beyond those alive before it.

    From every allocation and release of torch's CPU allocator, so that temporaries inside kernels count too. It does
    not see the release of what was allocated before: the call must allocate itself whatever it lets go.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results.events()
    changes = [event.nbytes() for event in results if event.name() == "[memory]"]  # in order of time
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak
