"""Tensors that are blocks of their own: in any order in memory and in half precision they move as small ones do."""

import pytest
import torch
from slow_reference import assert_near, assert_same, gradients, maximizer, weights
from torch import nn

from asam import ASAM, Geometry, Momentum

RHO = 0.3
LARGE = 20_000  # elements; a tensor of more than 2**14 lies beside no others


def convolution(dtype=torch.float64, order=torch.contiguous_format):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(50, 50, 3, bias=False)).to(dtype).to(memory_format=order)


def perturbed(model, coefficients, **setting):
    """The weights before, and while they are perturbed; the gradient is given by the coefficients."""
    before = weights(model)
    assert before["0.weight"].numel() > LARGE
    model[0].weight.grad = coefficients
    asam = ASAM(model, rho=RHO, **setting)
    with asam.perturbed():
        there = weights(model)
    assert_same(weights(model), before)
    return before, there


def shifted(w):
    return w.abs() + 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", shifted])
@pytest.mark.parametrize("grad_order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_any_order_in_memory(order, grad_order, normalization, compiled, monkeypatch):
    # how compiled code gets its tensors, not what the compiler makes of it, which takes long
    monkeypatch.setattr("asam.blocks.compiled", lambda kernel: kernel)
    monkeypatch.setattr("asam.blocks.COMPILED_FROM", 1000)
    model = convolution(order=order)
    coefficients = torch.randn(50, 50, 3, 3, dtype=torch.float64).to(memory_format=grad_order)
    before, there = perturbed(model, coefficients, normalization=normalization, compile=compiled)
    e = maximizer(before, {"0.weight": coefficients}, RHO, normalization=normalization)
    assert_near(there, {"0.weight": before["0.weight"] + e["0.weight"]})
    assert model[0].weight.is_contiguous(memory_format=order)


@pytest.mark.filterwarnings("ignore:weights in .* lose part")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, rounding):
    coefficients = torch.randn(50, 50, 3, 3, dtype=dtype)
    before, there = perturbed(convolution(dtype), coefficients, rounding=rounding)
    wide = {name: w.double() for name, w in before.items()}
    exact = wide["0.weight"] + maximizer(wide, {"0.weight": coefficients.double()}, RHO)["0.weight"]
    digit = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (there["0.weight"].double() - exact).abs()
    # to the nearest half a last digit, by chance a whole one; the scale itself is of single precision
    assert (error <= 1.01 * digit).all()
    assert (error <= 0.51 * digit).all() == (rounding == "nearest")


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_that_of_small_blocks(order, monkeypatch):
    def step():
        model = convolution(order=order)
        inputs = torch.randn(2, 50, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ASAM(model, rho=RHO).backward(lambda: model(inputs).square().mean())
        return gradients(model)

    large = step()
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", 1000)
    assert_near(step(), large, rtol=1e-10)


@pytest.mark.parametrize("normalization", ["elementwise", "none"])
def test_against_a_momentum(normalization):
    model, there = convolution(), []
    before, momentum = weights(model), torch.randn(50, 50, 3, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model[0].weight]["momentum_buffer"] = momentum

    def closure():
        there.append(weights(model))
        return model[0].weight.sum()

    ASAM(model, rho=RHO, normalization=normalization, direction=Momentum(optimizer)).backward(closure)
    e = maximizer(before, {"0.weight": momentum}, RHO, normalization=normalization)
    assert_near(there[0], {"0.weight": before["0.weight"] - e["0.weight"]})


@pytest.mark.parametrize("scale", [lambda w: w[-1:], lambda w: w.t()], ids=["row", "transposed"])
def test_a_scale_may_be_the_parameters_own_memory(scale, monkeypatch):
    weight, grad = torch.rand(8, 8, dtype=torch.float64) + 1, torch.randn(8, 8, dtype=torch.float64)
    there, params = scale(weight).clone(), [weight.clone()]
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", 16)
    blocks = list(Geometry(scale, bias="scaled").blocks(["w"], params, [grad], RHO))
    assert len(blocks) > 1
    for block in blocks:
        block.move()
    torch.testing.assert_close(params[0], weight + RHO * there**2 * grad / (there * grad).norm())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_blocks_of_an_accelerator_are_larger(device):
    # there they bound the scratch memory, on the CPU they fit a cache; a tensor on "meta" takes no memory
    w = torch.empty(2**13, 2**12, device="meta") if device == "meta" else torch.ones(2**10, 2**9)
    with torch.no_grad():
        sizes = [block.targets[0].numel() for block in Geometry().blocks(["w"], [w], [torch.empty_like(w)], 0.1)]
    assert sizes == [2**24] * 2 if device == "meta" else [2**18] * 2
