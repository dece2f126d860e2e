"""The gradient at w + e: closed forms, invariances, accumulation, and parameters of every kind."""

import copy
import pickle

import pytest
import torch
from slow_reference import (
    applied,
    assert_near,
    assert_same,
    gradient,
    gradients,
    maximizer,
    shapes_problem,
    weights,
)
from torch import nn

from asam import ASAM, SAM


class Bowl(nn.Module):
    """0.5 w'Aw."""

    def __init__(self):
        super().__init__()
        root = torch.randn(6, 6, dtype=torch.float64)
        self.A = root @ root.T
        self.w = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self):
        return 0.5 * self.w @ self.A @ self.w


def step(asam, optimizer, closure):
    loss = asam.backward(closure)
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("make", [lambda model: ASAM(model, rho=0.5, eta=0.1), lambda model: SAM(model, rho=0.5)])
def test_gradient_on_a_quadratic(make):
    bowl = Bowl()
    asam = make(bowl)
    w, A = bowl.w.detach().clone(), bowl.A  # noqa: N806
    g = A @ w
    T = torch.ones_like(w) if isinstance(asam, SAM) else w.abs() + 0.1  # noqa: N806
    e = 0.5 * T**2 * g / (T * g).norm()

    loss = asam.backward(bowl)

    torch.testing.assert_close(bowl.w.grad, A @ (w + e), rtol=1e-13, atol=0)
    torch.testing.assert_close(loss, 0.5 * w @ A @ w, rtol=0, atol=0)
    assert not loss.requires_grad
    assert torch.equal(bowl.w, w)


def rescaled(model, factor):
    """The same function of a ReLU network, with layers that are ``factor`` times larger and smaller."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for param in model[0].parameters():
            param.mul_(factor)
        model[2].weight.div_(factor).mul_(3)
        model[2].bias.mul_(3)
        model[4].weight.div_(3)
    return model


@pytest.mark.parametrize("p", [1.5, 2, float("inf")])
def test_invariant_to_rescaling_a_relu_network(p):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    units, losses = [], []
    for network in (model, rescaled(model, 7.3)):

        def closure(network=network):
            losses.append(nn.functional.cross_entropy(network(inputs), targets))
            return losses[-1]

        asam = ASAM(network, rho=0.4, eta=0.0, bias="scaled", p=p)
        at_w, at_perturbed = applied(asam, network, closure)
        units.append({name: (at_perturbed[name] - at_w[name]) / at_w[name].abs() for name in at_w})
    assert_near(units[1], units[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[3], losses[1], rtol=1e-12, atol=0)
    assert losses[1] > losses[0] + 1e-3


def test_rho_zero_is_the_base_optimizer():
    trajectories = []
    for sharp in (False, True):
        model, closure = shapes_problem()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        calls, trajectory = [], []

        def counted(closure=closure, calls=calls):
            calls.append(1)
            return closure()

        asam = ASAM(model, rho=0)
        for _ in range(10):
            if sharp:
                loss = step(asam, optimizer, counted)
            else:
                loss = counted()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            trajectory.append({"loss": loss.detach(), **weights(model)})
        assert len(calls) == 10
        trajectories.append(trajectory)
    for plain, sharp in zip(*trajectories, strict=True):
        assert_same(sharp, plain)


def test_rho_may_be_set_at_any_time():
    model, closure = shapes_problem()
    asam = ASAM(model, rho=0.1)
    asam.rho = 0.7
    e = maximizer(weights(model), gradient(model, closure), 0.7)
    _, at_perturbed = applied(asam, model, closure)
    assert_near(at_perturbed, {name: w + e[name] for name, w in weights(model).items()})


def test_zero_gradient_moves_nothing():
    model, closure = shapes_problem()
    at_w, at_perturbed = applied(ASAM(model), model, lambda: closure() * 0)
    assert_same(at_perturbed, at_w)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(model).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("p", [1.5, 2, 3, float("inf")])
def test_a_non_finite_ascent_gradient_reaches_the_descent_gradient(p, value):
    model, closure = shapes_problem()
    before, factors = weights(model), iter([value, 1.0])
    ASAM(model, p=p).backward(lambda: closure() * next(factors))
    assert all(grad.isnan().all() for grad in gradients(model).values())
    assert_same(weights(model), before)


@pytest.mark.parametrize("p", [1.5, 2, 3, float("inf")])
@pytest.mark.parametrize("factor", [1e-28, 1e28, 1e30])
def test_the_size_of_the_loss_does_not_matter(factor, p):
    model, closure = shapes_problem(torch.float32)
    _, expected = applied(ASAM(model, p=p), model, closure)
    w, at_perturbed = applied(ASAM(model, p=p), model, lambda: closure() * factor)
    assert any((at_perturbed[name] - w[name]).abs().max() > 0.01 for name in w)
    # a float32 gradient is right to 1e-6, w + e to 1e-7 of w
    assert_near(at_perturbed, expected, rtol=1e-5, atol=1e-6)


class Lines(nn.Module):
    """A loss whose gradients share one buffer, and one whose gradient is expanded."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))

    def shared(self):
        return (self.a + self.b).square().sum()

    def viewed(self):
        return (self.a.view(-1) + self.b.view(-1)).pow(4).sum()

    def expanded(self):
        return self.a.sum() - 2 * self.b.sum()


