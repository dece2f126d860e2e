"""Micro-batches, several closures, an ascent of its own, a backward of the user's; parameters without a gradient."""

import pytest
import torch
from slow_reference import applied, assert_near, assert_same, gradient, gradients, maximizer, shapes_problem, weights
from torch import nn

from asam import ASAM


def problem():
    """A model and the loss on a slice of one batch."""
    model, _ = shapes_problem()
    inputs, targets = torch.randn(8, 2, 5, 5, dtype=torch.float64), torch.randint(3, (8,))

    def loss(part=slice(None), reduction="mean"):
        return nn.functional.cross_entropy(model(inputs[part]), targets[part], reduction=reduction)

    return model, loss


def gradient_of(*arguments, before=(), **options):
    model, loss = problem()
    asam = ASAM(model)
    for closure in before:
        asam.backward(lambda c=closure: c(loss))
    value = asam.backward([lambda c=c: c(loss) for c in arguments], **{k: v(loss) for k, v in options.items()})
    return {"loss": value, **gradients(model)}


QUARTERS = [slice(i, i + 2) for i in range(0, 8, 2)]


def test_earlier_gradients_are_added_to():
    first, second = (gradient_of(lambda loss, q=q: loss(q)) for q in QUARTERS[:2])
    both = gradient_of(lambda loss: loss(QUARTERS[1]), before=[lambda loss: loss(QUARTERS[0])])
    del first["loss"], second["loss"], both["loss"]
    assert_near(both, {name: first[name] + second[name] for name in first}, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_closures_are_one_batch(reduction):
    share = 4 if reduction == "mean" else 1
    parts = gradient_of(*(lambda loss, q=q: loss(q, reduction) / share for q in QUARTERS))
    assert_near(parts, gradient_of(lambda loss: loss(slice(None), reduction)))


def test_ascent_on_a_part_of_the_batch():
    model, loss = problem()
    w = weights(model)
    g = gradient(model, lambda: loss(QUARTERS[0]))
    e = maximizer(w, g, 0.5)
    climbed = loss(QUARTERS[0]).detach()
    calls = []

    def ascent():
        calls.append("ascent")
        return loss(QUARTERS[0])

    def closure():
        calls.append("descent")
        return loss()

    value = ASAM(model).backward(closure, ascent=ascent)

    assert calls == ["ascent", "descent"]
    assert torch.equal(value, climbed)
    descent = gradients(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(e[name])
    assert_near(descent, gradient(model, loss))


def test_the_users_backward_runs_in_both_passes():
    model, loss = problem()
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls = []

    def backward(value):
        calls.append(value.detach())
        (4 * value).backward()

    earlier = {name: torch.full_like(param, 3.0) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        param.grad = earlier[name].clone()
    value = ASAM(model).backward(lambda: loss() * outside, backward=backward)

    assert torch.equal(value, calls[0])
    assert len(calls) == 2
    assert calls[1] > calls[0]
    torch.testing.assert_close(outside.grad, 4 * (calls[0] + calls[1]))
    expected = gradient_of(lambda loss: loss())
    del expected["loss"]
    assert_near(gradients(model), {name: earlier[name] + 4 * g for name, g in expected.items()})


class Odd(nn.Module):
    """A frozen layer, two names for one weight, an unused layer, and layers that only some passes use."""

    def __init__(self):
        super().__init__()
        self.frozen, self.first, self.second, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.branches = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.inputs = torch.randn(5, 4)
        self.double()
        self.inputs = self.inputs.double()

    def loss(self, *branches):
        hidden = self.second(torch.tanh(self.first(torch.tanh(self.frozen(self.inputs)))))
        return sum((self.branches[i](hidden).square().mean() for i in branches), hidden.square().mean())


@pytest.mark.parametrize("backward", [None, lambda loss: loss.backward()])
def test_frozen_tied_and_unused_parameters(backward):
    model = Odd()
    w = weights(model)
    live = {n: p for n, p in model.named_parameters() if not n.startswith(("frozen", "unused", "branches.1"))}
    assert "second.weight" not in live
    g = dict(zip(live, torch.autograd.grad(model.loss(0), list(live.values())), strict=True))
    e = maximizer({name: w[name] for name in live}, g, 0.5)

    seen = applied(ASAM(model), model, lambda: model.loss(0), backward=backward)

    assert len(seen) == 2
    assert_near(seen[1], {name: w[name] + e[name] if name in live else w[name] for name in w})
    assert_same(weights(model), w)
    assert [name for name, grad in gradients(model).items() if grad is not None] == list(live)


@pytest.mark.parametrize("backward", [None, lambda loss: loss.backward()])
@pytest.mark.parametrize(("ascent", "descent"), [((0,), (1,)), ((0, 1), ()), ((), (0, 1))])
def test_a_parameter_with_a_gradient_in_one_pass_only(ascent, descent, backward):
    model = Odd()
    w = weights(model)
    live = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("unused")}
    names = [n for n in live if not n.startswith("branches") or int(n.split(".")[1]) in ascent]
    g = dict(zip(names, torch.autograd.grad(model.loss(*ascent), [live[n] for n in names]), strict=True))
    e = maximizer({name: w[name] for name in names}, g, 0.5)
    passes, seen = iter([ascent, descent]), []

    def closure():
        seen.append(weights(model))
        return model.loss(*next(passes))

    ASAM(model).backward(closure, backward=backward)

    assert_near(seen[1], {name: w[name] + e[name] if name in e else w[name] for name in w})
    assert_same(weights(model), w)
    for i in range(2):
        assert (model.branches[i].weight.grad is not None) == (i in descent)


def test_a_layer_frozen_later_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    inputs = torch.randn(4, 3)
    asam = ASAM(model)
    model(inputs).square().mean().backward()
    model[0].requires_grad_(False)
    before = weights(model)
    with asam.perturbed():
        moved = {name: not torch.equal(w, before[name]) for name, w in weights(model).items()}
    assert moved == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True}


@pytest.mark.parametrize("way", ["backward", "through", "perturbed"])
def test_sparse_gradients(way):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    before = weights(model)

    def closure():
        return model(torch.tensor([1, 3])).square().mean()

    def run(asam):
        if way == "perturbed":
            closure().backward()
            with asam.perturbed():
                closure().backward()
        else:
            asam.backward(closure, backward=None if way == "backward" else lambda loss: loss.backward())

    with pytest.raises(RuntimeError, match=r"does not take sparse gradients, and '0\.weight' has one.*params="):
        run(ASAM(model))
    assert_same(weights(model), before)
    model.zero_grad()
    run(ASAM(model, params=["1.weight", "1.bias"]))
    assert_same(weights(model), before)
    assert model[0].weight.grad.is_sparse
    assert model[1].weight.grad is not None
