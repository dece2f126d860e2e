"""Rest, against the momentum, exact: the passes of each part, its memory, its two rho."""

import copy
import io
import math
import pickle

import pytest
import torch
from slow_reference import assert_same, gradients, weights
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainings import Reversible, Training, sgd

from asam import ASAM, EconomicalASAM, Momentum


def economical(base=sgd, **options):
    training = Training(base=base)
    if options.pop("climb_the_optimizer", False):
        options["optimizer"] = training.optimizer
    training.asam = EconomicalASAM(training.model, **options)
    return training


def passes(training, calls):
    """How many passes each call takes, and where its loss was taken."""
    counts, places = [], []
    for step in range(calls):
        seen = []
        training.asam.backward(lambda step=step, seen=seen: (seen.append(1), training.loss(step))[1])
        training.optimizer.step()
        training.optimizer.zero_grad()
        counts.append(len(seen))
        places.append(training.asam.loss_at)
    return counts, places


SHARES = [
    ({"steps": 20}, [*(15 * [1]), *(5 * [2])]),
    ({"steps": 20, "exact": 0.1}, [*(18 * [1]), 2, 2]),
    ({"steps": 20, "exact": 0.0}, 20 * [1]),
    ({"steps": 20, "exact": 1.0}, 20 * [2]),
    ({"steps": 20, "exact": 1.0, "warmup": 5}, [*(5 * [1]), *(15 * [2])]),
    ({"steps": 3, "exact": 1 / 3}, [1, 1, 2]),
    ({"steps": 1, "exact": 0.25}, [1]),
    ({"steps": 100, "exact": 0.29}, [*(71 * [1]), *(29 * [2])]),
]


@pytest.mark.parametrize(("options", "expected"), SHARES)
@pytest.mark.parametrize("climb_the_optimizer", [False, True])
def test_a_training_costs_one_pass_a_step_and_the_exact_share(options, expected, climb_the_optimizer):
    counts, places = passes(economical(climb_the_optimizer=climb_the_optimizer, **options), options["steps"])
    assert counts == expected
    warmup = options.get("warmup", 0)
    assert places == ["w" if count == 2 or step == 0 or step < warmup else "w + e" for step, count in enumerate(counts)]


@pytest.mark.parametrize("climb_the_optimizer", [False, True])
def test_each_part_takes_the_steps_that_it_is_named_for(climb_the_optimizer):
    options = {"rho": 0.2, "momentum_rho": 0.7, "decay": 0.5}
    ours = economical(steps=12, exact=0.25, warmup=4, climb_the_optimizer=climb_the_optimizer, **options)
    by_hand = Training()
    direction = Momentum(by_hand.optimizer if climb_the_optimizer else None, decay=0.5)
    climbing = ASAM(by_hand.model, rho=0.7, direction=direction)
    for step in range(14):  # two more than were said
        climbing.rho = 0.7 if step >= 4 else 0.0
        by_hand.asam = climbing if step < 9 else ASAM(by_hand.model, rho=0.2)
        assert torch.equal(ours.step(step), by_hand.step(step))
        assert_same(weights(ours.model), weights(by_hand.model))


def test_the_geometry_and_the_parameters_are_those_of_both_parts():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    chosen = (param for param in model.parameters() if param.ndim == 2)  # can be gone through once
    asam = EconomicalASAM(model, steps=8, rho=0.3, eta=0.1, normalization="layerwise", p=math.inf, params=chosen)
    assert asam.momentum.rho == 0.6
    assert asam.exact.rho == 0.3
    assert asam.exact.geometry == asam.momentum.geometry
    assert list(asam.exact._params) == list(asam.momentum._params) == ["0.weight", "1.weight"]
    assert "calls=0" in repr(asam)


