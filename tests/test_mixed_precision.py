"""Gradient scaler, autocast, clipping: the loop around the gradient stays as it is."""

import pytest
import torch
from slow_reference import assert_near, assert_same, gradients, weights
from torch import nn

from asam import ASAM, SAM

SCALE = 2.0**10


class Training:
    """A float32 network in an ordinary mixed-precision loop, with or without a scaler."""

    def __init__(self, scaled, autocast, make=ASAM, p=2, scale=SCALE):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.asam = make(self.model, rho=0.3, p=p)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=scaled)
        self.autocast = autocast

    def step(self, step, factors=(1.0, 1.0)):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        factor = iter(factors)

        def closure():
            with torch.autocast("cpu", torch.float16, enabled=self.autocast):
                loss = nn.functional.cross_entropy(self.model(inputs), targets)
            return loss * next(factor)

        loss = self.asam.backward(closure, backward=lambda loss: self.scaler.scale(loss).backward())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss, norm


@pytest.mark.parametrize("make", [ASAM, SAM])
@pytest.mark.parametrize("p", [1.5, 2, float("inf")])
def test_a_scaler_changes_nothing_in_float32(make, p):
    plain, scaled = Training(False, False, make, p), Training(True, False, make, p)
    clipped = 0
    for step in range(10):
        (loss, norm), (expected_loss, expected_norm) = scaled.step(step), plain.step(step)
        clipped += norm > 0.5
        # powers of two go through every rounding unchanged
        assert torch.equal(loss, expected_loss)
        assert torch.equal(norm, expected_norm)
        assert_same(weights(scaled.model), weights(plain.model))
    assert clipped > 0


def test_a_scaler_changes_rounding_alone_in_float16():
    plain, scaled = Training(False, True), Training(True, True)
    start = weights(plain.model)
    for step in range(10):
        (loss, norm), (expected_loss, expected_norm) = scaled.step(step), plain.step(step)
        # float16 keeps 11 bits, and fewer of the small gradients that only the scaled pass holds exactly
        torch.testing.assert_close(loss, expected_loss, rtol=2**-10, atol=2**-10)
        torch.testing.assert_close(norm, expected_norm, rtol=2**-8, atol=0)
    assert_near(weights(scaled.model), weights(plain.model), rtol=2**-10, atol=2**-10)
    assert not torch.allclose(start["3.weight"], scaled.model[3].weight, atol=0.1)


@pytest.mark.parametrize("p", [1.5, 2, float("inf")])
@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_overflow_in_either_pass_skips_the_step(autocast, overflowing, p):
    training = Training(True, autocast, p=p)
    training.step(0)
    before = weights(training.model)
    state = [s["momentum_buffer"].clone() for s in training.optimizer.state.values()]

    training.step(1, (3e38, 1.0) if overflowing == "ascent" else (1.0, 3e38))

    assert_same(weights(training.model), before)
    assert all(torch.equal(s["momentum_buffer"], b) for s, b in zip(training.optimizer.state.values(), state))  # noqa: B905
    assert training.scaler.get_scale() == SCALE / 2
    training.step(2)
    assert training.scaler.get_scale() == SCALE / 2
    assert not torch.equal(training.model[0].weight, before["0.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", [None, lambda loss: loss.backward()])
def test_autocast_may_be_open_around_backward(dtype, backward):
    # it keeps its half-precision copies of the weights: those of w must not serve the pass at w + e
    results = []
    for outside in (True, False):
        model = Training(False, False).model
        inputs, targets = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3

        def loss(model=model, inputs=inputs, targets=targets):
            return nn.functional.cross_entropy(model(inputs), targets)

        def inside(loss=loss):
            with torch.autocast("cpu", dtype):
                return loss()

        if outside:
            with torch.autocast("cpu", dtype):
                ASAM(model, rho=1.0).backward(loss, backward=backward)
                after = loss()
        else:
            ASAM(model, rho=1.0).backward(inside, backward=backward)
            after = inside()
            at_w = dict(zip(gradients(model), torch.autograd.grad(inside(), list(model.parameters())), strict=True))
        results.append({"after": after.detach(), **gradients(model)})
    assert_same(results[0], results[1])
    assert not torch.allclose(results[1]["3.weight"], at_w["3.weight"], rtol=0.05)


def test_autocast_may_be_open_around_perturbed():
    grads = []
    for outside in (True, False):
        model = Training(False, False).model
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        asam = ASAM(model, rho=1.0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=outside):
            model(inputs).float().square().mean().backward()
            with asam.perturbed():
                model(inputs).float().square().mean().backward()
        grads.append(gradients(model))
    assert_same(grads[0], grads[1])
