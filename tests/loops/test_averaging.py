"""Averages of the weights, exponential or stochastic: they see w alone."""

import pytest
import torch
from slow_reference import assert_near, assert_same, weights
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from asam import ASAM


class Run:
    """A network with batch norm that trains at w + e, and the weights after every step."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.asam = ASAM(self.model, rho=0.5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.data = torch.randn(6, 16, 4, dtype=torch.float64)

    def step(self, batch):
        before = weights(self.model)
        self.asam.backward(lambda: self.model(self.data[batch]).square().mean())
        assert_same(weights(self.model), before)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return weights(self.model)


def test_an_exponential_average_is_that_by_hand():
    run = Run()
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    by_hand = None
    for batch in range(6):
        w = run.step(batch)
        average.update_parameters(run.model)
        by_hand = w if by_hand is None else {name: torch.lerp(by_hand[name], w[name], 1 - 0.9) for name in w}
    assert_same(weights(average.module), by_hand)
    assert not torch.allclose(average.module[0].weight, run.model[0].weight, rtol=1e-3)


def test_an_exponential_average_of_the_buffers_too():
    run = Run()
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    by_hand = None
    for batch in range(6):
        run.step(batch)
        average.update_parameters(run.model)
        mean = run.model[1].running_mean.clone()
        by_hand = mean if by_hand is None else torch.lerp(by_hand, mean, 1 - 0.9)
    assert torch.equal(average.module[1].running_mean, by_hand)


def test_stochastic_weight_averaging_is_that_by_hand():
    run = Run()
    average, scheduler = AveragedModel(run.model), SWALR(run.optimizer, swa_lr=0.02, anneal_epochs=3)
    rates, taken = [], []
    for batch in range(6):
        rates.append(scheduler.get_last_lr()[0])
        w = run.step(batch)
        if batch >= 3:
            average.update_parameters(run.model)
            taken.append(w)
        scheduler.step()
    by_hand = taken[0]
    for n, w in enumerate(taken[1:], start=1):
        by_hand = {name: by_hand[name] + (w[name] - by_hand[name]) / (n + 1) for name in w}
    assert_same(weights(average.module), by_hand)
    assert_near(by_hand, {name: sum(w[name] for w in taken) / 3 for name in by_hand})
    assert rates[0] == 0.1
    assert rates[-1] == pytest.approx(0.02)

    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    update_bn(run.data, average)
    hidden = average.module[0](run.data.flatten(0, 1))
    torch.testing.assert_close(average.module[1].running_mean, hidden.mean(0), rtol=1e-12, atol=1e-14)
    assert_same(dict(run.model.named_buffers()), before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_average_is_a_model_of_its_own(when):
    # a deep copy, made while ASAM holds the model or before; neither moves the other
    alone, run = Run(), Run()
    asam = run.asam if when == "after" else None
    average = AveragedModel(run.model)
    run.asam = asam or ASAM(run.model, rho=0.5)
    start = weights(average.module)
    for batch in range(3):
        assert_same(run.step(batch), alone.step(batch))
    assert_same(weights(average.module), start)
    own = ASAM(average.module, rho=0.5)
    before = weights(run.model)
    own.backward(lambda: average(run.data[0]).square().mean())
    assert average.module[0].weight.grad.norm() > 0
    assert_same(weights(run.model), before)


def test_an_average_taken_between_the_passes_would_be_of_perturbed_weights():
    # why update_parameters belongs after the step
    run = Run()
    average = AveragedModel(run.model)
    w = weights(run.model)
    run.model(run.data[0]).square().mean().backward()
    with run.asam.perturbed():
        average.update_parameters(run.model)
        run.model(run.data[0]).square().mean().backward()
    assert not torch.allclose(average.module[0].weight, w["0.weight"])
    assert_same(weights(run.model), w)
