"""Learning-rate schedulers take our optimizer and its base alike."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from asam import ASAM, SharpnessAwareOptimizer

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=20),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
}


def rates(schedule, on, steps=6):
    """The learning and momentum rates of every step; a warning is an error."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(ASAM(model), base)
    scheduler = SCHEDULERS[schedule](optimizer if on == "ours" else base)
    inputs = torch.randn(4, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    seen = []
    for _ in range(steps):
        if on == "plain":
            closure()
            base.step()
        else:
            optimizer.step(closure)
        seen.append((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]))
        scheduler.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
    assert optimizer.param_groups is base.param_groups
    return seen


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR of torch 2.6 passes it
@pytest.mark.parametrize("on", ["ours", "base"])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedule_is_that_of_a_plain_optimizer(schedule, on):
    seen = rates(schedule, on)
    assert seen == rates(schedule, "plain")
    assert len({rate for rate, _ in seen}) > 2
