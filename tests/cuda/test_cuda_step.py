"""On a GPU: the step of the CPU, no value read back, graphs, float16 with a scaler, channels_last, streams."""

import copy
import math

import pytest
import torch
from slow_reference import assert_near, assert_same, gradients, shapes_problem, weights
from torch import nn

from asam import ASAM

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NORMALIZATIONS = ["elementwise", "filterwise", "layerwise", "none"]


def images(dtype=torch.float32):
    """A small convolutional network with batch norm, inputs and targets."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).to(DEVICE, dtype)
    return model, torch.randn(6, 3, 8, 8).to(DEVICE, dtype), torch.arange(6, device=DEVICE) % 4


def plainly(asam, closure):
    asam.backward(closure)


def through(asam, closure):
    asam.backward(closure, backward=torch.Tensor.backward)


def by_hand(asam, closure):
    closure().backward()
    with asam.perturbed():
        closure().backward()


WAYS = [plainly, through, by_hand]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("p", [1.5, 2, math.inf])
def test_the_gradient_is_that_of_the_cpu(normalization, p):
    found = []
    for device in ("cpu", DEVICE):
        model = shapes_problem()[0].to(device)
        inputs, targets = torch.randn(6, 2, 5, 5, dtype=torch.float64).to(device), torch.arange(6, device=device) % 3
        asam = ASAM(model, normalization=normalization, p=p)
        asam.backward(lambda m=model, i=inputs, t=targets: nn.functional.cross_entropy(m(i), t))
        found.append({name: grad.cpu() for name, grad in gradients(model).items()})
    assert_near(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_step_waits_for_the_device(way, normalization):
    model, inputs, targets = images()
    asam = ASAM(model, normalization=normalization)

    def closure():
        return nn.functional.cross_entropy(model(inputs), targets)

    way(asam, closure)  # what libraries set up at the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        way(asam, closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_waits_for_the_device_would_be_seen():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones((), device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_memory_formats(normalization, fmt):
    model, inputs, targets = images()
    plain = copy.deepcopy(model)
    model, inputs = model.to(memory_format=fmt), inputs.to(memory_format=fmt)
    before, place = weights(model), model[0].weight.data_ptr()
    for one in (model, plain):
        ASAM(one, normalization=normalization).backward(
            lambda one=one: nn.functional.cross_entropy(one(inputs), targets)
        )
    assert_same(weights(model), before)
    assert model[0].weight.data_ptr() == place
    assert model[0].weight.is_contiguous(memory_format=fmt)
    # other kernels, in TensorFloat-32 where the device has it
    assert_near(gradients(model), gradients(plain), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("way", [plainly, by_hand])
def test_a_step_on_a_side_stream(way):
    results = []
    for side in (False, True):
        model, inputs, targets = images(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        asam = ASAM(model)
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                way(asam, lambda model=model, i=inputs, t=targets: nn.functional.cross_entropy(model(i), t))
                optimizer.step()
                optimizer.zero_grad()
                # memory let go too early would be handed out here, and written to
                torch.full_like(model[0].weight, math.nan)
        torch.cuda.current_stream().wait_stream(stream)
        results.append(weights(model))
    # atomic additions in a backward pass may come in another order
    assert_near(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_out_of_memory_in_the_descent_pass_then_a_smaller_batch():
    model, inputs, targets = images(torch.float64)
    before, calls, asam = weights(model), [], ASAM(model)

    def closure():
        calls.append(None)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        if len(calls) == 2:
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
        return loss

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        asam.backward(closure)
    assert_same(weights(model), before)
    model.zero_grad()
    asam.backward(lambda: nn.functional.cross_entropy(model(inputs[:3]), targets[:3]))
    assert all(param.grad.isfinite().all() for param in model.parameters())
    assert_same(weights(model), before)


def test_the_extra_memory_is_one_copy():
    model = nn.Sequential(nn.Linear(2000, 2000, bias=False), nn.Linear(2000, 1, bias=False)).to(DEVICE)
    inputs, used = torch.randn(2, 2000, device=DEVICE), []

    def closure():
        used.append(torch.cuda.memory_allocated())
        return model(inputs).square().mean()

    asam = ASAM(model)
    for _ in range(2):  # libraries take their workspaces at the first call
        used.clear()
        asam.backward(closure)
        model.zero_grad()
    size = sum(param.nbytes for param in model.parameters())
    assert size <= used[1] - used[0] <= size + 2**16


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_replayed_random_numbers(normalization):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1)).to(DEVICE)
    inputs, masks = torch.randn(4, 6, device=DEVICE), []
    model[1].register_forward_hook(lambda module, args, output: masks.append(output != 0))
    for replay in (True, False):
        masks.clear()
        asam = ASAM(model, rho=1e-6, normalization=normalization, replay_rng=replay)
        asam.backward(lambda: model(inputs).square().mean())
        assert torch.equal(masks[0], masks[1]) == replay
