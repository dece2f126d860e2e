"""Many tensors of one shape, which are one tensor with one more dimension: they move as each alone does."""

import math

import pytest
import torch
from slow_reference import assert_near, assert_same, gradients, maximizer, weights
from torch import nn

from asam import ASAM, Geometry, blocks

RHO = 0.3


def shifted(w):
    return w.abs() + 1


# in memory, of one weight after the other
ROWS, CHANNELS = torch.contiguous_format, torch.channels_last


class Layers(nn.Module):
    """Enough layers of two shapes, and a few of others."""

    def __init__(self, dtype=torch.float64, orders=(ROWS, CHANNELS), grad_orders=(ROWS, ROWS, CHANNELS)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def tensor(*shape, order=ROWS):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).contiguous(memory_format=order)

        self.layers = nn.ModuleList(nn.Module() for _ in range(blocks.MANY + 5))
        for i, layer in enumerate(self.layers):
            layer.weight = nn.Parameter(tensor(3, 2, 2, 2, order=orders[i % len(orders)]))
            layer.bias = nn.Parameter(tensor(3))
            layer.weight.grad = tensor(3, 2, 2, 2, order=grad_orders[i % len(grad_orders)])
            layer.bias.grad = tensor(3)
        self.square, self.last, self.empty = (nn.Parameter(tensor(*shape)) for shape in ((4, 4), (5,), (0,)))
        self.square.grad, self.last.grad, self.empty.grad = tensor(4, 4).t(), tensor(5), tensor(0)


@pytest.fixture(params=["whole", "several"])
def block(request, monkeypatch):
    """Blocks that hold all of one shape, and such as hold a few of them."""
    monkeypatch.setattr("asam.blocks.ALONE", 1)
    if request.param == "several":
        monkeypatch.setattr("asam.blocks.CPU_BLOCK", 100)


def moved(model, **setting):
    """The weights before, and while they are perturbed."""
    before, grads = weights(model), {name: param.grad.clone() for name, param in model.named_parameters()}
    with ASAM(model, rho=RHO, **setting).perturbed():
        there = weights(model)
    assert_same(weights(model), before)
    return before, grads, there


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("bias", ["unscaled", "scaled", "fixed"])
@pytest.mark.parametrize("p", [1.5, 2, math.inf])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise", "none", shifted])
def test_the_perturbation_is_the_papers(normalization, p, bias):
    setting = {"normalization": normalization, "p": p, "bias": bias}
    before, grads, there = moved(Layers(), **setting)
    e = maximizer(before, grads, RHO, **setting)
    assert_near(there, {name: w + e[name] for name, w in before.items()})


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad_order", [ROWS, CHANNELS])
@pytest.mark.parametrize("order", [ROWS, CHANNELS])
def test_any_order_in_memory(order, grad_order, compiled, monkeypatch):
    # how compiled code gets its tensors, not what the compiler makes of it, which takes long
    monkeypatch.setattr("asam.blocks.compiled", lambda kernel: kernel)
    monkeypatch.setattr("asam.blocks.COMPILED_FROM", 50)
    model = Layers(orders=[order], grad_orders=[grad_order])
    before, grads, there = moved(model, compile=compiled)
    e = maximizer(before, grads, RHO)
    assert_near(there, {name: w + e[name] for name, w in before.items()})
    assert all(layer.weight.is_contiguous(memory_format=order) for layer in model.layers)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("grad_order", [torch.contiguous_format, torch.channels_last_3d])
def test_two_of_five_dimensions(order, grad_order):
    generator = torch.Generator().manual_seed(0)
    params, grads = (
        {name: torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64) for name in ("a", "b")}
        for _ in range(2)
    )
    expected = maximizer(params, grads, RHO)
    params = {name: param.contiguous(memory_format=order) for name, param in params.items()}
    grads = {name: grad.contiguous(memory_format=grad_order) for name, grad in grads.items()}
    assert_near(Geometry().maximizer(params, grads, RHO), expected)


def test_images_in_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))).double()
    inputs = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def step(images):
        ASAM(model, rho=RHO).backward(lambda: model(images).square().mean())
        found = gradients(model)
        model.zero_grad()
        return found

    assert_near(step(inputs.to(memory_format=CHANNELS)), step(inputs), rtol=1e-10)


@pytest.mark.filterwarnings("ignore:weights in .* lose part")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_half_precision(rounding):
    before, grads, there = moved(Layers(torch.bfloat16), rounding=rounding)
    wide = {name: w.double() for name, w in before.items()}
    e = maximizer(wide, {name: grad.double() for name, grad in grads.items()}, RHO)
    for name, w in wide.items():
        exact = w + e[name]
        digit = torch.finfo(torch.bfloat16).eps * exact.abs()
        assert ((there[name].double() - exact).abs() <= (0.51 if rounding == "nearest" else 1.01) * digit).all()


@pytest.mark.usefixtures("block")
def test_a_block_of_many_of_a_shape_has_no_others():
    names, params = zip(*Layers().named_parameters(), strict=True)
    with torch.no_grad():
        found = list(Geometry().blocks(names, params, [param.grad for param in params], RHO))
    shapes = [{tuple(target.shape) for target in block.targets} for block in found]
    assert sorted({tuple(sorted(several)) for several in shapes}) == [((3,),), ((3, 2, 2, 2),), ((4, 4), (5,))]
    limit = blocks.CPU_BLOCK * torch.get_num_threads()
    assert max(sum(target.numel() for target in block.targets) for block in found) <= limit


@pytest.mark.parametrize("limit", [20, 2**18])
def test_many_of_a_few_elements_each(limit, monkeypatch):
    monkeypatch.setattr("asam.blocks.ALONE", 1)
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", limit)
    generator = torch.Generator().manual_seed(0)
    params, grads = (
        {f"{n}": torch.randn(n, generator=generator, dtype=torch.float64) for n in range(1, 21)} for _ in range(2)
    )
    expected = maximizer(params, grads, RHO)
    with torch.no_grad():
        found = list(Geometry().blocks(list(params), list(params.values()), list(grads.values()), RHO))
    sizes = [sum(target.numel() for target in block.targets) for block in found]
    assert sum(sizes) == 210
    assert max(sizes) <= limit * torch.get_num_threads()
    assert_near(Geometry().maximizer(params, grads, RHO), expected)
