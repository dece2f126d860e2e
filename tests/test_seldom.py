"""What happens seldom, and so is met by no other test: each case once."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from slow_reference import assert_same, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from asam import ASAM, SharpnessAwareOptimizer, perturbation
from asam.perturbation import RandomState


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting-point").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_gradient_scaler_must_not_call_a_step_with_a_closure():
    model = nn.Linear(2, 1)
    optimizer = SharpnessAwareOptimizer(ASAM(model), torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    # what a scaler does to optimizers that unscale by themselves
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="must not be called by a gradient scaler"):
        optimizer.step(closure)
    assert_same(weights(model), before)
    optimizer.step(closure)  # of the refusal nothing is left
    assert not torch.equal(model.weight, before["weight"])


def test_ctrl_c_while_the_weights_are_brought_back(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before, statistics = weights(model), model[1].running_mean.clone()
    restore, calls = perturbation.Buffers.restore, []

    def interrupted(buffers, **arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(buffers, **arguments)

    asam = ASAM(model)
    model[0].weight.grad = torch.ones(2, 2)
    monkeypatch.setattr(perturbation.Buffers, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), asam.perturbed():
        model(torch.randn(4, 2))
    assert_same(weights(model), before)
    assert torch.equal(model[1].running_mean, statistics)
    assert len(calls) == 2


def test_random_numbers_of_an_accelerator_are_drawn_again(monkeypatch):
    device, states = torch.device("cuda", 1), {1: torch.tensor([7])}
    module = SimpleNamespace(
        get_rng_state=lambda device: states[device.index].clone(),
        set_rng_state=lambda state, device: states.update({device.index: state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    state = RandomState({device, torch.device("cpu")})
    first = torch.rand(3)
    states[1] = torch.tensor([8])
    state.restore()
    assert torch.equal(torch.rand(3), first)
    assert states[1].item() == 7


def test_the_ascent_of_replicas_without_a_group_is_this_process_s_own():
    """``sync_ascent=True`` where nothing is distributed, as in a notebook that runs the script of a cluster."""
    model = nn.Linear(2, 1).double()
    inputs = torch.randn(3, 2, dtype=torch.float64)
    grads = []
    for sync in (True, False):
        model.zero_grad()
        ASAM(model, sync_ascent=sync).backward(lambda: model(inputs).square().mean())
        grads.append(model.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.usefixtures("alone")
def test_frozen_parameters_take_no_part_in_a_shared_ascent():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    before = weights(model)
    replica = DistributedDataParallel(model)
    ASAM(replica, sync_ascent=True).backward(lambda: replica(torch.ones(1, 2)).sum(), backward=torch.Tensor.backward)
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    assert_same(weights(model), before)


@pytest.mark.usefixtures("alone")
def test_combinations_of_replicas_need_a_shared_ascent():
    replica = DistributedDataParallel(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="needs sync_ascent=True"):
        ASAM(replica, combine=lambda g00, g01, g11: (0.5, 0.5))
    asam = ASAM(replica, combine=lambda g00, g01, g11: (0.5, 0.5), sync_ascent=True)
    asam.backward(lambda: replica(torch.ones(1, 2)).sum())
    kept = replica.module.weight.grad.clone()
    with pytest.raises(RuntimeError, match="where gradients accumulate: set them to None after each call"):
        asam.backward(lambda: replica(torch.ones(1, 2)).sum())
    assert torch.equal(replica.module.weight.grad, kept)


@pytest.mark.parametrize("bad", [{"compile": 1}, {"rounding": 3}, {"rounding": "up"}])
def test_how_a_step_is_made_is_checked(bad):
    (name,) = bad
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        ASAM(nn.Linear(2, 1), **bad)


def test_ctrl_c_while_small_tensors_are_moved(monkeypatch):
    """They are laid end to end in a buffer that serves w + e and the copy of w, one after the other."""
    model = nn.Linear(2, 2)
    before, copy, calls = weights(model), torch._foreach_copy_, []

    def interrupted(targets, values):
        calls.append(1)
        copy(targets, values)
        if len(calls) == 1:
            raise KeyboardInterrupt

    asam = ASAM(model)
    model(torch.ones(1, 2)).sum().backward()
    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), asam.perturbed():
        pytest.fail("the weights have not been moved")
    assert_same(weights(model), before)
    assert len(calls) > 1
