"""A training in a process of its own, which ends it in the middle of a step; it can be resumed from its checkpoint.

The processes are forked from one that has imported torch already: each takes a tenth of a second.
"""

import multiprocessing
import os
import signal
import sys

import torch
from torch import nn

from asam import ASAM

SERVER = multiprocessing.get_context("forkserver")
STEPS = 8


def exit_code(target, *arguments, seconds=60):
    """How a process ended that ran ``target``: it is killed, and the test fails, if it takes longer."""
    process = SERVER.Process(target=_alone, args=(target, arguments))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{target.__name__} did not end within {seconds} seconds")
    return process.exitcode


def _alone(target, arguments):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # tracebacks that are expected
    torch.set_num_threads(1)
    target(*arguments)


class Training:
    """Batch norm, dropout, momentum, a schedule of rho and of the learning rate: everything that has a state."""

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.asam = ASAM(self.model, rho=0.5)
        self.parts = [self.model, self.optimizer, self.scheduler, self.asam]
        self.step = 0

    def run(self, fault=lambda step, call: None, each=lambda training: None):
        """Train to the end. ``fault`` is called in each forward pass, ``each`` before each step and after the last."""
        each(self)
        while self.step < STEPS:
            calls = []
            generator = torch.Generator().manual_seed(self.step)
            inputs, targets = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)

            def closure(calls=calls, inputs=inputs, targets=targets):
                calls.append(None)
                loss = nn.functional.cross_entropy(self.model(inputs), targets)
                fault(self.step, len(calls))
                return loss

            self.asam.backward(closure)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.asam.rho *= 0.9
            self.step += 1
            each(self)
        return self.state()

    def state(self):
        return {"step": self.step, "rng": torch.get_rng_state(), "parts": [part.state_dict() for part in self.parts]}

    def save(self, path):
        """All or nothing: a kill in the middle leaves the file before."""
        torch.save(self.state(), f"{path}.new")
        os.replace(f"{path}.new", path)

    def resume(self, path):
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(values)
        return self


def at(step, call, act):
    """A fault in the forward pass ``call`` (1 is the ascent, 2 the descent) of that step."""
    return lambda *now: act() if now == (step, call) else None


def killed(path, step, call):
    """Killed by SIGKILL, which nothing in the process sees."""
    fault = at(step, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
    Training().run(fault, each=lambda training: training.save(path))


def signalled(path, number, call):
    """Ended by a signal that raises an exception; the last word has the checkpoint in ``finally``."""
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    training = Training()
    try:
        training.run(at(5, call, lambda: os.kill(os.getpid(), number)))
    finally:
        training.save(path)
