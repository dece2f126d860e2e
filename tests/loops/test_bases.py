"""Every torch.optim optimizer that takes its step from the gradient, in its faster forms too."""

import pytest
import torch
from slow_reference import assert_near, assert_same, gradient, maximizer, shapes_problem, weights
from torch.optim import Optimizer

from asam import ASAM

# LBFGS evaluates the closure itself; SparseAdam takes sparse gradients, ASAM none
LEFT_OUT = {"Optimizer", "LBFGS", "SparseAdam"}
OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and name not in LEFT_OUT
}
MATRICES_ONLY = {"Muon"}
FORMS = [
    (name, form)
    for name in ("SGD", "Adam", "AdamW", "Adagrad")
    for form in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True})
] + [(name, {"foreach": True}) for name in ("RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop")]


def step_by_hand(model, optimizer, closure):
    """The base fed with the gradient at w + e, from the slow reference; the loss at w."""
    w = weights(model)
    loss = closure().detach()
    e = maximizer(w, gradient(model, closure), 0.4)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(e[name])
    g = gradient(model, closure)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(w[name])
            param.grad = g[name]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def run(make, by_hand):
    model, closure = shapes_problem()
    optimizers = make(model)
    asam = ASAM(model, rho=0.4)
    losses = []
    for _ in range(4):
        if by_hand:
            losses.append(step_by_hand(model, optimizers, closure))
        else:
            losses.append(asam.backward(closure))
            optimizers.step()
            optimizers.zero_grad()
    return {"losses": torch.stack(losses), **weights(model)}


def agree(make):
    ours, theirs = run(make, False), run(make, True)
    # adaptive bases divide tiny gradients by their own size, and rounding with them
    assert_near(ours, theirs, rtol=1e-8, atol=1e-9)
    assert not torch.equal(ours["head.weight"], shapes_problem()[0].head.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_base_takes_the_step_of_the_gradient_at_the_perturbed_weights(name):
    def make(model):
        params = [p for p in model.parameters() if p.ndim == 2 or name not in MATRICES_ONLY]
        return OPTIMIZERS[name](params, lr=0.01)

    agree(make)


@pytest.mark.parametrize(("name", "form"), FORMS, ids=str)
def test_every_form_of_a_base(name, form):
    agree(lambda model: OPTIMIZERS[name](model.parameters(), lr=0.01, **form))


class Both:
    """Muon for the matrices, AdamW for the rest: two optimizers and one gradient."""

    def __init__(self, model):
        groups = [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim != 2]
        self.optimizers = torch.optim.Muon(groups[0], lr=0.02), torch.optim.AdamW(groups[1], lr=0.01)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_for_the_matrices_and_adamw_for_the_rest():
    agree(Both)


def test_lbfgs_takes_the_gradient_at_the_perturbed_weights_at_each_of_its_points():
    # not through SharpnessAwareOptimizer, which refuses it: as a gradient
    model, closure = shapes_problem()
    optimizer, asam = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=3), ASAM(model, rho=0.05)
    calls, start = [], closure().detach()

    def sharpness_aware():
        optimizer.zero_grad()
        calls.append(weights(model))
        return asam.backward(closure)

    loss = optimizer.step(sharpness_aware)
    assert torch.equal(loss, start)
    assert len(calls) > 1
    assert closure() < start


def test_gradients_added_up_in_the_memory_of_the_user():
    # zero_grad(set_to_none=False), as capturable steps and gradient buckets have it
    results = []
    for kept in (False, True):
        model, closure = shapes_problem()
        optimizer, asam = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ASAM(model, rho=0.4)
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if kept else None
        places = [param.grad for param in model.parameters()]
        for _ in range(4):
            asam.backward(closure)
            optimizer.step()
            assert not kept or all(param.grad is grad for param, grad in zip(model.parameters(), places, strict=True))
            optimizer.zero_grad(set_to_none=not kept)
        results.append(weights(model))
    assert_same(results[0], results[1])
