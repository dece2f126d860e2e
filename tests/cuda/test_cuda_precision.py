"""float16 and bfloat16 autocast with a gradient scaler on a GPU."""

from contextlib import nullcontext

import pytest
import torch
from slow_reference import assert_near, assert_same, weights
from torch import nn

from asam import ASAM

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Training:
    def __init__(self, dtype=torch.float16, autocast=True, scaled=True):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
        self.model = nn.Sequential(*layers).to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.asam = ASAM(self.model, rho=0.3)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000, enabled=scaled)
        self.dtype, self.autocast = dtype, autocast

    def step(self, step, factors=(1.0, 1.0)):
        generator, factor = torch.Generator().manual_seed(step), iter(factors)
        inputs = torch.randn(8, 3, 8, 8, generator=generator).to(DEVICE)
        targets = torch.randint(4, (8,), generator=generator).to(DEVICE)

        def closure():
            with torch.autocast(DEVICE, self.dtype, enabled=self.autocast):
                loss = nn.functional.cross_entropy(self.model(inputs), targets)
            return loss * next(factor)

        loss = self.asam.backward(closure, backward=lambda value: self.scaler.scale(value).backward())
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_follows_float32(dtype):
    half, single = Training(dtype), Training(autocast=False, scaled=False)
    for step in range(10):
        loss, expected = half.step(step), single.step(step)
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
    assert half.scaler.get_scale() == 2.0**10
    assert all(param.dtype == torch.float32 for param in half.model.parameters())
    assert_near(weights(half.model), weights(single.model), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
def test_an_overflow_in_either_pass_skips_the_step(overflowing):
    training = Training()
    training.step(0)
    before = weights(training.model)
    training.step(1, (3e38, 1.0) if overflowing == "ascent" else (1.0, 3e38))
    assert_same(weights(training.model), before)
    assert training.scaler.get_scale() == 2.0**9
    training.step(2)
    assert not torch.equal(training.model[4].weight, before["4.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_open_around_backward_does_not_keep_the_weights_of_w(dtype):
    grads = []
    for outside in (True, False):
        model = Training().model
        inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)

        def closure(model=model, inputs=inputs, inner=not outside):
            with torch.autocast(DEVICE, dtype) if inner else nullcontext():
                return model(inputs).float().square().mean()

        with torch.autocast(DEVICE, dtype, enabled=outside):
            ASAM(model, rho=1.0).backward(closure)
        grads.append({name: param.grad for name, param in model.named_parameters()})
    assert_near(grads[0], grads[1], rtol=1e-3, atol=1e-4)
