"""A closure that changes the model: what comes back is w; what would be lost without a word is refused."""

import pytest
import torch
from slow_reference import assert_near, assert_same, gradient, gradients, maximizer, weights
from torch import nn

from asam import ASAM, SharpnessAwareOptimizer
from asam.blocks import CPU_BLOCK

LARGE = 1100  # a square of it moves in slices
assert LARGE**2 > CPU_BLOCK


def problem(width=6):
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).double()
    inputs = torch.randn(4, width, dtype=torch.float64)
    return model, lambda: model(inputs).square().mean()


def at_call(number, action):
    """A function that does it when it is called for that time."""
    calls = []

    def act():
        calls.append(1)
        if len(calls) == number:
            action()

    return act


def changing(closure, call, change):
    """The closure, which changes the model when it is called for that time."""
    change = at_call(call, change)
    return lambda: (closure(), change())[0]


def by_backward(asam, closure, step):
    asam.backward(changing(closure, 2, step))


def by_users_backward(asam, closure, step):
    step = at_call(2, step)
    asam.backward(closure, backward=lambda loss: (loss.backward(), step()))


def by_perturbed(asam, closure, step):
    closure().backward()
    with asam.perturbed():
        closure().backward()
        step()


@pytest.mark.parametrize("way", [by_backward, by_users_backward, by_perturbed])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_would_be_lost_is_refused(base, way):
    model, closure = problem()
    asam, optimizer, before = ASAM(model), base(model.parameters(), lr=0.1), weights(model)
    with pytest.raises(RuntimeError, match=f"{base.__name__} took a step while its parameters are perturbed"):
        way(asam, closure, optimizer.step)
    assert_same(weights(model), before)
    assert not optimizer.state
    optimizer.zero_grad()
    asam.backward(closure)
    optimizer.step()  # and outside it is taken
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_step_of_a_gradient_scaler_that_would_be_lost_is_refused():
    model, closure = problem()
    asam, optimizer = ASAM(model), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(closure()).backward()
    with asam.perturbed():
        scaler.scale(closure()).backward()
        with pytest.raises(RuntimeError, match="SGD took a step while its parameters are perturbed"):
            scaler.step(optimizer)


def test_an_optimizer_of_another_model_may_step_in_between():
    model, closure = problem()
    other = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = weights(other)
    other(torch.ones(3, 2)).sum().backward()
    ASAM(model).backward(changing(closure, 2, optimizer.step))
    assert not torch.equal(other.weight, before["weight"])


def step_as_soon_as_there_is_a_gradient(model):
    """The optimizer in the backward pass, one for each parameter."""
    optimizers = {param: torch.optim.SGD([param], lr=0.1) for param in model.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)


def test_an_optimizer_in_the_backward_pass_is_refused():
    model, closure = problem()
    step_as_soon_as_there_is_a_gradient(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"SGD took a step .* nor in a hook"):
        ASAM(model).backward(closure)
    assert_same(weights(model), before)


