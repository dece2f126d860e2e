"""The weights come back to the bit, whatever happens in between."""

import copy

import pytest
import torch
from slow_reference import assert_same, gradients, shapes_problem, weights
from torch import nn

from asam import ASAM, SAM, SharpnessAwareOptimizer, perturbation
from asam.blocks import Block
from asam.perturbation import modules_of

ERRORS = [ValueError("boom"), KeyboardInterrupt("boom"), torch.OutOfMemoryError("boom")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [ASAM, SAM])
def test_a_thousand_steps_at_learning_rate_zero(make, dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    asam = make(model, rho=0.5)
    before, places = weights(model), [param.data_ptr() for param in model.parameters()]
    inputs = torch.randn(3, 4, dtype=dtype)
    moved = 0
    for _ in range(1000):
        seen = []
        asam.backward(lambda seen=seen: seen.append(model[0].weight.detach().clone()) or model(inputs).square().mean())
        moved += not torch.equal(*seen)
        optimizer.step()
        optimizer.zero_grad()
    assert moved == 1000
    assert_same(weights(model), before)
    assert [param.data_ptr() for param in model.parameters()] == places


class Interrupted:
    """A model with batch norm, and the three ways to take a step; the pass that is named raises, in its middle."""

    def __init__(self, way, backward=None):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
        self.inputs = torch.randn(5, 4, dtype=torch.float64)
        self.asam = ASAM(self.model, rho=0.5)
        self.optimizer = SharpnessAwareOptimizer(self.asam, torch.optim.SGD(self.model.parameters(), lr=0.1))
        self.way, self.through = way, backward

    def step(self, error=None, failing=None):
        calls = []

        def loss():
            calls.append(1)
            value = self.model(self.inputs).square().mean()
            if error is not None and len(calls) == failing:
                raise error
            return value

        def closure():
            self.optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        if self.way == "backward":
            self.asam.backward(loss, backward=self.through)
        elif self.way == "perturbed":
            loss().backward()
            with self.asam.perturbed():
                loss().backward()
        else:
            self.optimizer.step(closure)


WAYS = ["backward", "through", "perturbed", "optimizer"]


def make(way):
    return Interrupted("backward", lambda loss: loss.backward()) if way == "through" else Interrupted(way)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_an_exception_in_either_pass(way, failing, error):
    run = make(way)
    before = weights(run.model)
    places = [param.data_ptr() for param in run.model.parameters()]
    buffers_after_one_pass = copy.deepcopy(run.model)
    buffers_after_one_pass(run.inputs)

    with pytest.raises(type(error), match="boom"):
        run.step(error, failing)

    assert_same(weights(run.model), before)
    assert [param.data_ptr() for param in run.model.parameters()] == places
    assert_same(dict(run.model.named_buffers()), dict(buffers_after_one_pass.named_buffers()))
    # and as good as new
    fresh = make(way)
    fresh.model.load_state_dict(run.model.state_dict())
    run.model.zero_grad()
    run.step()
    fresh.step()
    assert_same(weights(run.model), weights(fresh.model))
    assert_same(gradients(run.model), gradients(fresh.model))


@pytest.mark.parametrize("backward", [None, lambda loss: loss.backward()])
def test_earlier_gradients_survive_a_failing_ascent(backward):
    run = Interrupted("backward", backward)
    run.step()
    earlier, tensors = gradients(run.model), [param.grad for param in run.model.parameters()]
    with pytest.raises(ValueError, match="boom"):
        run.step(ValueError("boom"), failing=1)
    assert_same(gradients(run.model), earlier)
    assert all(param.grad is grad for param, grad in zip(run.model.parameters(), tensors, strict=True))


def test_an_exception_in_the_users_backward():
    run = Interrupted("backward")
    run.step()
    earlier, before = gradients(run.model), weights(run.model)

    def backward(loss):
        loss.backward()
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        run.asam.backward(lambda: run.model(run.inputs).square().mean(), backward=backward)
    assert_same(gradients(run.model), earlier)
    assert_same(weights(run.model), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("half_moved", [False, True])
def test_an_exception_in_the_move_itself(way, half_moved, monkeypatch):
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", 7)
    run, fresh = make(way), make(way)
    before, real, moves = weights(run.model), Block.move, []

    def move(block):
        moves.append(1)
        if len(moves) == 2:
            if half_moved:
                real(block)
            raise torch.OutOfMemoryError("boom")
        real(block)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "move", move)
        with pytest.raises(torch.OutOfMemoryError, match="boom"):
            run.step()
    assert len(moves) == 2
    assert_same(weights(run.model), before)
    run.model.load_state_dict(fresh.model.state_dict())
    run.model.zero_grad()
    run.step()
    fresh.step()
    assert_same(gradients(run.model), gradients(fresh.model))


def test_an_exception_while_tiny_tensors_are_written(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = weights(model)
    model(torch.randn(5, 3)).square().mean().backward()
    write, written = torch._foreach_copy_, []

    def failing(targets, values):
        write(targets, values)
        written.append(weights(model))
        if len(written) == 1:
            raise MemoryError

    monkeypatch.setattr(torch, "_foreach_copy_", failing)
    with pytest.raises(MemoryError), ASAM(model).perturbed():
        pass
    assert not torch.equal(written[0]["0.weight"], before["0.weight"])
    assert_same(weights(model), before)


def test_a_graph_that_needs_the_old_weights_raises():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    inputs = torch.randn(4, 3)
    kept = model(inputs).square().mean()
    with pytest.raises(RuntimeError, match=r"^part of the loss's graph was made outside the closure, at w, or"):
        ASAM(model).backward(lambda: kept.clone(), backward=lambda loss: loss.backward(retain_graph=True))


@pytest.mark.parametrize("p", [1.5, 2, float("inf")])
def test_non_finite_weights_come_back(p):
    model, closure = shapes_problem()
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    before = weights(model)
    ASAM(model, p=p).backward(closure)
    assert_same(weights(model), before)


def test_the_weights_are_w_after_perturbed_is_left_early():
    model, closure = shapes_problem()
    before = weights(model)
    asam = ASAM(model)
    for _ in range(2):
        closure().backward()
        with asam.perturbed():
            assert not torch.equal(model.head.weight, before["head.weight"])
            assert all(param.grad is None for param in model.parameters())
            break
    assert_same(weights(model), before)


def test_perturbed_is_backward_in_two_parts():
    by_hand, at_once = [], []
    for results, whole in ((by_hand, False), (at_once, True)):
        model, closure = shapes_problem()
        if whole:
            ASAM(model).backward(closure)
        else:
            closure().backward()
            with ASAM(model).perturbed():
                closure().backward()
        results.append(gradients(model))
    assert_same(by_hand[0], at_once[0])


def test_modules_are_those_of_the_model():
    shared = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared, shared[0])})
    model.register_module("absent", None)
    shared.register_module("parent", model)
    found = modules_of(model)
    assert len(found) == 5
    assert set(map(id, found)) == set(map(id, model.modules()))


def test_a_step_of_another_optimizer_while_other_threads_perturb(monkeypatch):
    class Perturbing:
        """The parameters of a step, while another thread begins one."""

        def __iter__(self):
            monkeypatch.setitem(perturbation._away, 2, [])
            return iter(())

    monkeypatch.setitem(perturbation._away, 1, Perturbing())
    model = nn.Linear(2, 1)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_autocast_forgets_w_plus_e_where_a_buffer_cannot_come_back(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False).eval())
    inputs = torch.randn(5, 4)

    def failing(self):
        raise MemoryError

    with torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        monkeypatch.setattr(perturbation.Buffers, "restore", failing)
        with pytest.raises(MemoryError):
            ASAM(model, rho=10.0).backward(lambda: model(inputs).square().mean())
        assert torch.equal(model(inputs), before)
