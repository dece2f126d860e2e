"""compile=True on the CPU: the loops in C++ give back what they take, whatever became of it meanwhile."""

import pytest
import torch
from layers import LARGE, Shy, network, with_gradients
from slow_reference import assert_same, weights
from torch import nn

from asam import ASAM
from asam.native import block_of


def test_weights_come_back_into_a_kind_of_tensor_that_has_its_own_ideas(moves):
    model = with_gradients(network())
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        torch.utils.swap_tensors(model[0].weight, Shy(torch.zeros(40, 40)))
    assert_same(weights(model), before)
    assert moves


def test_a_graph_that_needs_the_old_weights_raises():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    kept = model(torch.randn(4, 3)).square().mean()
    with pytest.raises(RuntimeError, match=r"^part of the loss's graph was made outside the closure, at w, or"):
        ASAM(model, compile=True).backward(lambda: kept.clone(), backward=lambda loss: loss.backward(retain_graph=True))


def test_nothing_is_put_back_before_anything_has_moved():
    params, grads = [torch.ones(3)], [torch.ones(3)]
    block, others = block_of([True], params, grads, 0.0)
    assert not others
    assert block.put_back() == []
    block.keep()  # room of whatever it holds
    assert block.put_back() == []
    assert torch.equal(params[0], torch.ones(3))


@pytest.mark.parametrize("width", [40, LARGE])
@pytest.mark.parametrize("failing", [False, True])
def test_weights_come_back_into_other_memory(failing, width):
    model = with_gradients(network(width))
    before, old = weights(model), model[0].weight.data
    new = torch.full_like(old, 7.0)

    def visit():
        with ASAM(model, compile=True).perturbed():
            model[0].weight.data = new
            if failing:
                raise ValueError("boom")

    if failing:
        with pytest.raises(ValueError, match="boom"):
            visit()
    else:
        visit()
    assert model[0].weight.data_ptr() == new.data_ptr()
    assert_same(weights(model), before)
    if width == LARGE:
        assert torch.equal(old, before["0.weight"])


@pytest.mark.parametrize("width", [40, LARGE])
def test_weights_come_back_in_another_dtype(width):
    model = with_gradients(network(width))
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        model.zero_grad()
        model.double()
    floating = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    assert_same(weights(model), floating)


@pytest.mark.parametrize("width", [40, LARGE])
def test_a_change_of_shape_is_refused_and_undone(width):
    model = with_gradients(network(width))
    before = weights(model)

    def visit():
        with ASAM(model, compile=True).perturbed():
            model[0].weight.data = torch.zeros(3, 2)

    with pytest.raises(RuntimeError, match=r"shape of a parameter changed .* 0\.weight\. Change the model between"):
        visit()
    assert_same(weights(model), before)


@pytest.mark.parametrize("width", [40, LARGE])
def test_weights_come_back_to_where_their_memory_went(width):
    model = with_gradients(network(width))
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        model.share_memory()  # copies all of it, and lets go what it was in
    assert_same(weights(model), before)


def test_weights_come_back_into_a_parameter_that_holds_another_tensor_now():
    model = with_gradients(network())
    before = weights(model)
    other = torch.zeros(40, 40)
    with ASAM(model, compile=True).perturbed():
        torch.utils.swap_tensors(model[0].weight, nn.Parameter(other))
    assert_same(weights(model), before)
    assert torch.equal(other, before["0.weight"])


def test_another_way_to_read_the_same_memory_is_not_what_it_was():
    model = with_gradients(network())
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        model[0].weight.data = model[0].weight.data.T
    assert_same(weights(model), before)


def test_another_dtype_at_the_same_place_is_not_written_over():
    model = with_gradients(network())
    before = weights(model)
    memory = model[0].weight.data
    with ASAM(model, compile=True).perturbed():
        model[0].weight.data = memory.view(torch.float16).as_strided((40, 40), (40, 1))
        assert model[0].weight.data_ptr() == memory.data_ptr()
    assert torch.equal(model[0].weight, before["0.weight"].half())


@pytest.mark.parametrize("fast", [False, True])
def test_a_parameter_that_cannot_be_written_to_keeps_no_other_from_coming_back(fast):
    model = with_gradients(network())
    before = weights(model)

    def visit():
        with ASAM(model, compile=fast).perturbed():
            model[0].weight.data = torch.zeros(()).expand(40, 40)

    with pytest.raises(RuntimeError, match="the shape of a parameter changed"):
        visit()
    assert_same(weights(model), before)
