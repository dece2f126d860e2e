"""What is climbed: a slow reference of each direction, and what all of them keep."""

import copy
import gc
import math

import pytest
import torch
from slow_reference import assert_near, assert_same, gradient, gradients, maximizer, weights
from test_cost import SYNCHRONIZING, live_bytes, normalized_layers, operations, problem, size_of
from torch import nn
from trainings import DIRECTIONS, Training, add_, sgd

from asam import ASAM, SAM, Gradient, Momentum, SharpnessAwareOptimizer

GEOMETRIES = [(n, p) for n in ("elementwise", "filterwise", "layerwise", "none") for p in (2, math.inf)]


def combined(a, one, b, other):
    return {name: a * one[name] + b * other[name] for name in one}


def at(model, perturbations, closure):
    """The gradient at w + e."""
    moved = copy.deepcopy(model)
    add_(moved, perturbations)
    return gradient(moved, lambda: closure(moved))


def loss_on(training, step):
    return lambda model: nn.functional.cross_entropy(model(training.inputs[step % 4]), training.targets[step % 4])


@pytest.mark.parametrize(("normalization", "p"), GEOMETRIES)
@pytest.mark.parametrize(
    ("direction", "weight", "mean"), [("away from the mean", 1, -1), ("towards the mean", 0.4, 0.6)]
)
def test_a_gradient_with_a_mean_by_hand(direction, weight, mean, normalization, p):
    training = Training(direction, normalization=normalization, p=p)
    model, m = training.model, None
    for step in range(6):
        g = gradient(model, lambda step=step: training.loss(step))
        d = g if m is None else combined(weight, g, mean, m)
        m = g if m is None else combined(0.6, m, 0.4, g)
        expected = at(model, maximizer(weights(model), d, 0.3, normalization, p), loss_on(training, step))
        loss = training.asam.backward(lambda step=step: training.loss(step))
        assert torch.equal(loss, training.loss(step))
        assert training.asam.loss_at == "w"
        assert_near(gradients(model), expected, rtol=1e-10, atol=1e-12)
        assert_near(training.memory(), m)
        training.optimizer.step()
        training.optimizer.zero_grad()


@pytest.mark.parametrize(("normalization", "p"), GEOMETRIES)
@pytest.mark.parametrize("direction", ["own momentum", "the optimizer's momentum"])
def test_momentum_by_hand(direction, normalization, p):
    training = Training(direction, normalization=normalization, p=p)
    model = training.model
    ours, m, v = weights(model), None, None
    for step in range(6):
        climbed = m if direction == "own momentum" else v
        e = {}
        if climbed is not None:
            e = maximizer(ours, {name: -value for name, value in climbed.items()}, 0.3, normalization, p)
        g = at(model, e, loss_on(training, step))
        m = g if m is None else combined(0.5, m, 0.5, g)
        v = g if v is None else combined(0.9, v, 1.0, g)
        ours = combined(1, ours, -0.1, v)
        training.step(step)
        assert training.asam.loss_at == ("w + e" if step else "w")
        assert_near(weights(model), ours, rtol=1e-10, atol=1e-12)
    if direction == "own momentum":
        assert_near(training.memory(), m, rtol=1e-10, atol=1e-12)
        assert training.asam.state_dict().keys() == {"rho", "calls", "mean"}
    else:
        assert training.asam.state_dict().keys() == {"rho", "calls"}


@pytest.mark.parametrize("gradient_alone", [Gradient(), Gradient(1.0, 0.0), Gradient(3.0)])
def test_a_gradient_without_a_mean_is_asam_to_the_bit(gradient_alone):
    ours, plain = Training(), Training()
    ours.asam = ASAM(ours.model, rho=0.3, direction=gradient_alone)
    for step in range(4):
        assert torch.equal(ours.step(step), plain.step(step))
        assert_same(weights(ours.model), weights(plain.model))
    assert ours.asam.state_dict() == {"rho": 0.3}
    assert repr(ours.asam) == repr(plain.asam)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("fails", ["forward", "backward", "never"])
@pytest.mark.parametrize("combine", [None, lambda g00, g01, g11: (0.5, 0.5)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_and_earlier_gradients_come_back_at_every_exit(dtype, direction, combine, fails):
    if combine and not DIRECTIONS[direction](Training().optimizer).needs_ascent:
        return
    training = Training(direction, dtype=dtype, combine=combine)
    model = training.model
    training.step(0)
    training.step(1)
    training.loss(3).backward()
    before, earlier = weights(model), gradients(model)
    tensors = [param.grad for param in model.parameters()]
    places = [param.data_ptr() for param in model.parameters()]
    passes, seen = 2 if training.asam._direction.needs_ascent else 1, []

    def closure():
        seen.append(weights(model))
        if len(seen) == passes and fails == "forward":
            raise Interrupted
        return training.loss(2)

    def backward(loss):
        if len(seen) == passes and fails == "backward":
            model.conv.weight.register_hook(interrupt)
        loss.backward()

    def interrupt(_):
        raise Interrupted

    if fails == "never":
        training.asam.backward(closure, backward=backward)
        assert not torch.equal(model.head.weight.grad, earlier["head.weight"])
    else:
        with pytest.raises(Interrupted):
            training.asam.backward(closure, backward=backward)
        if combine or direction == "own momentum":  # elsewhere the part of a pass that ran is in .grad, as ever
            assert_same(gradients(model), earlier)
    assert not torch.equal(seen[-1]["head.weight"], before["head.weight"])
    assert_same(weights(model), before)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), tensors, strict=True))
    assert [param.data_ptr() for param in model.parameters()] == places


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_value_comes_back_from_an_accelerator(direction):
    model, closure = problem(normalized_layers, "meta")
    optimizer = sgd(model.parameters())
    asam = ASAM(model, direction=DIRECTIONS[direction](optimizer))
    asam.backward(closure)
    optimizer.step()
    names = operations(lambda: asam.backward(closure))
    names += operations(lambda: asam.backward(closure, backward=torch.Tensor.backward))
    assert len(names) > 100
    assert not [name for name in names if name in SYNCHRONIZING]


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_copy_is_all_that_is_alive_between_the_passes(direction):
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 1))
    size, inputs, used = size_of(model.parameters()), torch.randn(4, 200), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    asam = ASAM(model, direction=DIRECTIONS[direction](optimizer))

    def closure():
        used.append(live_bytes())
        return model(inputs).square().mean()

    for _ in range(3):
        asam.backward(closure)
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    before = live_bytes()
    asam.backward(closure)
    assert size <= used[-1] - before <= size + 200
    optimizer.zero_grad()
    assert live_bytes() == before