@pytest.mark.parametrize("names", [("shared",), ("viewed",), ("expanded",), ("shared", "viewed", "shared")])
def test_gradients_that_share_memory(names):
    model = Lines()
    w = weights(model)

    def total():
        return sum(getattr(model, name)() for name in names)

    e = maximizer(w, gradient(model, total), 0.5)
    seen = []

    def first():
        seen.append(weights(model))
        return getattr(model, names[0])()

    ASAM(model).backward([first, *(getattr(model, name) for name in names[1:])])
    assert_near(seen[1], {name: w[name] + e[name] for name in w})
    descent = gradients(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(e[name])
    assert_near(descent, gradient(model, total))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_parameters_of_any_memory_layout(layout, monkeypatch):
    model, closure = shapes_problem()
    before = weights(model)
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        model.head.weight = nn.Parameter(model.head.weight.detach().t().contiguous().t())
    else:
        storage = torch.zeros(3, 8, dtype=torch.float64)
        storage[:, ::2] = model.head.weight.detach()
        model.head.weight = nn.Parameter(storage[:, ::2])
    assert not all(p.is_contiguous() for p in model.parameters())
    for limit in (2**18, 7):
        monkeypatch.setattr("asam.blocks.CPU_BLOCK", limit)
        e = maximizer(before, gradient(model, closure), 0.5)
        _, at_perturbed = applied(ASAM(model), model, closure)
        assert_near(at_perturbed, {name: before[name] + e[name] for name in before})
        assert_same(weights(model), before)


def test_state_dict_holds_rho():
    asam = ASAM(nn.Linear(2, 1), rho=0.3)
    assert asam.state_dict() == {"rho": 0.3}
    other = ASAM(nn.Linear(2, 1))
    other.load_state_dict(asam.state_dict())
    assert other.rho == 0.3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_independent(duplicate):
    model, _ = shapes_problem()
    inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    asam = ASAM(model, rho=0.4, eta=0.02, bias="scaled", params=["conv.weight", "head.bias"])
    other, other_model = duplicate((asam, model))
    before = weights(model)
    other.backward(lambda: other_model(inputs).square().mean())
    assert all(grad is None for grad in gradients(model).values())
    asam.backward(lambda: model(inputs).square().mean())
    assert_same(gradients(other_model), gradients(model))
    torch.optim.SGD(other_model.parameters(), lr=1.0).step()
    assert_same(weights(model), before)
    assert repr(other) == repr(asam)


def test_repr_names_what_was_chosen():
    assert "rho=0.3" in repr(SAM(nn.Linear(2, 1), rho=0.3))
    assert "parameters=2" in repr(ASAM(nn.Linear(2, 1)))
    assert "eta=0.2" in repr(ASAM(nn.Linear(2, 1), eta=0.2))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_loss_that_comes_back_is_a_scalar(shape):
    model, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    loss = ASAM(model).backward(lambda: model(inputs).square().mean().reshape(shape))
    assert loss.shape == ()


def test_a_complex_loss_is_refused():
    model, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"^closure must return a real loss"):
        ASAM(model).backward(lambda: torch.complex(model(inputs).mean(), torch.zeros(())))
