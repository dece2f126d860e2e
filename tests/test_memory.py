"""The memory of a direction: resumed, copied, frozen, overflown, scaled, accumulated, in half precision."""

import copy
import io
import math
import pickle

import pytest
import torch
from slow_reference import applied, assert_near, assert_same, gradient, gradients, maximizer, weights
from torch import nn
from trainings import DIRECTIONS, REMEMBERING, Training, remembered

from asam import ASAM, SAM, Gradient, Momentum


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_resumed_training_takes_the_same_steps_to_the_bit(direction, known, monkeypatch):
    if not known:  # whether gradients are finite, as on an accelerator
        monkeypatch.setattr("asam.direction.is_traced", lambda: True)
    training, resumed = Training(direction), Training(direction)
    for step in range(3):
        training.step(step)
    file = io.BytesIO()
    parts = ("model", "optimizer", "asam")
    torch.save({part: getattr(training, part).state_dict() for part in parts}, file)
    file.seek(0)
    for part, state in torch.load(file, weights_only=True).items():
        getattr(resumed, part).load_state_dict(state)
    for step in range(3, 6):
        training.step(step)
        resumed.step(step)
    assert_same(weights(resumed.model), weights(training.model))
    if direction in REMEMBERING:
        assert_same(resumed.memory(), training.memory())
        without = Training(direction)
        without.model.load_state_dict(training.model.state_dict())
        assert not torch.equal(without.step(6), training.step(6)) or not torch.equal(
            without.model.head.weight, training.model.head.weight
        )


