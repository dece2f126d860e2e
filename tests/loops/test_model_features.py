"""Hooks, parametrizations, functional calls, memory formats and dtypes of a model."""

import copy

import pytest
import torch
from slow_reference import assert_near, assert_same, gradient, gradients, maximizer, shapes_problem, weights
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from asam import ASAM


def by_hand(model, closure, rho=0.5):
    """The gradient at w + e of the slow reference; the model is as it was but for its buffers."""
    w, buffers = weights(model), copy.deepcopy(dict(model.named_buffers()))
    e = maximizer(w, gradient(model, closure), rho)
    after_one_pass = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(e[name])
    g = gradient(model, closure)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(w[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return g, after_one_pass


# autograd.grad calls the hooks of a tensor too, but not those that follow the writing of .grad
@pytest.mark.parametrize(("through", "times"), [(None, [2, 1]), (torch.Tensor.backward, [2, 2])])
def test_hooks_of_a_parameter(through, times):
    model, closure = shapes_problem()
    count = [0, 0]

    def on_gradient(grad):
        count[0] += 1

    def on_accumulated(param):
        count[1] += 1

    model.head.weight.register_hook(on_gradient)
    model.head.weight.register_post_accumulate_grad_hook(on_accumulated)
    ASAM(model).backward(closure, backward=through)
    assert count == times


def test_a_hook_that_changes_the_gradient_changes_it_in_both_passes():
    model, closure = shapes_problem()
    other, other_closure = shapes_problem()
    model.head.weight.register_hook(lambda grad: grad * 3)
    ASAM(model).backward(closure)
    w, g = weights(other), gradient(other, other_closure)
    g["head.weight"] *= 3
    e = maximizer(w, g, 0.5)
    with torch.no_grad():
        for name, param in other.named_parameters():
            param.add_(e[name])
    expected = gradient(other, other_closure)
    expected["head.weight"] *= 3
    assert_near(gradients(model), expected)


def test_forward_and_backward_hooks_of_a_module_run_in_both_passes():
    model, closure = shapes_problem()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    ASAM(model).backward(closure)
    assert calls == ["forward", "backward"] * 2


PARAMETRIZED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_weights(kind):
    # what is perturbed is what is trained: the original, not the weight made of it
    torch.manual_seed(2)
    layer = PARAMETRIZED[kind](nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)

    def closure():
        return model(inputs).square().mean()

    expected, buffers = by_hand(model, closure)
    before = weights(model)
    assert "0.weight" not in before
    ASAM(model).backward(closure)
    assert_near(gradients(model), expected, rtol=1e-9)
    assert_same(weights(model), before)
    # the vectors of the power iteration move once, in the pass at w
    assert_same(dict(model.named_buffers()), buffers)


def test_functional_calls():
    # parameters of the model: perturbed; values computed from them: too, since they are computed in the closure
    model, _ = shapes_problem()
    inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64)

    def closure():
        doubled = {name: 2 * param for name, param in model.named_parameters()}
        return functional_call(model, doubled, (inputs,)).square().mean()

    expected, _ = by_hand(model, closure)
    ASAM(model).backward(closure)
    assert_near(gradients(model), expected)


def test_channels_last():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, _ = shapes_problem()
        model.to(memory_format=layout)
        inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        strides = model.conv.weight.stride()
        inputs = inputs.to(memory_format=layout)
        ASAM(model).backward(lambda m=model, x=inputs: m(x).square().mean())
        assert model.conv.weight.stride() == strides
        results.append(gradients(model))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_near(results[1], results[0], rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_of_every_dtype(dtype):
    # bfloat16 keeps 8 bits: its gradient is near that of float64 where the network is not too sharp
    exact, _ = shapes_problem()
    model = copy.deepcopy(exact).to(dtype)
    inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    before = weights(model)
    ASAM(exact, rho=0.2).backward(lambda: exact(inputs).square().mean())
    loss = ASAM(model, rho=0.2).backward(lambda: model(inputs.to(dtype)).square().mean())
    assert loss.dtype == dtype
    assert {param.grad.dtype for param in model.parameters()} == {dtype}
    assert_same(weights(model), before)
    close = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    flat, expected = (torch.cat([g.double().flatten() for g in gradients(m).values()]) for m in (model, exact))
    assert (flat - expected).norm() < close * expected.norm()


def test_a_model_of_several_dtypes():
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 1))
    inputs = torch.randn(5, 3, dtype=torch.float64)
    before = weights(model)
    ASAM(model).backward(lambda: model[1](model[0](inputs).float()).square().mean())
    assert [param.grad.dtype for param in model.parameters()] == [torch.float64] * 2 + [torch.float32] * 2
    assert_same(weights(model), before)
