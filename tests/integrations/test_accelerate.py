"""Accelerate: ``asam.backward(closure, backward=accelerator.backward)``, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slow_reference import assert_same, maximizer, weights
from torch import nn

from asam import ASAM, SharpnessAwareOptimizer

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState

TESTS = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("accelerate_training.py")
SCALE = 2.0**10


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    AcceleratorState._reset_state(reset_partial_state=True)  # a test of another file may have left one
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.fsdp2
def test_two_processes(tmp_path):
    # --cpu would start one process whatever --num_processes says; --multi_gpu starts them, and gloo joins them
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    paths = [TESTS, TESTS / "distributed", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [*launch, *options, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def test_bfloat16_autocast_is_in_both_passes():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(network())
    seen = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    inputs, targets = batch(0)

    def loss():
        return nn.functional.cross_entropy(model(inputs), targets)

    ASAM(model, rho=0.3).backward(loss, backward=accelerator.backward)
    assert seen == [torch.bfloat16] * 2
    found = [param.grad.clone() for param in model.parameters()]
    # the same by hand: autocast in the forward pass of a plain network, and the formula
    plain = network()

    def plain_loss():
        with torch.autocast("cpu", torch.bfloat16):
            outputs = plain(inputs)
        return nn.functional.cross_entropy(outputs.float(), targets)

    w, params = weights(plain), list(plain.parameters())
    e = maximizer(w, dict(zip(w, torch.autograd.grad(plain_loss(), params), strict=True)), 0.3)
    with torch.no_grad():
        for name, param in plain.named_parameters():
            param.add_(e[name])
    expected = torch.autograd.grad(plain_loss(), params)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=2e-3)


def with_scaler(accelerator):
    """On the CPU Accelerate makes no scaler, also for float16: it gets the one that it would make on a GPU."""
    assert accelerator.scaler is None
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return accelerator


@pytest.mark.parametrize("clip", [True, False])
def test_the_loss_scale_leaves_no_trace(clip):
    results = []
    for make in (lambda a: a, with_scaler):
        accelerator = make(Accelerator(cpu=True, mixed_precision="fp16"))
        model = network()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        # as on a GPU, where clip_grad_norm_ unscales, or the optimizer's step if there is no clipping
        accelerator.native_amp = accelerator.scaler is not None
        asam = ASAM(model, rho=0.3)
        for step in range(4):
            inputs, targets = batch(step)
            asam.backward(
                lambda x=inputs, y=targets, model=model: nn.functional.cross_entropy(model(x), y),
                backward=accelerator.backward,
            )
            if clip:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            assert not optimizer.step_was_skipped
            optimizer.zero_grad()
        results.append(weights(model))
    # powers of two go through every rounding unchanged
    assert_same(*results)
    assert not torch.equal(results[0]["0.weight"], network()[0].weight)


def test_a_prepared_facade_refuses_a_scaler():
    # Accelerate hands the closure on through the scaler, which would unscale the gradients that it finds before
    # step(closure), here those of the first pass of the usual SAM loop, and not those that the closure makes
    accelerator = with_scaler(Accelerator(cpu=True))
    model = accelerator.prepare(network())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = accelerator.prepare(SharpnessAwareOptimizer(ASAM(model), base))
    inputs, targets = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        return loss

    closure()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"gradient scaler.*asam\.backward"):
        optimizer.step(closure)
    assert_same(weights(model), before)
    # and without a scaler it works again
    accelerator.scaler = None
    optimizer.optimizer.step(closure)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_facade_around_the_prepared_optimizer_takes_a_scaler():
    results = []
    for make in (lambda a: a, with_scaler):
        accelerator = make(Accelerator(cpu=True))
        model = network()
        model, prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        optimizer = SharpnessAwareOptimizer(ASAM(model, rho=0.3), prepared)
        for step in range(3):
            inputs, targets = batch(step)

            def closure(x=inputs, y=targets, model=model, optimizer=optimizer, accelerator=accelerator):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
        results.append(weights(model))
    assert_same(*results)
    assert not torch.equal(results[0]["0.weight"], network()[0].weight)


def test_a_prepared_facade_loses_micro_batches():
    # Accelerate calls step() at the last micro-batch only, and nothing but step() runs the closure
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(network())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = accelerator.prepare(SharpnessAwareOptimizer(ASAM(model), base))
    seen = []
    for step in range(4):

        def closure(step=step):
            seen.append(step)
            inputs, targets = batch(step)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            return loss

        with accelerator.accumulate(model):
            optimizer.step(closure)
    assert seen == [1, 1, 3, 3]