def test_a_state_dict_is_a_copy_both_ways():
    training = Training("own momentum")
    training.step(0)
    state = training.asam.state_dict()
    kept = copy.deepcopy(state["mean"])
    training.step(1)
    assert_same(state["mean"], kept)
    training.asam.load_state_dict(state)
    training.step(2)
    assert_same(state["mean"], kept)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_copies_remember_and_are_independent(duplicate, direction):
    training, other = Training(direction), Training()
    for step in range(2):
        training.step(step)
    other.model, other.optimizer, other.asam = duplicate((training.model, training.optimizer, training.asam))
    before = weights(training.model)
    other.step(2)
    assert_same(weights(training.model), before)
    training.step(2)
    assert_same(weights(other.model), weights(training.model))
    assert repr(other.asam) == repr(training.asam)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_layer_frozen_for_a_while(direction):
    training = Training(direction)
    model, weight = training.model, training.model.conv.weight
    training.step(0)
    training.step(1)
    remembered = training.memory()["conv.weight"] if direction in REMEMBERING else None
    weight.requires_grad_(False)
    seen = applied(training.asam, model, lambda: training.loss(2))
    assert torch.equal(seen[-1]["conv.weight"], weight)
    assert not torch.equal(seen[-1]["head.weight"], model.head.weight)
    assert weight.grad is None
    weight.requires_grad_(True)
    if remembered is not None:
        assert torch.equal(training.memory()["conv.weight"], remembered)
    seen = applied(training.asam, model, lambda: training.loss(3))
    assert not torch.equal(seen[-1]["conv.weight"], weight)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_parameter_that_gets_its_first_gradient_late(direction):
    training = Training(direction, params=["conv.weight", "conv.bias", "head.weight", "head.bias"])
    model = training.model

    def without_head():
        return torch.tanh(model.conv(training.inputs[0])).square().mean()

    for _ in range(2):
        training.asam.backward(without_head)
        training.optimizer.step()
        training.optimizer.zero_grad()
    if direction in REMEMBERING:
        assert list(training.memory()) == ["conv.weight", "conv.bias"]
    remembered = training.memory() if direction in REMEMBERING else {}
    g = gradient(model, lambda: training.loss(0))
    seen = applied(training.asam, model, lambda: training.loss(0))
    moved = not torch.equal(seen[-1]["head.weight"], model.head.weight)
    assert moved == isinstance(training.asam._direction, Gradient)
    if moved:  # d = g where there is no mean yet, whatever its weight
        weight, mean = training.asam._direction.weight, training.asam._direction.mean
        d = {n: weight * g[n] + mean * remembered[n] if n in remembered else g[n] for n in training.asam._params}
        e = maximizer({n: model.get_parameter(n).detach() for n in d}, d, 0.3)
        assert_near({n: seen[-1][n] for n in d}, {n: model.get_parameter(n) + e[n] for n in d})
    training.optimizer.step()
    if direction in REMEMBERING:
        assert set(training.memory()) == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
        if moved:
            assert torch.equal(training.memory()["head.weight"], g["head.weight"])
    seen = applied(training.asam, model, lambda: training.loss(0))
    assert not torch.equal(seen[-1]["head.weight"], model.head.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("direction", REMEMBERING)
def test_a_non_finite_gradient_leaves_the_memory_as_it_was(direction, when, value):
    training = Training(direction)
    for step in range(when):
        training.step(step)
    before, at_w = training.memory(), weights(training.model)
    training.asam.backward(lambda: training.loss(when) * value)
    assert not all(grad.isfinite().all() for grad in gradients(training.model).values())
    assert_same(weights(training.model), at_w)
    training.optimizer.zero_grad()
    if when:
        assert_same(training.memory(), before)
    for step in range(when, when + 2):
        training.step(step)
        assert all(w.isfinite().all() for w in weights(training.model).values())
        assert all(value.isfinite().all() and value.abs().max() > 0 for value in training.memory().values())


@pytest.mark.parametrize("direction", REMEMBERING)
def test_a_non_finite_gradient_after_a_resumption_leaves_the_memory_too(direction):
    training, resumed = Training(direction), Training(direction)
    training.step(0)
    resumed.model.load_state_dict(training.model.state_dict())
    resumed.asam.load_state_dict(training.asam.state_dict())
    for one in (training, resumed):
        one.asam.backward(lambda one=one: one.loss(1) * math.inf)
        one.optimizer.zero_grad()
    assert training.memory()
    assert_same(resumed.memory(), training.memory())
    for one in (training, resumed):
        one.asam.backward(lambda one=one: one.loss(2))
    assert_same(resumed.memory(), training.memory())
    assert_same(gradients(resumed.model), gradients(training.model))


@pytest.mark.parametrize("direction", REMEMBERING)
def test_a_first_gradient_that_is_not_finite_is_none(direction):
    training, other = Training(direction), Training(direction)
    for one in (training, other):  # neither uses the head yet
        one.asam.backward(lambda one=one: torch.tanh(one.model.conv(one.inputs[0])).square().mean())
        one.optimizer.zero_grad()
    training.asam.backward(lambda: training.loss(1) * math.inf)
    training.optimizer.zero_grad()
    assert "head.weight" not in training.memory()
    for step in range(2, 4):
        for one in (training, other):
            one.asam.backward(lambda one=one, step=step: one.loss(step))
        assert "head.weight" in training.memory()
        assert_same(training.memory(), other.memory())
    assert_same(gradients(training.model), gradients(other.model))


@pytest.mark.parametrize("bad", [[math.inf, 1.0], [math.nan, 1.0], [math.inf, -math.inf], [-math.inf, math.nan]])
def test_one_element_that_is_not_finite_is_enough(bad):
    model = nn.Linear(3, 2, bias=False).double()
    asam = SAM(model, direction=Momentum())
    asam.backward(lambda: model.weight.sum())
    before = asam.state_dict()["mean"]
    asam.backward(lambda: (model.weight * torch.tensor([2.0, *bad])).sum())
    assert_same(asam.state_dict()["mean"], before)


def test_elements_that_add_up_to_nothing_are_taken_up():
    model = nn.Linear(2, 1, bias=False).double()
    asam = SAM(model, direction=Momentum(decay=0.5))
    for factors in ([1.0, 2.0], [1e200, -1e200]):
        asam.backward(lambda factors=factors: (model.weight * torch.tensor(factors, dtype=torch.float64)).sum())
    assert asam.state_dict()["mean"]["weight"].tolist() == [[5e199, -5e199]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_loss_scale_that_changes_leaves_no_trace(direction):
    plain, scaled = Training(direction), Training(direction)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=8.0, growth_interval=1)
    scales = set()  # powers of two: the scaler itself keeps the inverse in float32
    for step in range(6):
        plain.step(step)
        scales.add(scaler.get_scale())
        scaled.asam.backward(lambda step=step: scaled.loss(step), backward=lambda loss: scaler.scale(loss).backward())
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.optimizer.zero_grad()
        assert_near(weights(scaled.model), weights(plain.model), rtol=1e-12, atol=1e-12)
    assert len(scales) == 6
    if direction in REMEMBERING:
        assert_near(scaled.memory(), plain.memory(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("direction", REMEMBERING)
def test_the_unit_is_what_arrives_at_the_loss(direction, shape):
    plain, other = Training(direction), Training(direction)
    for step, factor in enumerate([1.0, 5.0, 0.2]):
        plain.step(step)
        other.asam.backward(
            lambda step=step: other.loss(step).reshape(shape),
            backward=lambda loss, f=factor: (f * loss).sum().backward(),
        )
        for param in other.model.parameters():
            param.grad /= factor
        other.optimizer.step()
        other.optimizer.zero_grad()
    assert_near(weights(other.model), weights(plain.model), rtol=1e-12, atol=1e-12)
    assert_near(other.memory(), plain.memory(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward", [None, torch.Tensor.backward])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_micro_batch_remembers_its_own_part(direction, backward):
    training, apart = Training(direction), Training(direction)
    for t in (training, apart):
        t.step(0)
    held = {name: torch.ones_like(param) for name, param in training.model.named_parameters()}
    for name, param in training.model.named_parameters():
        param.grad = held[name]
    expected = {name: torch.ones_like(grad) for name, grad in held.items()}
    for step in (1, 2):
        training.asam.backward(lambda step=step: training.loss(step), backward=backward)
        apart.asam.backward(lambda step=step: apart.loss(step), backward=backward)
        expected = {name: expected[name] + grad for name, grad in gradients(apart.model).items()}
        apart.optimizer.zero_grad()
    assert_same(gradients(training.model), expected)
    assert all(param.grad is held[name] for name, param in training.model.named_parameters())
    if direction in REMEMBERING:
        assert_same(training.memory(), apart.memory())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", REMEMBERING)
def test_half_precision_is_remembered_in_float32(direction, dtype):
    training = Training(direction, dtype=dtype)
    training.asam.backward(lambda: training.loss(0))
    assert all(value.dtype == torch.float32 for value in training.memory().values())
    training = Training(direction, dtype=dtype)
    before = weights(training.model)
    for step in range(3):
        training.asam.backward(
            lambda step=step: training.loss(step) * 1e-7, backward=lambda loss: (loss * 2.0**23).backward()
        )
        training.optimizer.zero_grad()
    memory = training.memory()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in memory.values())
    # in float16 the gradients without their loss scale would be 0
    full = Training(direction, dtype=torch.float32)
    full.model.load_state_dict({name: w.float() for name, w in before.items()})
    for step in range(3):
        full.asam.backward(lambda step=step: full.loss(step) * 1e-7)
        full.optimizer.zero_grad()
    for name, value in full.memory().items():
        torch.testing.assert_close(memory[name], value, rtol=0, atol=0.03 * value.abs().max().item())
    assert_same(weights(training.model), before)


@pytest.mark.parametrize("direction", REMEMBERING)
def test_a_memory_that_was_saved_in_half_precision_goes_on_in_float32(direction):
    training = Training(direction, dtype=torch.float32)
    training.step(0)
    state = training.asam.state_dict()
    training.asam.load_state_dict({**state, "mean": {name: m.bfloat16() for name, m in state["mean"].items()}})
    assert all(value.dtype == torch.float32 for value in training.memory().values())
    training.step(1)


@pytest.mark.parametrize("weight", [0, -1.0])
def test_a_gradient_alone_must_be_climbed(weight):
    with pytest.raises(ValueError, match=rf"^weight must be a number > 0 where mean is 0, got {weight}$"):
        Gradient(weight)


@pytest.mark.parametrize("way", ["a plain pass", "gradient", "momentum"])
def test_with_rho_zero_momentum_remembers_and_a_gradient_rests(way):
    training = Training({"gradient": "away from the mean", "momentum": "own momentum"}.get(way), rho=0.0)
    g = gradient(training.model, lambda: training.loss(0))
    seen = applied(training.asam, training.model, lambda: training.loss(0))
    assert len(seen) == 1
    assert training.asam.loss_at == "w"
    assert_same(gradients(training.model), g)
    if way == "momentum":
        assert_same(training.memory(), g)
    elif way == "gradient":
        assert training.memory() == {}


FLAWS = [
    (lambda state: {**state, "mean": None}, TypeError, "^state_dict's mean must be a mapping from names to tensors$"),
    (lambda state: {**state, "mean": {"0": 1.0}}, TypeError, "^state_dict's mean must be a mapping from names"),
    (lambda state: {"rho": 0.5}, ValueError, r"^state_dict must have the keys \[('calls', )?'mean', 'rho'\], got \["),
    (lambda state: {**state, "eta": 1}, ValueError, r"^state_dict must have the keys .*, got \[.*'eta'"),
    (lambda state: {**state, "rho": -1.0}, ValueError, "^rho must be a finite number >= 0, got -1.0"),
    (
        lambda state: {**state, "mean": {"nothing": torch.ones(3)}},
        ValueError,
        "^state_dict has a mean for 'nothing', which is not a perturbed parameter$",
    ),
    (
        lambda state: {**state, "mean": {"head.bias": torch.ones(2)}},
        ValueError,
        r"^state_dict has a mean of shape \(2,\) for 'head.bias' of shape \(3,\)$",
    ),
    (
        lambda state: {**state, "mean": {"head.bias": torch.ones(3, dtype=torch.int64)}},
        TypeError,
        "^state_dict has a mean of torch.int64 for 'head.bias'",
    ),
]


@pytest.mark.parametrize(("flawed", "error", "message"), FLAWS)
@pytest.mark.parametrize("direction", REMEMBERING)
def test_a_bad_state_dict_changes_nothing(direction, flawed, error, message):
    training = Training(direction)
    training.step(0)
    before = training.asam.state_dict()
    with pytest.raises(error, match=message):
        training.asam.load_state_dict(flawed(before))
    after = training.asam.state_dict()
    assert_same(after.pop("mean"), before.pop("mean"))
    assert after == before


@pytest.mark.parametrize(("calls", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_a_bad_number_of_calls(calls, error):
    asam = SAM(nn.Linear(2, 1), direction=Momentum())
    with pytest.raises(error, match=r"^calls must be an integer >= 0, got"):
        asam.load_state_dict({"rho": 0.1, "calls": calls, "mean": {}})
    assert asam.rho == 0.05


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("loaded", WRAPPERS)
@pytest.mark.parametrize("saved", WRAPPERS)
def test_a_memory_is_loaded_however_the_model_is_wrapped(saved, loaded):
    def made(wrapper):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        return model, ASAM(WRAPPERS[wrapper](model), direction=Momentum(), params=["0.weight", "1.bias"])

    model, asam = made(saved)
    asam.backward(lambda: model(torch.ones(4, 3)).square().mean())
    other, resumed = made(loaded)
    assert remembered(resumed) == {}
    resumed.load_state_dict(asam.state_dict())
    assert_same(remembered(resumed), remembered(asam))
    assert list(remembered(resumed)) == ["0.weight", "1.bias"]
    resumed.backward(lambda: other(torch.ones(4, 3)).square().mean())
    assert resumed.loss_at == "w + e"


def test_a_layer_may_be_called_module():
    model = nn.ModuleDict({"module": nn.Linear(4, 3)})
    wrapped = nn.DataParallel(model)
    asams = [ASAM(each, direction=Momentum()) for each in (model, wrapped)]
    for asam, other in (asams, reversed(asams)):
        asam.backward(lambda: model["module"](torch.randn(2, 4)).square().mean())
        other.load_state_dict(asam.state_dict())
        assert_same(other.state_dict()["mean"], asam.state_dict()["mean"])


def test_names_that_would_be_the_same_are_left():
    model = nn.ModuleDict({"module": nn.Linear(2, 1), "other": nn.ModuleDict({"_orig_mod": nn.Linear(2, 1)})})
    model["other"].weight = nn.Parameter(torch.ones(1, 2))
    asam = ASAM(model, direction=Momentum())
    assert list(asam.state_dict()["mean"]) == [name for name, _ in model.named_parameters()]


def test_there_is_a_place_for_every_mean_that_may_come():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.bfloat16).requires_grad_(False), nn.Linear(2, 1))
    asam = ASAM(model, direction=Gradient(mean=1.0), rounding="stochastic")
    places = asam.state_dict()["mean"]
    assert {name: place.shape for name, place in places.items()} == {"1.weight": (1, 2), "1.bias": (1,)}
    assert all(place.isnan().all() and not place.requires_grad for place in places.values())
