"""The command line in a process of its own that is killed by SIGKILL in the middle of a training."""

import multiprocessing
import os
import sys

import torch

from asam.experiments import files, sessions
from asam.experiments.cli import run

SERVER = multiprocessing.get_context("forkserver")


def killed(arguments, *, step=0, write=0):
    """Killed after so many steps of this process, or when half of the so-manieth checkpoint is written."""
    process = SERVER.Process(target=_train, args=([str(argument) for argument in arguments], step, write))
    process.start()
    process.join()
    assert process.exitcode == -9


def _train(arguments, step, write):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)

    class Killed(sessions.Training):
        def advance(self, epoch_done, step_done):
            super().advance(epoch_done, _then_killed(step_done, step))

    sessions.Training = Killed
    files.os.fsync = _half_written(os.fsync, write)
    sys.argv = ["asam", "train", *arguments]
    sys.exit(run())


def _then_killed(step_done, step):
    taken = 0

    def counted():
        nonlocal taken
        step_done()
        taken += 1
        if taken == step:
            os.kill(os.getpid(), 9)

    return counted


def _half_written(fsync, write):
    written = 0

    def counted(descriptor):
        nonlocal written
        if "checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            written += 1
            if written == write:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), 9)
        fsync(descriptor)

    return counted
