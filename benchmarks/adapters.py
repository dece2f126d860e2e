"""One training step of the transformer when all that is trained of it are low-rank adapters (LoRA).

Neither pass computes the gradients of the frozen weights then, so that two of them are less than two passes of the
network as a whole, which is the yardstick here.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from measure import clocked, median, ratio, rounds_of
from peft import LoraConfig, get_peft_model
from steps import COMPILED, OURS, PASSES, RHO, SGD
from torch import nn
from workloads import Workload

from asam import ASAM

WHOLE = "SGD step of all weights"
RANK = 8


def measure_adapters(workload: Workload, budget: float) -> dict[str, Any]:
    config = LoraConfig(r=RANK, target_modules=["linear1", "linear2"])
    adapted: nn.Module = get_peft_model(deepcopy(workload.model), config)
    whole, closure = workload.closure(), Workload("", adapted, workload.inputs, 1).closure()

    def step(model: nn.Module, *passes: Callable[[], object]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            for one in passes:
                optimizer.zero_grad()
                one()
            optimizer.step()

        return step

    def bare() -> None:
        closure().backward()

    def ours(**options: Any) -> Callable[[], None]:
        asam = ASAM(adapted, rho=RHO, **options)
        return step(adapted, lambda: asam.backward(closure))

    variants = {
        WHOLE: step(workload.model, lambda: whole().backward()),
        SGD: step(adapted, bare),
        PASSES: step(adapted, bare, bare),
        f"{PASSES}, again": step(adapted, bare, bare),
        OURS: ours(),
        COMPILED: ours(compile=True),
    }
    samples = rounds_of({name: clocked(variant) for name, variant in variants.items()}, budget)
    rows = [
        {
            "variant": name,
            "milliseconds": 1e3 * median(times),
            f"x {PASSES}": ratio(times, samples[PASSES]),
            f"x {WHOLE}": ratio(times, samples[WHOLE]),
        }
        for name, times in samples.items()
    ]
    return {"title": f"Step of adapters of rank {RANK}: {workload.title}", "rounds": len(samples[SGD]), "rows": rows}
