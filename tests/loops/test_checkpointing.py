"""Activation checkpointing, of both kinds: the gradient is that without it."""

import copy

import pytest
import torch
from slow_reference import assert_near, assert_same, gradients, weights
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from trainings import Reversible

from asam import ASAM


class Deep(nn.Module):
    """Blocks with dropout and batch norm, each checkpointed or not."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))
        )
        self.head = nn.Linear(6, 1)
        self.way = way
        self.runs = 0
        for block in self.blocks:
            block[0].register_forward_pre_hook(self.count)
        self.double()

    def count(self, *_):
        self.runs += 1

    def forward(self, x):
        if self.way == "sequential":
            x = checkpoint_sequential(self.blocks, 3, x, use_reentrant=False)
        elif self.way is not None:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.way == "reentrant")
        else:
            x = self.blocks(x)
        return self.head(x).square().mean()


def trained(way, backward=None, replay_rng=False):
    model = Deep(way)
    asam, optimizer = ASAM(model, rho=0.5, replay_rng=replay_rng), torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    inputs = torch.randn(4, 8, 6, dtype=torch.float64)
    inputs.requires_grad_(way == "reentrant")  # it gives no gradient otherwise
    results = []
    for batch in inputs:
        results.append(asam.backward(lambda batch=batch: model(batch), backward=backward))
        optimizer.step()
        optimizer.zero_grad()
    return model, {"losses": torch.stack(results), "random": torch.get_rng_state(), **weights(model)}


@pytest.mark.parametrize("replay_rng", [False, True])
@pytest.mark.parametrize(
    ("way", "through"),
    [
        ("non-reentrant", False),
        ("non-reentrant", True),
        ("sequential", False),
        ("sequential", True),
        ("reentrant", True),
    ],
)
def test_gradients_are_those_without_checkpointing(way, through, replay_rng):
    backward = torch.Tensor.backward if through else None
    model, checkpointed = trained(way, backward, replay_rng)
    without, expected = trained(None, backward, replay_rng)
    assert_near(checkpointed, expected)
    # 4 steps of 2 passes; the last block of a sequence is not run again
    again = 2 if way == "sequential" else 3
    assert (without.runs, model.runs) == (4 * 2 * 3, 4 * 2 * (3 + again))


@pytest.mark.parametrize(
    ("before_it", "message"),
    [(False, "behind torch.utils.checkpoint with use_reentrant=True"), (True, r"use_reentrant=True.*incompatible")],
)
def test_reentrant_checkpointing_is_refused_without_a_backward_that_writes_grad(before_it, message):
    # torch says so itself if there are parameters before the checkpoint; if not, it gives no gradient and no error
    model = nn.Sequential(nn.Linear(6, 6) if before_it else nn.Identity(), Deep("reentrant")).double()
    before = weights(model)
    inputs = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    asam = ASAM(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            asam.backward(lambda: model(inputs))
    assert_same(weights(model), before)
    asam.backward(lambda: model(inputs), backward=torch.Tensor.backward)
    assert gradients(model)["1.blocks.0.0.weight"].norm() > 0


@pytest.mark.parametrize("way", ["non-reentrant", "reentrant"])
def test_buffers_move_as_in_a_plain_step_with_checkpointing(way):
    # torch runs batch norm again to recompute, and so moves its statistics twice a pass
    ours, plain = Deep(way), None
    plain = copy.deepcopy(ours)
    inputs = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    plain(inputs).backward()
    torch.manual_seed(1)
    ASAM(ours).backward(lambda: ours(inputs), backward=torch.Tensor.backward)
    assert_same(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert ours.blocks[0][1].num_batches_tracked == 2


def test_reentrant_checkpointing_is_refused_where_no_gradient_is_missing():
    layer, inputs = nn.Linear(4, 4), torch.randn(5, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"parameters behind .* with use_reentrant=True have no gradient"):
        ASAM(layer).backward(lambda: layer(checkpoint(layer, inputs, use_reentrant=True).tanh()).square().mean())


def test_reentrant_checkpointing_is_refused_after_a_step_without_it():
    heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    inputs = torch.randn(5, 4, requires_grad=True)
    asam = ASAM(heads)
    asam.backward(lambda: heads[0](inputs).square().mean())
    with pytest.raises(RuntimeError, match=r"parameters behind .* with use_reentrant=True have no gradient"):
        asam.backward(lambda: heads[2](checkpoint(heads[1], inputs, use_reentrant=True)).square().mean())


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_layer_whose_backward_pass_writes_grad_is_refused(accumulated):
    layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1)]).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)

    def closure():
        return Reversible.apply(torch.tanh(layers[0](inputs)), layers[1]).square().mean()

    if accumulated:
        closure().backward()
    before = weights(layers)
    asam = ASAM(layers)
    with pytest.raises(
        RuntimeError, match=r"another one, which writes \.grad .* pass backward=torch\.Tensor\.backward"
    ):
        asam.backward(closure)
    assert_same(weights(layers), before)
    layers.zero_grad()
    asam.backward(closure, backward=torch.Tensor.backward)
    expected = copy.deepcopy(layers)
    expected.zero_grad()
    ASAM(expected).backward(lambda: expected[1](torch.tanh(expected[0](inputs))).square().mean())
    assert_near(gradients(layers), gradients(expected))
