"""Buffers move once a step, in the pass at w; random numbers are replayed where that is asked for."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from slow_reference import assert_same, weights
from torch import nn
from torch.nn.utils import parametrize

from asam import ASAM, SAM, SharpnessAwareOptimizer


class Counting(nn.Module):
    """A buffer that changes in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.detach().mean() + 1
        return x


class Rebinding(Counting):
    """A buffer that is replaced by a new tensor."""

    def forward(self, x):
        self.seen = self.seen * 0.9 + x.detach().mean() + 1
        return x


class Seldom(Counting):
    """A buffer that changes at every second call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2 == 0:
            self.seen.add_(x.detach().mean() + 1)
        return x


class ThroughData(Counting):
    """A buffer that changes behind autograd's back, as moving averages often do."""

    def forward(self, x):
        self.seen.data.mul_(0.9).add_(x.detach().mean() + 1)
        return x


class Late(Counting):
    """A buffer that is None until the second call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("late", None)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            self.late = x.detach().mean()
        return x


class Shared(nn.Module):
    """An expanded buffer, which nothing can be written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.arange(3.0).expand(4, 3))

    def forward(self, x):
        return x + self.positions.sum()


LAYERS = {
    "momentum 0.1": lambda: nn.BatchNorm1d(6, momentum=0.1),
    "momentum None": lambda: nn.BatchNorm1d(6, momentum=None),
    "momentum 0.0": lambda: nn.BatchNorm1d(6, momentum=0.0),
    "momentum 1.0": lambda: nn.BatchNorm1d(6, momentum=1.0),
    "evaluation": lambda: nn.BatchNorm1d(6).eval(),
    "counting": Counting,
    "rebinding": Rebinding,
    "seldom": Seldom,
    "through data": ThroughData,
    "late": Late,
    "expanded": Shared,
}


def by_backward(model, closure):
    ASAM(model, rho=0.5).backward(closure)


def by_sam(model, closure):
    SAM(model, rho=0.5).backward(closure)


def through_backward(model, closure):
    ASAM(model, rho=0.5).backward(closure, backward=lambda loss: loss.backward())


def by_perturbed(model, closure):
    closure().backward()
    with ASAM(model, rho=0.5).perturbed():
        closure().backward()


def by_optimizer(model, closure):
    optimizer = SharpnessAwareOptimizer(ASAM(model, rho=0.5), torch.optim.SGD(model.parameters(), lr=0.0))

    def full():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    optimizer.step(full)


@pytest.mark.parametrize("run", [by_backward, by_sam, through_backward, by_perturbed, by_optimizer])
@pytest.mark.parametrize("layer", LAYERS)
def test_buffers_move_as_in_one_pass_at_w(layer, run):
    model = nn.Sequential(nn.Linear(3, 6), LAYERS[layer](), nn.Linear(6, 1))
    plain = copy.deepcopy(model)
    momentum = getattr(model[1], "momentum", "no such attribute")
    places = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for _ in range(3):
        inputs = torch.randn(8, 3)
        if layer in ("seldom", "late"):  # the calls are counted in Python: two passes a step
            model[1].calls = plain[1].calls = 0
        calls = []

        def closure(inputs=inputs, calls=calls):
            calls.append(1)
            return model(inputs).square().mean()

        run(model, closure)
        plain(inputs)
        assert len(calls) == 2
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert getattr(model[1], "momentum", "no such attribute") is momentum
    assert model.training is plain.training
    assert model[1].training is plain[1].training
    if layer.startswith("momentum"):
        assert model[1].num_batches_tracked == 3
    if layer != "rebinding":
        assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == places


