"""NaN, a failing loader, out of memory, Ctrl-C and a signal that asks for a checkpoint, in the middle of a step."""

import signal
import subprocess
import sys

import pytest
import torch
from slow_reference import assert_near, assert_same, gradients, shapes_problem, weights
from torch import nn

from asam import ASAM


class Run:
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.asam = ASAM(self.model, rho=0.5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def loss(self, batch):
        return self.model(batch).square().mean()

    def step(self, closure):
        loss = self.asam.backward(closure)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def state(self):
        momenta = {str(i): s["momentum_buffer"] for i, s in enumerate(self.optimizer.state.values())}
        return {name: value.clone() for name, value in {**self.model.state_dict(), **momenta}.items()}


def batches(n=4, size=8):
    return torch.randn(n, size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loop_that_skips_steps_of_a_loss_that_is_not_finite(value):
    # the usual guard; the skipped batch leaves nothing behind but the batch norm statistics of its pass at w
    ours, without = Run(), Run()
    for number, batch in enumerate(batches()):
        loss = ours.asam.backward(lambda n=number, b=batch: ours.loss(b) * (value if n == 1 else 1))
        assert bool(torch.isfinite(loss)) == (number != 1)
        if torch.isfinite(loss):
            ours.optimizer.step()
        ours.optimizer.zero_grad()
        if number == 1:
            with torch.no_grad():
                without.model(batch)
        else:
            without.step(lambda b=batch: without.loss(b))
    assert_same(ours.state(), without.state())


def test_a_loss_of_zero():
    model, closure = shapes_problem()
    before = weights(model)
    loss = ASAM(model).backward(lambda: closure() * 0)
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model).values())
    assert_same(weights(model), before)


@pytest.mark.parametrize("failing", ["between the steps", 1, 2])
def test_a_loader_that_fails(failing):
    # the loop catches it and goes on with the next batch, as if that one had not been
    ours, without = Run(), Run()
    data, calls = batches(), []

    def load(number):
        calls.append(1)
        if number == 1 and failing in ("between the steps", len(calls)):
            raise OSError("disk")
        return data[number]

    for number in range(len(data)):
        calls.clear()
        try:
            if failing == "between the steps":
                batch = load(number)
                ours.step(lambda b=batch: ours.loss(b))
            else:
                ours.step(lambda n=number: ours.loss(load(n)))
        except OSError:
            ours.optimizer.zero_grad()
        if number != 1:
            without.step(lambda b=data[number]: without.loss(b))
        elif failing == 2:  # it failed after the pass at w had moved the statistics
            with torch.no_grad():
                without.model(data[number])
    assert_same(ours.state(), without.state())


def test_out_of_memory_and_then_a_smaller_batch():
    ours, smaller = Run(), Run()
    smaller.model.load_state_dict(ours.model.state_dict())
    for batch in batches():
        statistics = {name: buffer.clone() for name, buffer in ours.model.named_buffers()}
        calls = []

        def too_large(batch=batch, calls=calls):
            calls.append(1)
            loss = ours.loss(batch)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("out of memory")
            return loss

        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            ours.step(too_large)
        ours.optimizer.zero_grad()
        # the pass at w went through with the whole batch: its statistics are taken back by hand, as in a plain loop
        assert ours.model[1].num_batches_tracked == statistics["1.num_batches_tracked"] + 1
        ours.model.load_state_dict(statistics, strict=False)
        ours.step(lambda b=batch[:4]: ours.loss(b))
        smaller.step(lambda b=batch[:4]: smaller.loss(b))
        assert_same(ours.state(), smaller.state())


def test_out_of_memory_in_a_part_of_an_accumulated_batch():
    # what earlier micro-batches have added is kept, so that the same part may be taken again in halves
    first, second = batches(2)
    whole, parts = Run(), Run()
    for run in (whole, parts):
        run.model[1] = nn.Identity()
        run.asam = ASAM(run.model, rho=0.5)
        run.asam.backward(lambda run=run: run.loss(first))
    earlier = gradients(parts.model)

    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        parts.asam.backward(too_large)
    assert_same(gradients(parts.model), earlier)
    parts.asam.backward([lambda half=half: parts.loss(half) / 2 for half in (second[:4], second[4:])])
    whole.asam.backward(lambda: whole.loss(second))
    assert_near(gradients(parts.model), gradients(whole.model))


SCRIPT = """
import os
import signal

import torch

from asam import ASAM

model = torch.nn.Linear(4, 1)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
calls = []


def closure():
    calls.append(1)
    loss = model(torch.ones(8, 4)).square().mean()
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return loss


try:
    ASAM(model).backward(closure)
finally:
    print(len(calls), all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()))
"""


def test_ctrl_c_in_the_descent_pass(tmp_path):
    (tmp_path / "training.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "training.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True"]
    assert done.stderr.strip().endswith("KeyboardInterrupt")
    assert done.returncode == -signal.SIGINT


def test_a_signal_that_asks_for_a_checkpoint_gets_one_after_the_step(tmp_path):
    # in the handler the weights may be in the middle of a step: note the wish there, and save between the steps
    run, undisturbed, wishes, in_the_handler = Run(), Run(), [], []
    before = weights(run.model)

    def on_signal(number, frame):
        wishes.append(number)
        in_the_handler.append(weights(run.model))

    def closure(batch, calls):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return run.loss(batch)

    handler = signal.signal(signal.SIGTERM, on_signal)
    try:
        for batch in batches():
            run.step(lambda b=batch, calls=[]: closure(b, calls))
            if wishes:
                torch.save(run.model.state_dict(), tmp_path / "checkpoint.pt")
                break
    finally:
        signal.signal(signal.SIGTERM, handler)

    undisturbed.step(lambda: undisturbed.loss(batches()[0]))
    assert_same(torch.load(tmp_path / "checkpoint.pt"), undisturbed.model.state_dict())
    # the trap: what the handler sees is w + e
    assert not torch.allclose(in_the_handler[0]["0.weight"], before["0.weight"])
