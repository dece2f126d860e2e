"""Logits without a scale of their own."""

import copy

import pytest
import torch
from quadratics import Net, examples
from torch import nn

from asam import Geometry
from asam.measure import Objective, average_sharpness, normalized_logits, worst_case_sharpness


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_centered_with_deviation_one_for_each_example(shape):
    logits = torch.randn(shape, dtype=torch.float64) * 3 + 2
    result = normalized_logits(logits)
    torch.testing.assert_close(result.mean(-1), torch.zeros(shape[:-1]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(result.square().mean(-1), torch.ones(shape[:-1]).double(), rtol=1e-13, atol=0)
    assert torch.equal(result.argsort(-1), logits.argsort(-1))


@pytest.mark.parametrize("factor", [1e-12, 0.1, 7.0, 1e12])
def test_scaling_and_shifting_do_not_change_them(factor):
    logits = torch.randn(3, 5, dtype=torch.float64)
    factors = factor * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    shifted = logits * factors + factors * torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(normalized_logits(shifted), normalized_logits(logits), rtol=1e-12, atol=1e-13)


def test_equal_logits_become_zeros():
    assert torch.equal(normalized_logits(torch.full((2, 5), 3.0)), torch.zeros(2, 5))


def test_equal_logits_have_a_gradient():
    logits = torch.zeros(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(normalized_logits(logits), torch.tensor([0])), logits)
    assert gradient.isfinite().all()


def test_sharpness_does_not_see_the_scale_of_the_logits():
    def loss_fn(model, batch):
        return nn.functional.cross_entropy(normalized_logits(model(batch[0])), batch[1])

    net = Net()
    louder = copy.deepcopy(net)
    with torch.no_grad():
        louder.layers[-1].weight.mul_(5)
        louder.layers[-1].bias.mul_(5)
    one, two = (Objective(model, loss_fn, [examples()]) for model in (net, louder))
    geometry = Geometry(eta=0.0, bias="scaled")
    for measure in (worst_case_sharpness, average_sharpness):
        value = measure(one, 0.1, geometry=geometry).value
        assert measure(two, 0.1, geometry=geometry).value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-5, 400.0])
def test_in_half_precision(scale):
    logits = torch.tensor([[scale, -scale, 0.0]])
    half = normalized_logits(logits.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), normalized_logits(logits), rtol=0, atol=0.01)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e20, 1e37])
def test_of_any_size_in_single_precision(scale):
    logits = torch.tensor([[1.0, 2.0, 4.0]]) * scale
    torch.testing.assert_close(normalized_logits(logits), normalized_logits(torch.tensor([[1.0, 2.0, 4.0]])))
