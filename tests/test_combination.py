"""The gradient that is handed on, c0 g0 + c1 g1: by hand, in any unit, for each call's own part."""

import copy
import math

import pytest
import torch
from slow_reference import applied, assert_near, assert_same, gradient, gradients, maximizer, weights
from test_cost import SYNCHRONIZING, live_bytes, normalized_layers, operations, problem, size_of
from torch import nn
from trainings import Training, add_

from asam import ASAM, SAM, Gradient, Momentum, SharpnessAwareOptimizer


def weighted(g00, g01, g11):
    return -3.0, 4.0


def surrogate(g00, g01, g11):
    return -0.4, 1 + 0.4 * g01 / g11


def stable(g00, g01, g11):
    return 0, (g00 / g11).sqrt()


def projected(g00, g01, g11):
    return -g01 / g00, 2.5


COMBINATIONS = [weighted, surrogate, stable, projected]
GEOMETRIES = [(n, p) for n in ("elementwise", "filterwise", "layerwise", "none") for p in (2, math.inf)]


def inner(one, other):
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


def both(training, step, normalization="elementwise", p=2, names=None):
    """The gradients at w and at w + e."""
    model = training.model
    g0 = gradient(model, lambda: training.loss(step))
    params = weights(model)
    if names is not None:
        g0, params = ({name: tensors[name] for name in names} for tensors in (g0, params))
    moved = copy.deepcopy(training.model)
    add_(moved, maximizer(params, g0, 0.3, normalization, p))
    loss = nn.functional.cross_entropy
    return g0, gradient(moved, lambda: loss(moved(training.inputs[step % 4]), training.targets[step % 4]))


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize(("normalization", "p"), GEOMETRIES)
@pytest.mark.parametrize("backward", [None, torch.Tensor.backward])
def test_by_hand(normalization, p, combine, backward):
    training = Training(normalization=normalization, p=p, combine=combine)
    for step in range(4):
        g0, g1 = both(training, step, normalization, p)
        c0, c1 = combine(inner(g0, g0), inner(g0, g1), inner(g1, g1))
        loss = training.asam.backward(lambda step=step: training.loss(step), backward=backward)
        assert torch.equal(loss, training.loss(step))
        assert_near(gradients(training.model), {n: c0 * g0[n] + c1 * g1[n] for n in g0}, rtol=1e-10, atol=1e-12)
        training.optimizer.step()
        training.optimizer.zero_grad()


@pytest.mark.parametrize("direction", [None, "away from the mean"])
def test_all_of_the_one_or_of_the_other(direction):
    sharp, ones, plain = (
        Training(direction, **options)
        for options in ({}, {"combine": lambda *_: (0, 1)}, {"combine": lambda *_: (1, 0)})
    )
    descended = Training()
    for step in range(5):
        sharp.step(step)
        ones.step(step)
        assert_near(weights(ones.model), weights(sharp.model), rtol=1e-15, atol=1e-17)
        plain.step(step)
        descended.loss(step).backward()
        descended.optimizer.step()
        descended.optimizer.zero_grad()
        assert_near(weights(plain.model), weights(descended.model), rtol=1e-15, atol=1e-15)


def test_what_is_not_perturbed_gets_the_gradient_at_w_plus_e():
    names = ["conv.weight", "head.weight"]
    training = Training(combine=surrogate, params=names)
    g0, g1 = both(training, 0, names=names)
    part = {name: g1[name] for name in names}
    c0, c1 = surrogate(inner(g0, g0), inner(g0, part), inner(part, part))
    training.asam.backward(lambda: training.loss(0))
    expected = {n: c0 * g0[n] + c1 * g1[n] if n in names else g1[n] for n in g1}
    assert_near(gradients(training.model), expected)


def test_gradients_at_w_alone_and_at_w_plus_e_alone_count():
    model = nn.ModuleDict({name: nn.Linear(3, 1, bias=False) for name in "abc"}).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    passes = iter(["ab", "bc"])

    def closure():
        return sum(model[name](inputs).square().mean() for name in next(passes))

    g0 = gradient(model["a"], lambda: model["a"](inputs).square().mean())["weight"]
    g1 = gradient(model["c"], lambda: model["c"](inputs).square().mean())["weight"]
    seen = []
    SAM(model, combine=lambda *products: seen.extend(products) or (0.25, 2.0)).backward(closure)
    assert float(seen[0] * seen[2]) > float(seen[1]) ** 2 > 0
    torch.testing.assert_close(model["a"].weight.grad, 0.25 * g0)
    torch.testing.assert_close(model["c"].weight.grad, 2.0 * g1)


