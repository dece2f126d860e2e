"""A measurement of worst-case sharpness with 20 steps, beside the bare passes that it cannot do without.

These are 20 gradients of the mean loss over the data, batch after batch into .grad, and one forward pass. The network
is trained a little, and rho is small: where the loss is quadratic along the path, a step takes more arithmetic.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from measure import clocked, median, ratio, rounds_of
from torch import Tensor, nn
from workloads import CLASSES, Workload

from asam.measure import Geometry, Objective, worst_case_sharpness

STEPS = 20
TRAINING = 10  # steps
PASSES = "bare passes"
RHO = 0.1


def train(model: nn.Module, closure: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(TRAINING):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    optimizer.zero_grad()


def measure_sharpness(workload: Workload, batches: int, budget: float) -> dict[str, Any]:
    model = workload.model
    train(model, workload.closure())
    targets = torch.arange(len(workload.inputs)) % CLASSES
    data = [(workload.inputs, targets)] * batches

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def passes() -> None:
        model.eval()
        for _ in range(STEPS):
            model.zero_grad()
            for batch in data:
                (loss_fn(model, batch) / batches).backward()
        with torch.no_grad():
            for batch in data:
                loss_fn(model, batch)
        model.zero_grad()
        model.train()

    objective = Objective(model, loss_fn, data)

    def ours(geometry: Geometry) -> Callable[[], object]:
        return lambda: worst_case_sharpness(objective, RHO / (1 if geometry.p == 2 else 100), geometry=geometry)

    variants = {
        PASSES: passes,
        f"{PASSES}, again": passes,
        "sharpness, p = 2": ours(Geometry("none")),
        "adaptive, p = 2": ours(Geometry(eta=0)),
        "adaptive, p = inf": ours(Geometry(eta=0, p=math.inf)),
    }
    samples = rounds_of({name: clocked(variant) for name, variant in variants.items()}, budget, at_least=2)
    rows = [
        {"variant": name, "milliseconds": 1e3 * median(times), f"x {PASSES}": ratio(times, samples[PASSES])}
        for name, times in samples.items()
    ]
    title = f"Sharpness, {STEPS} steps, {objective.examples} examples: {workload.title}"
    return {"title": title, "rounds": len(samples[PASSES]), "rows": rows}
