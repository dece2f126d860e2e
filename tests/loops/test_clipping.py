"""The whole loop: autocast, gradient scaler, accumulation, clipping and a schedule together; and what is clipped."""

import pytest
import torch
from slow_reference import assert_near, assert_same, gradient, gradients, maximizer, shapes_problem, weights
from torch import nn

from asam import ASAM

STEPS, MICRO, RHO, CLIP = 5, 3, 0.3, 0.6


class Loop:
    """A network, an optimizer, a gradient scaler and a schedule; another batch at every micro-step."""

    def __init__(self, dtype, scaled):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
        self.model.to(dtype if dtype is torch.float64 else torch.float32)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=scaled)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.dtype = dtype
        self.log = []

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float64):
            outputs = self.model(inputs.to(self.model[0].weight.dtype))
            return nn.functional.cross_entropy(outputs.to(self.model[0].weight.dtype), targets) / MICRO

    def finish(self):
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.log.append((float(norm), self.scheduler.get_last_lr()[0], self.scaler.get_scale()))
        self.scheduler.step()
        self.optimizer.zero_grad()


def with_asam(loop):
    """The losses, and the weights that every pass has seen."""
    asam, losses, seen = ASAM(loop.model, rho=RHO), [], []
    for step in range(STEPS):
        for micro in range(MICRO):

            def closure(batch=step * MICRO + micro):
                seen.append(weights(loop.model))
                return loop.loss(batch)

            losses.append(asam.backward(closure, backward=lambda loss: loop.scaler.scale(loss).backward()))
        loop.finish()
    return losses, seen


def load(model, values):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])


def by_hand(loop, perturbed_weights=None):
    """Two passes, one after the other; at w + e of the slow reference, or as given where they are near enough."""
    losses, batch = [], 0
    for _ in range(STEPS):
        for _ in range(MICRO):
            w, loss = weights(loop.model), loop.loss(batch)
            names, params = zip(*loop.model.named_parameters(), strict=True)
            scaled = torch.autograd.grad(loop.scaler.scale(loss), params)
            g = {name: grad.double() for name, grad in zip(names, scaled, strict=True)}
            e = maximizer({name: value.double() for name, value in w.items()}, g, RHO)
            moved = {name: w[name] + e[name] for name in w}
            if perturbed_weights is not None:
                exact, moved = moved, perturbed_weights[batch]
                assert_near(moved, {name: value.float() for name, value in exact.items()}, rtol=1e-5, atol=1e-6)
            load(loop.model, moved)
            loop.scaler.scale(loop.loss(batch)).backward()
            load(loop.model, w)
            losses.append(loss.detach())
            batch += 1
        loop.finish()
    return losses


@pytest.mark.parametrize(
    ("dtype", "scaled"), [(torch.bfloat16, False), (torch.float16, True), (torch.float64, True)], ids=str
)
def test_the_whole_loop_is_two_passes_by_hand(dtype, scaled):
    ours, theirs = Loop(dtype, scaled), Loop(dtype, scaled)
    start = weights(ours.model)
    losses, seen = with_asam(ours)
    if dtype is torch.float64:
        expected = by_hand(theirs)
        assert_near(weights(ours.model), weights(theirs.model))
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    else:
        # half precision turns the last bit of w + e into a hundredth: it is checked, and then the rest is exact
        expected = by_hand(theirs, seen[1::2])
        assert_same(weights(ours.model), weights(theirs.model))
        assert torch.equal(torch.stack(losses), torch.stack(expected))
        assert ours.log == theirs.log
    norms, rates, scales = zip(*ours.log, strict=True)
    assert max(norms) > CLIP > min(norms)  # some steps are clipped, others are not
    assert len(set(rates)) == STEPS
    assert len(set(scales)) == (1 if not scaled else 1 + STEPS // 2)
    assert not torch.allclose(start["3.weight"], ours.model[3].weight, atol=0.1)


def at_the_perturbed_weights(model, closure, rho):
    """The gradient at w + e, from the slow reference."""
    w = weights(model)
    e = maximizer(w, gradient(model, closure), rho)
    load(model, {name: w[name] + e[name] for name in w})
    g = gradient(model, closure)
    load(model, w)
    return g


def test_the_norm_that_is_clipped_is_that_at_the_perturbed_weights():
    model, closure = shapes_problem()
    at_w, g = gradient(model, closure), at_the_perturbed_weights(model, closure, 0.5)
    size = torch.linalg.vector_norm(torch.cat([value.flatten() for value in g.values()]))
    ASAM(model, rho=0.5).backward(closure)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm, size, rtol=1e-12, atol=0)
    assert_near(gradients(model), {name: value * 0.1 / (size + 1e-6) for name, value in g.items()})
    assert abs(nn.utils.get_total_norm(at_w.values()) / size - 1) > 0.1


def test_the_values_that_are_clipped_are_those_at_the_perturbed_weights():
    model, closure = shapes_problem()
    g = at_the_perturbed_weights(model, closure, 0.5)
    ASAM(model, rho=0.5).backward(closure)
    nn.utils.clip_grad_value_(model.parameters(), 0.05)
    assert_near(gradients(model), {name: value.clamp(-0.05, 0.05) for name, value in g.items()})
    assert any((value.abs() > 0.05).any() for value in g.values())
    assert any((value.abs() < 0.05).any() for value in g.values())


def test_to_clip_the_norm_of_the_ascent_gradient_changes_nothing():
    results = []
    for clipped in (False, True):
        model, closure = shapes_problem()
        closure().backward()
        if clipped:
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2
        with ASAM(model, rho=0.5).perturbed():
            closure().backward()
        results.append(gradients(model))
    assert_near(results[0], results[1])