@pytest.mark.parametrize("sync_ascent", [False, True])  # of one process there is nothing to put together
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_loss_scale_that_changes_leaves_no_trace(combine, sync_ascent):
    plain, scaled = Training(combine=combine), Training(combine=combine, sync_ascent=sync_ascent)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=8.0, growth_interval=1)
    for step in range(5):
        plain.step(step)
        scaled.asam.backward(lambda step=step: scaled.loss(step), backward=lambda loss: scaler.scale(loss).backward())
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.optimizer.zero_grad()
        assert_near(weights(scaled.model), weights(plain.model), rtol=1e-12, atol=1e-12)
    assert scaler.get_scale() == 4.0 * 8.0**5


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_the_result_is_in_the_unit_of_the_pass_at_w_plus_e(combine, shape):
    plain, other = Training(combine=combine), Training(combine=combine)
    plain.asam.backward(lambda: plain.loss(0))
    factors = iter([0.3, 7.0])
    other.asam.backward(
        lambda: other.loss(0).reshape(shape), backward=lambda loss: (next(factors) * loss).sum().backward()
    )
    assert_near(gradients(other.model), {n: 7.0 * g for n, g in gradients(plain.model).items()})


@pytest.mark.parametrize("backward", [None, torch.Tensor.backward])
def test_each_call_adds_its_own_part_to_the_tensors_that_are_there(backward):
    training, apart = Training(combine=surrogate), Training(combine=surrogate)
    held = {name: torch.ones_like(param) for name, param in training.model.named_parameters()}
    for name, param in training.model.named_parameters():
        param.grad = held[name]
    expected = {name: torch.ones_like(grad) for name, grad in held.items()}
    for step in range(3):
        training.asam.backward(lambda step=step: training.loss(step), backward=backward)
        apart.asam.backward(lambda step=step: apart.loss(step), backward=backward)
        expected = {name: expected[name] + grad for name, grad in gradients(apart.model).items()}
        apart.optimizer.zero_grad()
    assert_same(gradients(training.model), expected)
    assert all(param.grad is held[name] for name, param in training.model.named_parameters())


def test_several_closures_are_one_batch():
    training, whole = Training(combine=surrogate), Training(combine=surrogate)
    halves = (slice(0, 3), slice(3, 6))
    training.asam.backward([lambda part=part: training.loss(0, part) / 2 for part in halves])
    whole.asam.backward(lambda: whole.loss(0))
    assert_near(gradients(training.model), gradients(whole.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inner_products_of_half_precision_do_not_underflow(dtype):
    seen = []

    def combine(*products):
        seen.extend(products)
        return 0.5, 0.5

    training = Training(combine=combine, dtype=dtype)
    # gradients of at most 3e-4, whose squares are 0 or denormal in float16
    training.asam.backward(lambda: training.loss(0) * 1e-4)
    assert all(product.dtype == torch.float64 for product in seen)
    full = Training(combine=combine, dtype=torch.float32)
    full.model.load_state_dict({n: w.float() for n, w in weights(training.model).items()})
    full.asam.backward(lambda: full.loss(0) * 1e-4)
    for half, single in ((seen[0], seen[3]), (seen[2], seen[5])):
        assert 5e-9 < single < 1e-7
        torch.testing.assert_close(half, single, rtol=0.05, atol=0)


@pytest.mark.usefixtures("only_new_objects")
def test_a_step_copies_the_gradient_at_w():
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 1))
    size, inputs, used = size_of(model.parameters()), torch.randn(4, 200), []
    asam = ASAM(model, combine=surrogate)

    def closure():
        used.append(live_bytes())
        return model(inputs).square().mean()

    before = live_bytes()
    asam.backward(closure)
    assert used[0] == before
    assert 2 * size <= used[1] - before <= 2 * size + 200
    model.zero_grad()
    assert live_bytes() == before


def test_no_value_comes_back_from_an_accelerator():
    model, closure = problem(normalized_layers, "meta")
    asam = ASAM(model, combine=surrogate)
    names = operations(lambda: asam.backward(closure))
    names += operations(lambda: asam.backward(closure, backward=torch.Tensor.backward))
    assert not [name for name in names if name in SYNCHRONIZING]


def test_rho_zero_is_one_plain_pass():
    training = Training(combine=weighted, rho=0)
    g = gradient(training.model, lambda: training.loss(0))
    assert len(applied(training.asam, training.model, lambda: training.loss(0))) == 1
    assert_same(gradients(training.model), g)


@pytest.mark.parametrize("returned", [1.0, [0.0, 1.0], (1.0,), (1, 2, 3), None, ("1", 1.0), (0.0, None), (0, 1j)])
def test_combine_returns_two_coefficients(returned):
    training = Training(combine=lambda *_: returned)
    training.loss(1).backward()
    before, earlier = weights(training.model), gradients(training.model)
    with pytest.raises(
        TypeError, match=r"^combine must return (two coefficients \(c0, c1\)|numbers or scalar tensors), got (\d of|\w)"
    ):
        training.asam.backward(lambda: training.loss(0))
    assert_same(weights(training.model), before)
    assert_same(gradients(training.model), earlier)


