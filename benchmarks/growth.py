"""How the way to w + e and back grows with parameters and with tensors, and what the batch makes of it.

Equal tensors with gradients of random numbers, as in ascent.py; then steps of the MLP of 670k parameters and of
ResNet-20, as in steps.py: two bare passes grow with the batch, what ASAM adds to them does not.
"""

from typing import Any

import torch
from ascent import RHO, floor_of, installing, ours, timed
from measure import clocked, median, ratio, rounds_of
from steps import COMPILED, NORMS, OURS, PASSES, steps
from torch import nn
from workloads import Workload, mlp, resnet20

from asam import ASAM


def measure_growth(budget: float) -> list[dict[str, Any]]:
    """Four tables, in ``budget`` seconds each, but for three rounds at least."""
    sizes = [(8, 10**power) for power in (4, 5, 6, 7)]
    counts = [(10**power, 10**6) for power in (1, 2, 3, 4)]
    return [
        {"title": "Ascent and restore: 8 tensors, more and more elements", **_ascents(sizes, budget)},
        {"title": "Ascent and restore: a million elements, in more and more tensors", **_ascents(counts, budget)},
        {
            "title": "Step: MLP of 670k parameters, larger and larger batches",
            **_steps(mlp(784, 512, 512), (784,), (8, 32, 128, 512), (OURS, COMPILED), budget),
        },
        {
            "title": "Step: ResNet-20, larger and larger batches",
            **_steps(resnet20(), (3, 32, 32), (16, 64, 128), (OURS, COMPILED, NORMS), budget),
        },
    ]


def _ascents(lists: list[tuple[int, int]], budget: float) -> dict[str, Any]:
    rows, rounds = [], 0
    for count, size in lists:
        model = nn.ParameterList(torch.randn(size // count) for _ in range(count))
        install = installing(model)
        variants = {
            "floor": clocked(floor_of(torch.randn(size))),
            "eager": timed(ours(ASAM(model, rho=RHO)), install),
            "compiled": timed(ours(ASAM(model, rho=RHO, compile=True)), install),
        }
        samples = rounds_of(variants, budget / len(lists))
        rounds = len(samples["floor"])
        rows.append(
            {"variant": f"{size:,} elements in {count:,} tensors"}
            | {f"{name}, ms": 1e3 * median(times) for name, times in samples.items()}
        )
    return {"rounds": rounds, "rows": rows}


def _steps(
    model: nn.Module, shape: tuple[int, ...], batches: tuple[int, ...], names: tuple[str, ...], budget: float
) -> dict[str, Any]:
    rows, rounds = [], 0
    for batch in batches:
        variants = steps(Workload("", model, torch.randn(batch, *shape), 1))
        samples = rounds_of({name: clocked(variants[name][0]) for name in (PASSES, *names)}, budget / len(batches))
        rounds = len(samples[PASSES])
        rows.append(
            {"variant": f"batch of {batch}"}
            | {f"{name}, ms": 1e3 * median(samples[name]) for name in (PASSES, OURS)}
            | {f"{name} x {PASSES}": ratio(samples[name], samples[PASSES]) for name in names}
        )
    return {"rounds": rounds, "rows": rows}
