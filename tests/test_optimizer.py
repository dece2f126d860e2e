"""ASAM behind the optimizer interface: a contract over base optimizers, and what belongs to the base stays with it."""

import copy
import inspect
import io
import pickle
from collections import defaultdict

import pytest
import torch
from slow_reference import assert_near, assert_same, shapes_problem, weights
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from asam import ASAM, SAM, SharpnessAwareOptimizer

BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
}
if hasattr(torch.optim, "Muon"):  # takes matrices only
    BASES["Muon"] = lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.02)


class Run:
    """A network and its optimizer, with another batch at every step."""

    def __init__(self, base="SGD", make=ASAM):
        self.model, _ = shapes_problem()
        self.base = BASES[base](self.model.parameters())
        self.asam = make(self.model, rho=0.4)
        self.optimizer = SharpnessAwareOptimizer(self.asam, self.base)
        self.calls = 0

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=generator)
        self.calls += 1
        return nn.functional.cross_entropy(self.model(inputs), torch.randint(3, (6,), generator=generator))

    def closure(self, step):
        def closure():
            self.optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            return loss

        return closure

    def step(self, step):
        return self.optimizer.step(self.closure(step))

    def step_by_backward(self, step):
        loss = self.asam.backward(lambda: self.loss(step))
        self.base.step()
        self.base.zero_grad()
        return loss


@pytest.mark.parametrize("make", [ASAM, SAM])
@pytest.mark.parametrize("base", BASES)
def test_steps_are_those_of_backward_and_the_base(base, make):
    ours, theirs = Run(base, make), Run(base, make)
    start = weights(ours.model)
    for step in range(8):
        expected = theirs.step_by_backward(step)
        loss = ours.step(step)
        assert torch.equal(loss, expected)
        assert_same(weights(ours.model), weights(theirs.model))
        assert ours.calls == 2 * (step + 1)
    assert not torch.equal(start["head.weight"], ours.model.head.weight)


@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base(base):
    ours, theirs = Run(base), Run(base)
    ours.asam.rho = 0
    for step in range(5):
        ours.step(step)
        theirs.base.zero_grad()
        theirs.loss(step).backward()
        theirs.base.step()
        assert_same(weights(ours.model), weights(theirs.model))
    assert ours.calls == 5


@pytest.mark.parametrize("rho", [0, 0.4])
def test_no_gradient_from_before_is_used(rho):
    clean, stale = Run(), Run()
    clean.asam.rho = stale.asam.rho = rho

    def spoil():
        for param in stale.model.parameters():
            param.grad = torch.randn_like(param) * 100

    spoil()
    assert torch.equal(stale.step(0), clean.step(0))
    assert_same(weights(stale.model), weights(clean.model))
    # also when the closure leaves clearing to the optimizer
    spoil()
    for run in (clean, stale):
        run.optimizer.step(lambda run=run: (loss := run.loss(1), loss.backward())[0])
    assert_same(weights(stale.model), weights(clean.model))


def test_a_base_that_holds_a_part_of_the_model():
    # the gradients of the others must not add up from step to step
    ours, theirs = Run(), Run()
    for run in (ours, theirs):
        run.base = torch.optim.SGD(run.model.head.parameters(), lr=0.1)
        run.optimizer = SharpnessAwareOptimizer(run.asam, run.base)
    for step in range(4):
        ours.step(step)
        theirs.step_by_backward(step)
        assert_same(weights(ours.model), weights(theirs.model))


def test_the_loss_is_that_at_w():
    run = Run()
    expected = run.loss(0).detach()
    run.calls = 0
    assert torch.equal(run.step(0), expected)
    assert run.calls == 2


def test_it_is_an_optimizer_that_owns_nothing():
    run = Run()
    optimizer, base = run.optimizer, run.base
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert vars(optimizer).keys() == {"asam", "base_optimizer"}
    for _ in range(2):
        run.step(0)
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        assert optimizer.defaults is base.defaults
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert repr(base.param_groups[0]["lr"]) in repr(optimizer)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


