"""Ignite: an update function with one line changed; trainer, handlers and checkpoints stay."""

import pytest
import torch
from slow_reference import assert_near, assert_same, maximizer, weights
from torch import nn

from asam import ASAM

pytest.importorskip("ignite")
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler, LRScheduler

RHO = 0.3


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def asam_training_step(asam, model, optimizer, loss_fn, gradient_accumulation_steps=1):
    """The update function of docs/frameworks/ignite.md."""

    def update(engine, batch):
        if (engine.state.iteration - 1) % gradient_accumulation_steps == 0:
            optimizer.zero_grad()
        model.train()
        x, y = batch
        loss = asam.backward(lambda: loss_fn(model(x), y) / gradient_accumulation_steps)
        if engine.state.iteration % gradient_accumulation_steps == 0:
            optimizer.step()
        return loss.item() * gradient_accumulation_steps

    return update


class Training:
    def __init__(self, rho=RHO, accumulate=1):
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
        self.asam = ASAM(self.model, rho=rho)
        step = asam_training_step(self.asam, self.model, self.optimizer, nn.functional.cross_entropy, accumulate)
        self.trainer = Engine(step)
        self.losses = []
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.losses.append(e.state.output))


def by_hand(count, accumulate=1, gammas=None):
    """Weights and losses at w after ``count`` batches, from the formulas."""
    model = network()
    velocity = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    losses = []

    def gradient(x, y):
        value = nn.functional.cross_entropy(model(x), y)
        return value.item(), dict(zip(total, torch.autograd.grad(value, list(model.parameters())), strict=True))

    for i, (x, y) in enumerate(batches(count)):
        w = weights(model)
        value, g = gradient(x, y)
        losses.append(value)
        e = maximizer(w, g, RHO)
        model.load_state_dict({name: w[name] + e[name] for name in w})
        g = gradient(x, y)[1]
        model.load_state_dict(w)
        total = {name: total[name] + g[name] / accumulate for name in w}
        if (i + 1) % accumulate == 0:
            velocity = {name: 0.9 * velocity[name] + total[name] for name in w}
            total = {name: torch.zeros_like(grad) for name, grad in total.items()}
            lr = 0.2 * (gammas[i] if gammas else 1)
            model.load_state_dict({name: w[name] - lr * velocity[name] for name in w})
    return weights(model), losses


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_loop_written_by_hand(accumulate):
    training = Training(accumulate=accumulate)
    training.trainer.run(batches(6))
    expected, losses = by_hand(6, accumulate)
    assert_near(weights(training.model), expected)
    assert training.losses == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rho_zero_is_create_supervised_trainer(accumulate):
    ours, model = Training(rho=0, accumulate=accumulate), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    plain = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=accumulate
    )
    losses = []
    plain.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    for trainer in (ours.trainer, plain):
        trainer.run(batches(6), max_epochs=2)
    assert_same(weights(ours.model), weights(model))
    assert ours.losses == losses


def test_a_scheduler_handler():
    training = Training()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.5)
    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, LRScheduler(scheduler))
    group, rates = training.optimizer.param_groups[0], []
    whole = group["lr"]
    training.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: rates.append(group["lr"] / whole))
    training.trainer.run(batches(4))
    assert rates[-1] < rates[0] == 1  # Ignite is a step behind with an older torch
    assert_near(weights(training.model), by_hand(4, gammas=rates)[0])


def test_a_checkpoint_goes_on_to_the_same_weights(tmp_path):
    def schedule(training):
        training.trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: setattr(training.asam, "rho", training.asam.rho * 0.5)
        )

    def to_save(training):
        return {
            "model": training.model,
            "optimizer": training.optimizer,
            "asam": training.asam,
            "trainer": training.trainer,
        }

    whole = Training()
    schedule(whole)
    handler = Checkpoint(to_save(whole), DiskSaver(str(tmp_path)), n_saved=None)
    whole.trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    whole.trainer.run(batches(4), max_epochs=3)
    resumed = Training()
    schedule(resumed)
    path = tmp_path / "checkpoint_8.pt"
    Checkpoint.load_objects(to_load=to_save(resumed), checkpoint=torch.load(path, weights_only=True))
    assert resumed.asam.rho == RHO / 4
    assert resumed.trainer.state.epoch == 2
    resumed.trainer.run(batches(4), max_epochs=3)
    assert_same(weights(resumed.model), weights(whole.model))


def test_an_average_of_the_weights_never_sees_them_perturbed():
    training = Training()
    average = EMAHandler(training.model, momentum=0.25)
    average.attach(training.trainer)
    steps = [weights(training.model)]
    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: steps.append(weights(training.model)))
    training.trainer.run(batches(4))
    expected = steps[0]
    for step in steps[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * step[name] for name in step}
    assert_near(weights(average.ema_model), expected)
