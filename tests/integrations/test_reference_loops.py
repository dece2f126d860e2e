"""The loops of timm's and torchvision's training scripts, with stand-ins of the same interface for their parts."""

import pytest
import torch
from slow_reference import assert_near, assert_same, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from asam import ASAM

STEPS, MICRO_BATCHES, RHO = 4, 2, 0.3


class Scaler:
    """The interface of timm's NativeScaler: a call is the backward pass and, with ``need_update``, the step."""

    def __init__(self, scale):
        self._scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def __call__(self, loss, optimizer, clip_grad=None, clip_mode="norm", parameters=None, need_update=True):
        self._scaler.scale(loss).backward()
        if need_update:
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()


class Training:
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.asam = ASAM(self.model, rho=RHO)

    def loss(self, batch):
        generator = torch.Generator().manual_seed(batch)
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        return nn.functional.cross_entropy(self.model(x), y) / MICRO_BATCHES


def timm_loop(training, loss_scaler, average):
    model, optimizer, asam = training.model, training.optimizer, training.asam
    for batch in range(STEPS * MICRO_BATCHES):
        need_update = (batch + 1) % MICRO_BATCHES == 0
        asam.backward(
            lambda batch=batch: training.loss(batch),
            backward=lambda loss: loss_scaler(loss, optimizer, need_update=False),
        )
        if not need_update:
            continue
        loss_scaler._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        loss_scaler._scaler.step(optimizer)
        loss_scaler._scaler.update()
        optimizer.zero_grad()
        average.update_parameters(model)


def torchvision_loop(training, scaler, average):
    model, optimizer, asam = training.model, training.optimizer, training.asam
    for batch in range(STEPS * MICRO_BATCHES):
        asam.backward(lambda batch=batch: training.loss(batch), backward=lambda loss: scaler.scale(loss).backward())
        if (batch + 1) % MICRO_BATCHES:
            continue
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update_parameters(model)


def plain_loop(training, steps):
    """Neither scaler nor script: the loop of the README, with the weights after each step."""
    for batch in range(STEPS * MICRO_BATCHES):
        training.asam.backward(lambda batch=batch: training.loss(batch))
        if (batch + 1) % MICRO_BATCHES == 0:
            nn.utils.clip_grad_norm_(training.model.parameters(), 0.5)
            training.optimizer.step()
            training.optimizer.zero_grad()
            steps.append(weights(training.model))


LOOPS = {
    "timm": lambda training, average: timm_loop(training, Scaler(2.0**10), average),
    "torchvision": lambda training, average: torchvision_loop(
        training, torch.amp.GradScaler("cpu", init_scale=2.0**10), average
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_the_loop_is_that_without_a_scaler(loop):
    ours, plain, steps = Training(), Training(), []
    average = AveragedModel(ours.model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    LOOPS[loop](ours, average)
    plain_loop(plain, steps)
    assert_same(weights(ours.model), steps[-1])
    assert_same(dict(ours.model.named_buffers()), dict(plain.model.named_buffers()))
    assert ours.model[1].num_batches_tracked == STEPS * MICRO_BATCHES
    # the first update copies; no average has seen w + e
    expected = steps[0]
    for step in steps[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * step[name] for name in step}
    assert_near(weights(average.module), expected, rtol=1e-5, atol=1e-6)


def test_update_bn_of_the_averaged_model():
    training = Training()
    average = AveragedModel(training.model)
    timm_loop(training, Scaler(2.0**10), average)
    inputs = torch.randn(32, 6)
    update_bn([inputs], average)
    with torch.no_grad():
        hidden = average.module[0](inputs)
    torch.testing.assert_close(average.module[1].running_mean, hidden.mean(0))
    assert average.module[1].num_batches_tracked == 1