@pytest.mark.parametrize("base", BASES)
def test_checkpoints_are_the_bases(base):
    run = Run(base)
    run.step(0)
    saved, model = io.BytesIO(), copy.deepcopy(run.model.state_dict())
    torch.save(run.optimizer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved)
    assert state.keys() == run.base.state_dict().keys()
    run.step(1)
    resumed, plain = Run(base), Run(base)
    for other in (resumed, plain):
        other.model.load_state_dict(model)
    plain.base.load_state_dict(state)  # ours into a base
    resumed.optimizer.load_state_dict(copy.deepcopy(plain.base.state_dict()))  # a base's into ours
    resumed.step(1)
    plain.step_by_backward(1)
    assert_same(weights(resumed.model), weights(plain.model))
    # torch loads the float32 product in NAdam's state as float64
    assert_near(weights(resumed.model), weights(run.model), rtol=1e-6 if base == "NAdam" else 0, atol=0)


def test_hooks_fire_once_a_step():
    run = Run()
    fired = []

    def hook(name):
        return lambda optimizer, *_: fired.append((name, optimizer is run.base))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        run.optimizer.register_step_pre_hook(hook("pre by ours")),
        run.base.register_step_pre_hook(hook("pre by base")),
        run.optimizer.register_step_post_hook(hook("post by ours")),
        run.base.register_step_post_hook(hook("post by base")),
    ]
    try:
        run.step(0)
    finally:
        for handle in handles:
            handle.remove()
    names = ["global pre", "pre by ours", "pre by base", "post by ours", "post by base", "global post"]
    assert sorted(fired) == sorted((name, True) for name in names)
    run.step(1)
    assert len(fired) == 6


def test_add_param_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer = SharpnessAwareOptimizer(ASAM(model), base)
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.5]
    before = weights(model)
    inputs = torch.randn(4, 3, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(not torch.equal(w, before[name]) for name, w in weights(model).items())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    closure()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(param.grad, torch.zeros_like(param)) for param in model.parameters())


def reload(run):
    file = io.BytesIO()
    torch.save(run, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run)), reload], ids=["copy", "pickle", "save"]
)
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_copies_go_on_alone(base, duplicate, scheduled):
    run = Run(base)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1) if scheduled else None
    run.step(0)
    if scheduler is not None:
        scheduler.step()
    before = weights(run.model)
    other = duplicate(run)
    assert other.optimizer.base_optimizer is other.base
    assert other.optimizer.param_groups is other.base.param_groups
    assert next(iter(other.base.param_groups[0]["params"])) is next(other.model.parameters())
    other.step(1)
    assert_same(weights(run.model), before)
    run.step(1)
    assert_same(weights(other.model), weights(run.model))
    assert not torch.equal(run.model.head.weight, before["head.weight"])


def test_an_optimizer_alone_is_copied_with_its_model():
    run = Run()
    run.step(0)
    other = copy.deepcopy(run.optimizer)
    before = weights(run.model)
    params = [p for group in other.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(other.asam._params.values(), params, strict=True))

    def closure():
        other.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    other.step(closure)
    assert_same(weights(run.model), before)
    assert not torch.equal(params[0], before["conv.weight"])


def test_one_that_is_not_made_yet_has_no_attributes():
    with pytest.raises(AttributeError, match="base_optimizer"):
        _ = SharpnessAwareOptimizer.__new__(SharpnessAwareOptimizer).param_groups


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_a_protocol_sees_what_an_optimizer_has(name):
    # as isinstance() of Lightning's does from Python 3.12 on
    model = nn.Linear(3, 1)
    optimizer = SharpnessAwareOptimizer(ASAM(model), torch.optim.SGD(model.parameters(), lr=0.1))
    inspect.getattr_static(optimizer, name)
    assert getattr(optimizer, name) is getattr(optimizer.base_optimizer, name)


def test_step_runs_under_no_grad():
    clean, guarded = Run(), Run()
    clean.step(0)
    with torch.no_grad():
        guarded.step(0)
    assert_same(weights(guarded.model), weights(clean.model))


def test_groups_and_state_that_are_set_are_the_bases():
    model = nn.Linear(3, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(ASAM(model), base)
    groups, state = [{**base.param_groups[0], "lr": 0.0}], defaultdict(dict)
    optimizer.param_groups, optimizer.state = groups, state
    assert base.param_groups is groups
    assert base.state is state
