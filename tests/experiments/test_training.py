"""The trainer behind every run: a plain loop, its schedules and base optimizers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from asam import ASAM
from asam.experiments import InputError, tasks
from asam.experiments.data import load
from asam.experiments.models import build
from asam.experiments.run import Run
from asam.experiments.training import Training, factor


@pytest.mark.parametrize("method", ["sgd", "asam"])
def test_the_training_is_a_plain_loop(method):
    run = Run(method, seed=3, rho=0.5, lr=0.1, noise=0.3, epochs=3, batch_size=128, label_smoothing=0.1, clip=2.0)
    training = Training(run)
    training.advance()

    data = load("digits", None, 0.3, 3)
    torch.manual_seed(3)
    model = build("mlp", (1, 8, 8), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    total = 3 * 4
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    asam = ASAM(model, rho=0.5)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for index in torch.randperm(500, generator=generator).split(128):
            inputs, labels = data.train.inputs[index], data.train.labels[index]
            if method == "asam":
                asam.backward(lambda inputs=inputs, labels=labels: criterion(model(inputs), labels))
            else:
                criterion(model(inputs), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(training.weights()[name], weight), name
    found = training.outcome()
    for part in ("train", "validation", "test"):
        split = getattr(data, part)
        wrong = (model(split.inputs).argmax(1) != split.labels).double().mean()
        assert found[f"{part}_error"] == pytest.approx(100 * float(wrong), abs=1e-9)
    model.requires_grad_(False)
    logits, noisy = model(data.train.inputs), model(data.noisy_test.inputs)
    gap = cross_entropy(noisy, data.noisy_test.labels) - cross_entropy(logits, data.train.labels)
    assert found["loss_gap"] == pytest.approx(float(gap), abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("cosine", 0, [math.cos(math.pi * k / 16) ** 2 for k in range(8)]),
        ("cosine", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, (2 + math.sqrt(2)) / 4, 1 / 2, (2 - math.sqrt(2)) / 4]),
        ("inverse-sqrt", 0, [1 / math.sqrt(k) for k in range(1, 9)]),
        ("inverse-sqrt", 4, [1 / 4, 2 / 4, 3 / 4, 1, math.sqrt(4 / 5), math.sqrt(4 / 6), math.sqrt(4 / 7), 1 / 2**0.5]),
    ],
)
def test_schedules(schedule, warmup, expected):
    run = Run("sgd", schedule=schedule, warmup=warmup)
    assert [factor(run, 8, step) for step in range(8)] == pytest.approx(expected, abs=1e-15)


def test_the_learning_rate_follows_the_schedule():
    run = Run("sgd", lr=0.2, epochs=2, batch_size=128, warmup=3)
    training, seen = Training(run), []
    training.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    training.advance()
    assert seen == [0.2 * factor(run, 8, step) for step in range(8)]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_other_base_optimizers(optimizer):
    training = Training(Run("sgd", optimizer=optimizer, lr=0.01, beta2=0.98, weight_decay=0.1))
    assert type(training.optimizer).__name__.lower() == optimizer
    group = training.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.9, 0.98), 0.1)


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("stop", range(13))
def test_stopped_after_any_step_it_goes_on_in_the_same_numbers(stop):
    run = Run("economical", rho=0.5, dropout=0.2, epochs=3, batch_size=128)  # 4 steps an epoch
    whole = Training(run)
    whole.advance()

    def step_done():
        if first.step == stop:
            raise Stopped

    first = Training(run)
    if stop:
        with pytest.raises(Stopped):
            first.advance(step_done=step_done)
    state = copy.deepcopy(first.state())
    second = Training(run)
    second.load_state(state)
    second.advance()
    for name, value in whole.weights().items():
        assert torch.equal(value, second.weights()[name]), name
    assert second.curves == whole.curves


def test_data_that_is_not_there_is_refused_by_the_task():
    with pytest.raises(InputError, match="nowhere"):
        tasks.find(Run("sgd", dataset="cifar10", data_dir="nowhere"))


def test_a_method_that_does_not_fit_the_network():
    with pytest.raises(InputError, match="nothing to perturb: the model has no such parameters"):
        Training(Run("asam", rho=0.5, perturb="norm"))


def test_a_batch_of_one_image_and_batch_norm(monkeypatch):
    training = Training(Run("asam", rho=0.5, train_size=3, batch_size=2))
    norm = nn.BatchNorm1d(10)
    monkeypatch.setattr(training.task, "loss", lambda network, batch: norm(network(batch[0])).square().mean())
    with pytest.raises(InputError, match=r"^a batch of one image has no batch statistics: choose another --batch-size"):
        training.advance()
