"""Lightning with the callback, against loops written by hand; what is logged, counted, kept and refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning_problem import Module, amp, batches, by_hand, fit, loader, trainer
from slow_reference import assert_same
from torch import nn

from asam import ASAM
from asam.integrations.lightning import SharpnessAware

pytestmark = [
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def half(dtype):
    return lambda: torch.autocast("cpu", dtype, cache_enabled=False)


FITS = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipping by norm": (
        {"gradient_clip_val": 0.1},
        {"clip": lambda params: nn.utils.clip_grad_norm_(params, 0.1)},
    ),
    "clipping by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": lambda params: nn.utils.clip_grad_value_(params, 0.01)},
    ),
    "64-true": ({"precision": "64-true"}, {}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"autocast": half(torch.bfloat16)}),
    "16-mixed": ({"accumulate_grad_batches": 2}, {"autocast": half(torch.float16), "accumulate": 2}),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_the_loop_written_by_hand(name, optimizer):
    options, same = (dict(part) for part in FITS[name])
    if name == "16-mixed":
        (scaler, plugins), (same["scaler"], _) = amp(), amp()
        options |= plugins
    dtype = torch.float32 if "mixed" in name else torch.float64
    one, other = (Module(optimizer).to(dtype) for _ in range(2))
    assert_same(
        fit(one, SharpnessAware(rho=0.5), data=batches(dtype=dtype), **options),
        by_hand(other, data=batches(dtype=dtype), **same),
    )
    assert one.passes == 28
    if name == "16-mixed":  # the scale became too large for float16, and steps were left out
        assert scaler.state_dict() == same["scaler"].state_dict()
        assert scaler.get_scale() < 2.0**26


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.05, "normalization": "none"},
        {"p": float("inf"), "eta": 0.1, "bias": "fixed"},
        {"params": ["network.0.weight", "network.4.weight"]},
        {"replay_rng": True},
        {"replay_rng": True, "rho": 0.0},
    ],
)
def test_arguments_reach_asam(options):
    assert_same(fit(Module(), SharpnessAware(**options)), by_hand(Module(), **options))


def test_with_rho_0_a_fit_is_lightnings_own():
    one, other = Module(), Module()
    assert_same(fit(one, SharpnessAware(rho=0.0)), fit(other))
    assert one.passes == 14


class Schedule(Callback):
    """rho is halved at each epoch, through the one or the other attribute."""

    def __init__(self, through):
        self.through = through

    def on_train_epoch_start(self, trainer, pl_module):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, SharpnessAware))
        owner = callback if self.through == "callback" else callback.asam
        owner.rho = callback.rho / 2


class Validated(Module):
    def validation_step(self, batch):
        assert not self.training
        self.log("val_loss", self.loss(batch))


@pytest.mark.parametrize("through", ["callback", "asam"])
def test_a_resumed_fit_goes_on_to_the_bit(through, tmp_path):
    def start(epochs, module, **options):
        callback = SharpnessAware(rho=2.0)
        # validation every third batch, and before the first
        one = trainer(callback, Schedule(through), epochs=epochs, val_check_interval=3, num_sanity_val_steps=2)
        one.fit(module, loader(), loader(batches(2)), **options)
        return callback, one

    whole, part, rest = (Validated("adamw") for _ in range(3))
    torch.manual_seed(2)
    start(4, whole)
    torch.manual_seed(2)
    _, one = start(2, part)
    one.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SharpnessAware"] == {"rho": 0.5}
    callback, _ = start(4, rest, ckpt_path=tmp_path / "last.ckpt")
    assert callback.rho == 2 / 2**4
    assert_same(rest.state_dict(), whole.state_dict())
    assert not torch.equal(part.network[0].weight, whole.network[0].weight)


def test_a_second_fit_and_its_rho():
    module, callback, other = Module(), SharpnessAware(rho=2.0), Module()
    fit(module, callback, Schedule("asam"), epochs=1)
    assert callback.rho == 1
    assert callback.asam is None
    callback.rho = 0.3
    assert callback.state_dict() == {"rho": 0.3}
    by_hand(other, rho=1.0, epochs=1)
    assert_same(fit(module, callback), by_hand(other, rho=0.3))


def test_a_backward_of_the_modules_own_runs_in_both_passes():
    class Own(Module):
        losses = ()

        def backward(self, loss):
            self.losses = (*self.losses, loss.item())
            (2 * loss).backward()

    module, other = Own(), Own()
    fit(module, SharpnessAware(), epochs=1)
    assert len(module.losses) == 14
    asam, ((optimizer,), _) = ASAM(other), other.configure_optimizers()
    torch.manual_seed(2)
    for batch in batches():
        asam.backward(lambda batch=batch: other.loss(batch), backward=other.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module.state_dict(), other.state_dict())


@pytest.mark.slow
def test_a_compiled_module_is_compiled_once():
    class Compiled(Module):
        def training_step(self, batch):
            return self.loss(batch)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    module, plain = Compiled(), Compiled()
    fit(torch.compile(module, backend=backend), SharpnessAware(), epochs=4)
    assert len(graphs) == 1
    assert_same(module.state_dict(), fit(plain, SharpnessAware(), epochs=4))


@pytest.mark.slow
@pytest.mark.fsdp2
def test_ddp_and_fsdp2(tmp_path):
    script = Path(__file__).with_name("lightning_processes.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300)