def test_an_optimizer_in_the_backward_pass_of_an_ascent_that_writes_grad_is_refused():
    # it has stepped by then, and taken the gradient away
    for run in (
        lambda asam, optimizer, closure: asam.backward(closure, backward=torch.Tensor.backward),
        lambda asam, optimizer, closure: optimizer.step(lambda: (loss := closure(), loss.backward())[0]),
    ):
        model, closure = problem()
        step_as_soon_as_there_is_a_gradient(model)
        asam = ASAM(model)
        optimizer = SharpnessAwareOptimizer(asam, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(RuntimeError, match="no perturbed parameter has a gradient"):
            run(asam, optimizer, closure)


def test_with_rho_zero_an_optimizer_in_the_backward_pass_is_that_of_a_plain_loop():
    model, closure = problem()
    expected = {name: weights(model)[name] - 0.1 * g for name, g in gradient(model, closure).items()}
    step_as_soon_as_there_is_a_gradient(model)
    ASAM(model, rho=0).backward(closure)
    assert_near(weights(model), expected)


@pytest.mark.parametrize("width", [6, LARGE])
@pytest.mark.parametrize("failing", [False, True])
def test_weights_come_back_into_other_memory(failing, width):
    model, closure = problem(width)
    before = weights(model)
    new = torch.full_like(model[0].weight.data, 7.0)

    def change():
        model[0].weight.data = new
        if failing:
            raise ValueError("boom")

    if failing:
        with pytest.raises(ValueError, match="boom"):
            ASAM(model).backward(changing(closure, 2, change))
    else:
        ASAM(model).backward(changing(closure, 2, change))
    assert model[0].weight.data_ptr() == new.data_ptr()
    assert_same(weights(model), before)


@pytest.fixture
def four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("width", [600, 900, LARGE])
def test_weights_come_back_into_other_memory_on_several_threads(width, compiled, monkeypatch):
    # large enough to be kept as memory, and on so many threads not large enough to be cut
    assert CPU_BLOCK < 600**2 < 900**2 < 4 * CPU_BLOCK < LARGE**2
    monkeypatch.setattr("asam.native.library", lambda: None)
    monkeypatch.setattr("asam.blocks.compiled", lambda kernel: kernel)
    model, closure = problem(width)
    before, old = weights(model), model[0].weight.data

    def change():
        model[0].weight.data = old.clone()

    ASAM(model, rho=5.0, compile=compiled).backward(changing(closure, 2, change))
    assert_same(weights(model), before)
    assert torch.equal(old, before["0.weight"])


@pytest.mark.parametrize("width", [6, LARGE])
def test_weights_come_back_in_another_dtype(width):
    model, closure = problem(width)
    before = weights(model)
    ASAM(model).backward(changing(closure, 2, model.float))
    assert_same(weights(model), {name: tensor.float() for name, tensor in before.items()})


@pytest.mark.parametrize("width", [6, LARGE])
def test_a_change_of_shape_is_refused_and_undone(width):
    model, closure = problem(width)
    before = weights(model)

    def perturbed_then_resized():
        with ASAM(model).perturbed():
            model[0].weight.data = torch.zeros(3, 2, dtype=torch.float64)

    closure().backward()
    with pytest.raises(RuntimeError, match=r"shape of a parameter changed .* 0\.weight\. Change the model between"):
        perturbed_then_resized()
    assert_same(weights(model), before)


def test_everything_comes_back_when_a_change_of_shape_makes_the_backward_pass_fail():
    model, closure = problem()
    before = weights(model)

    def change():
        model[0].weight.data = torch.zeros(3, 2, dtype=torch.float64)

    with pytest.raises(RuntimeError, match="size"):
        ASAM(model).backward(changing(closure, 2, change))
    assert_same(weights(model), before)


@pytest.mark.parametrize("through", [None, lambda loss: loss.backward()])
@pytest.mark.parametrize("whole", [False, True])
def test_another_parameter_in_the_place_of_one_is_told(whole, through):
    # the optimizer that was made before does not step it either
    model, closure = problem()
    asam = ASAM(model)
    asam.backward(closure, backward=through)
    model.zero_grad()
    part = model if whole else model[2]
    part.load_state_dict({name: value.clone() for name, value in part.state_dict().items()}, assign=True)
    before = weights(model)
    closure().backward()
    with pytest.raises(RuntimeError, match=r"^the model has another parameter"), asam.perturbed():
        raise AssertionError("the block must not run")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^the model has another parameter '{0 if whole else 2}\.weight' than"):
            asam.backward(closure, backward=through)
    assert_same(weights(model), before)


def test_what_was_frozen_or_is_one_of_the_others_may_take_a_place():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)]).double()
    model[2].requires_grad_(False)
    asam = ASAM(model)

    def closure():
        return model[2](model[1](model[0](torch.ones(3, 2, dtype=torch.float64)))).square().mean()

    asam.backward(closure)
    model[1].weight = model[0].weight  # tied
    model[2].weight = nn.Parameter(torch.ones(1, 2, dtype=torch.float64), requires_grad=False)
    asam.backward(closure)


def test_an_added_parameter_is_not_perturbed():
    model, closure = problem()
    asam = ASAM(model)
    model.append(nn.Linear(1, 1).double())
    seen = []
    asam.backward(lambda: (seen.append(weights(model)), closure())[1])
    assert torch.equal(seen[0]["3.weight"], seen[1]["3.weight"])
    assert not torch.equal(seen[0]["0.weight"], seen[1]["0.weight"])
    assert model[3].weight.grad is not None


class MaxNorm(nn.Linear):
    """Keeps the norm of its rows small, in the forward pass and with a new tensor each time."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(x)


class Clamped(nn.Linear):
    """Keeps its weights small, in the forward pass and in place."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.4, 0.4)
        return super().forward(x)


@pytest.mark.parametrize("width", [6, LARGE])
@pytest.mark.parametrize("layer", [MaxNorm, Clamped])
def test_weights_that_the_forward_pass_constrains(layer, width):
    model = layer(width, 3 if width == 6 else width).double()
    inputs = torch.randn(4, width, dtype=torch.float64)
    with torch.no_grad():
        model.weight.mul_(5)

    def closure():
        return model(inputs).square().mean()

    closure()  # w is what the layer makes of the weights
    w = weights(model)
    ASAM(model, rho=2.0).backward(closure)
    assert_same(weights(model), w)
    if width == 6:
        descent, e = gradients(model), maximizer(w, gradient(model, closure), 2.0)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.add_(e[name])
        assert_near(descent, gradient(model, closure))
        assert not torch.equal(model.weight, w["weight"] + e["weight"])


def test_an_embedding_with_a_largest_norm():
    model = nn.Embedding(6, 3, max_norm=1.0).double()
    tokens = torch.tensor([0, 2, 2, 5])

    def closure():
        return (model(tokens) * torch.arange(3.0)).square().mean()

    closure()
    w = weights(model)
    ASAM(model, rho=1.0).backward(closure)
    assert_same(weights(model), w)
    assert model.weight.grad.norm() > 0


@pytest.mark.parametrize("width", [6, LARGE])
def test_memory_that_two_parameters_share_is_w_again(width):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)).double()
    model[1].weight.data = model[0].weight.data
    before, inputs = weights(model), torch.randn(4, width, dtype=torch.float64)
    ASAM(model).backward(lambda: model(inputs).square().mean())
    assert_same(weights(model), before)


def test_fewer_rows_at_the_same_address_are_told():
    model, closure = problem(LARGE)
    before = weights(model)
    closure().backward()

    def cut():
        model[0].weight.data = model[0].weight.data[:5]

    with pytest.raises(RuntimeError, match=r"shape of a parameter changed .*: 0\.weight"), ASAM(model).perturbed():
        cut()
    assert_same(weights(model), before)