class Dropping(nn.Module):
    """Dropout whose masks can be looked at."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64))
        self.masks = []

    def forward(self):
        kept = nn.functional.dropout(torch.ones(64), 0.5)
        self.masks.append(kept > 0)
        return (self.weight * kept).square().sum()


@pytest.mark.parametrize("backward", [None, lambda loss: loss.backward()])
def test_replay_gives_both_passes_the_same_mask(backward):
    model = Dropping()
    torch.manual_seed(5)
    model()
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(5)
    ASAM(model, replay_rng=True).backward(model, backward=backward)
    _, ascent, descent = model.masks
    assert torch.equal(ascent, model.masks[0])
    assert torch.equal(ascent, descent)
    assert torch.equal(torch.get_rng_state(), after_one_pass)


def test_replay_of_a_part_leaves_no_number_to_be_drawn_twice():
    weight = nn.Parameter(torch.ones(64))
    model, drawn = nn.ParameterList([weight]), []

    def loss(count):
        drawn.append(torch.rand(count))
        return (weight[:count] * drawn[-1]).sum()

    asam = ASAM(model, replay_rng=True)
    for _ in range(3):
        asam.backward(lambda: loss(64), ascent=lambda: loss(16))
    assert all(torch.equal(ascent, descent[:16]) for ascent, descent in zip(drawn[::2], drawn[1::2], strict=True))
    assert len(torch.cat(drawn[1::2]).unique()) == 3 * 64


def test_without_replay_the_mask_is_drawn_anew():
    model = Dropping()
    torch.manual_seed(5)
    model()
    model()
    after_two_passes = torch.get_rng_state()
    torch.manual_seed(5)
    ASAM(model).backward(model)
    _, _, ascent, descent = model.masks
    assert not torch.equal(ascent, descent)
    assert torch.equal(torch.get_rng_state(), after_two_passes)


def test_replay_leaves_the_generator_after_a_failure_where_one_pass_does():
    model = Dropping()
    before = weights(model)
    torch.manual_seed(5)
    model()
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(5)

    def closure():
        if len(model.masks) == 2:  # before the descent has drawn anything
            raise ValueError("boom")
        return model()

    with pytest.raises(ValueError, match="boom"):
        ASAM(model, replay_rng=True).backward(closure)
    assert torch.equal(torch.get_rng_state(), after_one_pass)
    assert_same(weights(model), before)


def test_a_sparse_buffer_is_no_obstacle():
    model = nn.Linear(3, 1)
    model.register_buffer("graph", torch.eye(4).to_sparse())
    before = weights(model)
    ASAM(model).backward(lambda: torch.sparse.mm(model.graph, model(torch.ones(4, 3))).square().mean())
    assert_same(weights(model), before)
    assert torch.equal(model.graph.to_dense(), torch.eye(4))
    assert model.weight.grad.norm() > 0


def test_a_scripted_module_moves_its_statistics_once():
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        model = nn.Sequential(torch.jit.script(nn.Sequential(*copy.deepcopy(parts))), nn.Linear(4, 2))
    plain = nn.Sequential(nn.Sequential(*parts), copy.deepcopy(model[1]))
    inputs = torch.randn(5, 4)
    for one in (model, plain):
        ASAM(one).backward(lambda one=one: one(inputs).square().mean())
    for (name, found), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_a_buffer_made_in_inference_mode_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.inference_mode():
        model.register_buffer("cache", torch.ones(3))
    ASAM(model).backward(lambda: model(torch.randn(5, 4)).square().mean())
    assert model[1].num_batches_tracked == 1
    assert model.cache.tolist() == [1, 1, 1]


class Growing(nn.Module):
    """A buffer that a pass makes longer, in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen.resize_(len(self.seen) + 1).fill_(1)
        return x


def test_a_buffer_that_grows_in_place_grows_once():
    model = nn.Sequential(nn.Linear(4, 3), Growing(), nn.BatchNorm1d(3))
    asam, inputs = ASAM(model), torch.randn(5, 4)
    for steps in (1, 2):
        asam.backward(lambda: model(inputs).square().mean())
        assert model[1].seen.tolist() == [1] * (2 + steps)
        assert model[2].num_batches_tracked == steps


class Symmetric(nn.Module):
    def forward(self, x):
        return (x.triu() + x.triu(1).mT).exp()  # which saves its result for the backward pass


def test_weights_that_a_parametrization_caches():
    model, inputs = nn.Linear(4, 4, bias=False).double(), torch.randn(3, 4, dtype=torch.float64)
    parametrize.register_parametrization(model, "weight", Symmetric())
    found = []
    for context in (nullcontext, parametrize.cached):
        model.zero_grad()
        with context():
            ASAM(model).backward(lambda: model(inputs).square().mean())
        found.append(model.parametrizations.weight.original.grad)
    assert torch.equal(*found)