def test_combine_returns_real_numbers():
    training = Training(combine=lambda *_: (torch.tensor(1j), 1.0))
    with pytest.raises(TypeError, match=r"^combine must return real numbers, got torch\.complex64$"):
        training.asam.backward(lambda: training.loss(0))


@pytest.mark.parametrize("sparse", [(True, True), (True, False), (False, True)])
def test_what_a_layer_that_is_left_out_had_in_grad_is_added_to(sparse):
    # sparse, dense, or one after the other, as autograd adds them
    model = nn.ModuleDict({"rows": nn.Embedding(4, 2, sparse=True), "head": nn.Linear(2, 1)})
    asam, rows = ASAM(model, params=["head.weight"], combine=lambda *_: (0.0, 1.0)), torch.tensor([1, 3])

    def step(sparse):
        asam.backward(lambda: model["head"](model["rows"](rows) if sparse else model["rows"].weight[rows]).exp().mean())

    step(True)
    once = model["rows"].weight.grad.to_dense()
    model.zero_grad()
    for each in sparse:
        step(each)
    torch.testing.assert_close(model["rows"].weight.grad.to_dense(), 2 * once)


@pytest.mark.parametrize("make", [ASAM, SAM])
def test_arguments(make):
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"^combine must be a callable, got tuple$"):
        make(model, combine=(0, 1))
    with pytest.raises(
        ValueError, match=r"^combine needs the gradient at w, and direction=Momentum\(\.\.\.\) takes none$"
    ):
        make(model, combine=weighted, direction=Momentum())
    make(model, combine=weighted, direction=Gradient(mean=-1))


def test_it_needs_the_whole_step():
    training, calls = Training(combine=weighted), []
    training.loss(0).backward()
    message = r"^combine needs the whole step, which only backward\(closure\) takes$"
    with pytest.raises(RuntimeError, match=message), training.asam.perturbed():
        raise AssertionError("the block must not run")
    with pytest.raises(RuntimeError, match=message):
        SharpnessAwareOptimizer(training.asam, training.optimizer).step(lambda: calls.append(1))
    assert calls == []


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("zero_in", [(1, 2), (1,), (2,)], ids=["both", "the first", "the second"])
def test_a_gradient_of_zero_is_none(combine, zero_in):
    # hinge and triplet losses have such batches; the coefficient of the other gradient stays a number
    model, inputs, calls = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=torch.float64), []

    def closure():
        calls.append(None)
        return model(inputs).sum() * (0.0 if len(calls) in zero_in else 1.0)

    SAM(model, rho=0.1, combine=combine).backward(closure)
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    if len(zero_in) == 2:
        assert not any(grad.any() for grad in gradients(model).values())


def test_the_largest_of_several_multipliers_is_the_unit():
    model, inputs = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=torch.float64)
    closures = [lambda: model(inputs).square().mean(), lambda: model(inputs).mean()]
    found = []
    for multipliers in ((2.0, 0.0), (2.0,)):
        factors = iter([*multipliers, *multipliers])
        model.zero_grad()
        SAM(model, combine=weighted).backward(
            closures[: len(multipliers)], backward=lambda loss, factors=factors: (loss * next(factors)).backward()
        )
        found.append(gradients(model))
    assert_near(*found)


def test_a_coefficient_is_one_number():
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"^combine must return scalar tensors, got shape \(3,\)$"):
        SAM(model, combine=lambda *_: (torch.ones(3), 1.0)).backward(lambda: model(torch.ones(2, 3)).sum())


def test_a_sparse_gradient_at_w_plus_e_alone_is_refused():
    model = nn.ModuleList([nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)])
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"^SAM does not take sparse gradients, and '0\.weight' has one"):
        SAM(model, combine=weighted).backward(
            lambda: model[1](model[0](torch.tensor([1, 3]))).square().mean(),
            ascent=lambda: model[1](torch.ones(2, 3)).square().mean(),
        )
    assert_same(weights(model), before)


@pytest.mark.parametrize("arguments", [{}, {"backward": torch.Tensor.backward}])
def test_ctrl_c_while_gradients_are_set_aside_loses_none(arguments, monkeypatch):
    training = Training(combine=weighted)
    training.loss(1).backward()
    earlier = gradients(training.model)

    def interrupted(params):
        params[0].grad = None
        raise KeyboardInterrupt

    monkeypatch.setattr("asam.passes._clear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.asam.backward(lambda: training.loss(0), **arguments)
    assert_same(gradients(training.model), earlier)