def test_everything_that_backward_takes_is_passed_on():
    training = economical(steps=4, exact=0.5)
    calls = []

    def backward(loss):
        calls.append("backward")
        loss.backward()

    def closure(step):
        calls.append("closure")
        return training.loss(step)

    def ascent(step):
        calls.append("ascent")
        return training.loss(step, slice(0, 2))

    for step in range(4):
        training.asam.backward(lambda i=step: closure(i), ascent=lambda i=step: ascent(i), backward=backward)
        training.optimizer.zero_grad()
    assert calls == 2 * ["closure", "backward"] + 2 * ["ascent", "backward", "closure", "backward"]


@pytest.mark.parametrize("climb_the_optimizer", [False, True])
@pytest.mark.parametrize("when", [2, 7, 9])
def test_a_resumed_training_takes_the_same_steps_to_the_bit(when, climb_the_optimizer):
    options = {"steps": 12, "warmup": 3, "climb_the_optimizer": climb_the_optimizer}
    training, resumed = economical(**options), economical(**options)
    for step in range(when):
        training.step(step)
    training.asam.exact.rho = 0.4
    file = io.BytesIO()
    torch.save({part: getattr(training, part).state_dict() for part in ("model", "optimizer", "asam")}, file)
    file.seek(0)
    for part, state in torch.load(file, weights_only=True).items():
        getattr(resumed, part).load_state_dict(state)
    for step in range(when, 12):
        training.step(step)
        resumed.step(step)
    assert_same(weights(resumed.model), weights(training.model))
    assert resumed.asam.exact.rho == 0.4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_copies_share_one_memory_between_their_parts(duplicate):
    training, other = economical(steps=8, warmup=3), economical(steps=8)
    for step in range(2):
        training.step(step)
    other.model, other.optimizer, other.asam = duplicate((training.model, training.optimizer, training.asam))
    for step in range(2, 8):
        training.step(step)
        other.step(step)
    assert_same(weights(other.model), weights(training.model))


def test_a_call_that_fails_does_not_count():
    training = economical(steps=4)
    before = weights(training.model)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.asam.backward(closure)
    assert training.asam.state_dict()["calls"] == 0
    assert_same(weights(training.model), before)
    assert all(grad is None for grad in gradients(training.model).values())


