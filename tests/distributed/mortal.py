"""Processes of a group of which some may die, hang or fail: what each of them leaves, within a bounded time.

They are forked from one that has imported torch already, so that a launch takes less than a second.
"""

import multiprocessing
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")


def left_by(folder, check, *arguments, count=2, seconds=60, timeout=30):
    """Exit codes of the processes that ran ``check(folder, rank, *arguments)``, once all have ended.

    Args:
        folder: theirs to write to.
        check: what they run.
        arguments: its further arguments.
        count: the number of processes.
        seconds: those that have not ended by then are killed, and the test fails.
        timeout: of a collective, in seconds.
    """
    processes = [
        SERVER.Process(target=_process, args=(folder, rank, count, timeout, check, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hung:
        processes[rank].kill()
    assert not hung, f"{check.__name__}: processes {hung} did not end within {seconds} seconds"
    return [process.exitcode for process in processes]


def _process(folder, rank, count, timeout, check, arguments):
    os.dup2(os.open(folder / f"stderr-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting-point").as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )
    check(folder, rank, *arguments)
    os._exit(0)  # without a farewell: the others may be gone