BAD = [
    (Gradient, {"weight": math.nan}, ValueError, "^weight must be a finite number, got nan"),
    (Gradient, {"weight": "1"}, TypeError, "^weight must be a finite number, got str"),
    (Gradient, {"mean": math.inf}, ValueError, "^mean must be a finite number, got inf"),
    (Gradient, {"mean": True}, TypeError, "^mean must be a finite number, got bool"),
    (Gradient, {"decay": 1.0}, ValueError, "^decay must be a number >= 0 and < 1, got 1.0"),
    (Gradient, {"decay": -0.1}, ValueError, "^decay must be a number >= 0 and < 1, got -0.1"),
    (Momentum, {"decay": None}, TypeError, "^decay must be a number >= 0 and < 1, got NoneType"),
    (Momentum, {"decay": math.nan}, ValueError, "^decay must be a number >= 0 and < 1, got nan"),
    (Momentum, {"optimizer": 0.9}, TypeError, r"^optimizer must be a torch\.optim\.Optimizer, got float"),
    (Momentum, {"statistics_every": 0}, ValueError, "^statistics_every must be an integer >= 1, got 0"),
    (Momentum, {"statistics_every": 2.0}, TypeError, "^statistics_every must be an integer >= 1, got float"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), BAD)
def test_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@pytest.mark.parametrize("make", [ASAM, SAM])
@pytest.mark.parametrize("direction", ["gradient", Gradient, 1])
def test_a_direction_must_be_one(make, direction):
    with pytest.raises(TypeError, match=r"^direction must be a Gradient or a Momentum, got (str|type|int)$"):
        make(nn.Linear(2, 1), direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_needs_the_whole_step_says_so(direction):
    training = Training(direction)
    training.step(0)
    before = weights(training.model)
    training.loss(0).backward()
    message = r"^direction=(Gradient|Momentum)\(.*\) needs the whole step, which only backward\(closure\) takes"
    with pytest.raises(RuntimeError, match=message), training.asam.perturbed():
        raise AssertionError("the block must not run")
    calls = []

    def closure():
        calls.append(1)
        loss = training.loss(0)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=message):
        SharpnessAwareOptimizer(training.asam, training.optimizer).step(closure)
    assert calls == []
    assert_same(weights(training.model), before)


def test_repr_names_the_direction():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    assert "Gradient(weight=1.0, mean=-1.0, decay=0.6)" in repr(ASAM(model, direction=Gradient(mean=-1, decay=0.6)))
    assert "Momentum(AdamW)" in repr(SAM(model, direction=Momentum(optimizer)))
    assert "Momentum(decay=0.5)" in repr(SAM(model, direction=Momentum(decay=0.5)))


@pytest.mark.parametrize("direction", ["away from the mean", "own momentum"])
def test_a_memory_begins_with_the_first_gradient_that_is_finite(direction):
    # the first step of a gradient scaler overflows, often the second too
    results = []
    for overflows in (0, 2):
        training = Training(direction)
        for _ in range(overflows):
            training.asam.backward(lambda training=training: training.loss(0) * math.inf)
            training.optimizer.zero_grad()
        assert training.memory() == {}
        for step in range(3):
            training.asam.backward(lambda training=training, step=step: training.loss(step))
            training.optimizer.step()
            training.optimizer.zero_grad()
        results.append((training.memory(), weights(training.model)))
    for one, other in zip(*results, strict=True):
        assert_near(one, other)


def test_without_a_mean_the_gradient_is_climbed_whatever_its_weight():
    model, seen = nn.Linear(3, 1), []
    before = weights(model)

    def closure(factor):
        seen.append(weights(model))
        return model(torch.ones(2, 3)).square().mean() * factor

    asam = SAM(model, rho=0.1, direction=Gradient(weight=0.0, mean=1.0))
    for factor in (math.inf, 1.0, 1.0):
        asam.backward(lambda factor=factor: closure(factor))
    for there in (seen[3], seen[5]):
        e = torch.cat([(there[name] - before[name]).flatten() for name in before])
        assert e.norm().item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("direction", ["away from the mean", "own momentum"])
def test_a_memory_may_be_loaded_in_another_precision(direction):
    training = Training(direction)
    training.step(0)
    state = training.asam.state_dict()
    state["mean"] = {name: value.bfloat16() for name, value in state["mean"].items()}
    training.asam.load_state_dict(state)
    training.step(1)
    assert all(value.isfinite().all() for value in training.memory().values())


def test_a_memory_of_weights_of_several_types():
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 1, dtype=torch.float64))
    asam = ASAM(model, direction=Gradient(mean=-1.0), rounding="stochastic")
    for _ in range(2):
        asam.backward(lambda: model[1](model[0](torch.ones(2, 3, dtype=torch.bfloat16)).double()).square().mean())
    assert all(grad.isfinite().all() for grad in gradients(model).values())