BAD = [
    ("steps", 0, ValueError, "an integer >= 1, got 0"),
    ("steps", 10.0, TypeError, "an integer >= 1, got float"),
    ("warmup", -1, ValueError, "an integer >= 0, got -1"),
    ("warmup", True, TypeError, "an integer >= 0, got bool"),
    ("exact", 1.1, ValueError, "a share from 0 to 1, got 1.1"),
    ("exact", math.nan, ValueError, "a share from 0 to 1, got nan"),
    ("exact", None, TypeError, "a share from 0 to 1, got NoneType"),
    ("rho", -0.1, ValueError, "a finite number >= 0, got -0.1"),
    ("rho", "0.1", TypeError, "a finite number >= 0, got str"),
    ("momentum_rho", math.inf, ValueError, "a finite number >= 0, got inf"),
    ("momentum_rho", "0.1", TypeError, "a finite number >= 0, got str"),
    ("decay", 1, ValueError, "a number >= 0 and < 1, got 1"),
    ("statistics_every", 0, ValueError, "an integer >= 1, got 0"),
    ("optimizer", "SGD", TypeError, "a torch.optim.Optimizer, got str"),
    ("eta", -1.0, ValueError, "a finite number >= 0, got -1.0"),
    ("params", 0, TypeError, "an iterable of names or parameters, got int"),
    ("params", "0.weight", TypeError, "an iterable of names or parameters, got a single str"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_arguments(name, value, error, message):
    with pytest.raises(error, match=rf"^{name} must be {message}$"):
        EconomicalASAM(nn.Linear(2, 1), **{"steps": 10, name: value})


FLAWS = [
    (lambda state: None, TypeError, "^state_dict must be a mapping, got NoneType$"),
    (lambda state: {"calls": 1}, ValueError, r"^state_dict must have the keys 'calls', 'exact', 'momentum', got \["),
    (lambda state: {**state, "calls": -1}, ValueError, "^calls must be an integer >= 0, got -1$"),
    (lambda state: {**state, "exact": {}}, ValueError, r"^state_dict must have the keys \['rho'\], got \[\]$"),
    (lambda state: {**state, "exact": {"rho": -1}}, ValueError, "^rho must be a finite number >= 0, got -1$"),
    (lambda state: {**state, "momentum": {"rho": 1}}, ValueError, r"^state_dict must have the keys \['calls', 'mean'"),
    (lambda state: {**state, "exact": {"rho": 7}, "momentum": {}}, ValueError, r"^state_dict must have the keys"),
]


@pytest.mark.parametrize(("flawed", "error", "message"), FLAWS)
def test_a_bad_state_dict(flawed, error, message):
    training = economical(steps=10)
    training.step(0)
    state = training.asam.state_dict()
    with pytest.raises(error, match=message):
        training.asam.load_state_dict(flawed({**state, "calls": 9}))
    assert training.asam.state_dict()["calls"] == 1
    assert training.asam.exact.rho == state["exact"]["rho"]


def test_what_exact_steps_refuse_is_told_in_the_first():
    layer, inputs = nn.Linear(4, 4), torch.randn(5, 4, requires_grad=True)
    asam = EconomicalASAM(layer, steps=100)

    def closure():
        return checkpoint(layer, inputs, use_reentrant=True).square().mean()

    with pytest.raises(RuntimeError, match=r"parameters behind .* with use_reentrant=True have no gradient"):
        asam.backward(closure)
    asam.backward(closure, backward=torch.Tensor.backward)


def test_another_parameter_in_the_place_of_one_is_told_of_in_the_first_step():
    training = economical(steps=100, warmup=5)
    training.model.head = nn.Linear(training.model.head.in_features, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^the model has another parameter 'head\.weight' than when"):
        training.asam.backward(lambda: training.loss(0))


@pytest.mark.parametrize("warmup", [0, 5])
def test_an_optimizer_without_momentum_is_told_of_in_the_first_step(warmup):
    training = economical(torch.optim.Adagrad, climb_the_optimizer=True, steps=100, warmup=warmup)
    with pytest.raises(RuntimeError, match=r"^Adagrad keeps no momentum"):
        training.asam.backward(lambda: training.loss(0))
    training.asam.momentum.rho = 0.0  # then none is needed
    training.asam.backward(lambda: training.loss(0))


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_layer_whose_backward_pass_writes_grad_is_told_of_in_the_first_step(warmup):
    layers, inputs = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1)]), torch.randn(5, 3)

    def closure():
        return Reversible.apply(torch.tanh(layers[0](inputs)), layers[1]).square().mean()

    with pytest.raises(RuntimeError, match=r"another one, which writes \.grad"):
        EconomicalASAM(layers, steps=100, warmup=warmup).backward(closure)
    EconomicalASAM(layers, steps=100, params=["0.weight"]).backward(closure)
    EconomicalASAM(layers, steps=100).backward(closure, backward=torch.Tensor.backward)


def test_parameters_that_are_the_loss_or_frozen_are_no_news():
    model = nn.ParameterDict({"loss": nn.Parameter(torch.ones(())), "frozen": nn.Parameter(torch.ones(2), False)})
    model["frozen"].grad = torch.ones(2)
    EconomicalASAM(model, steps=100).backward(lambda: model["loss"])
    assert model["loss"].grad == 1


def test_it_has_no_rho_to_be_set():
    model = nn.Linear(3, 1)
    asam = EconomicalASAM(model, steps=2, rho=0.5, momentum_rho=0.7, exact=0.5)
    for rho in (0.7, 0.5):
        asam.backward(lambda: model(torch.ones(2, 3)).square().mean())
        assert asam.rho == rho
    with pytest.raises(AttributeError, match=r"^EconomicalASAM has two rho: set momentum\.rho and exact\.rho$"):
        asam.rho = 0.0
