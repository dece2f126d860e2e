"""How the way to w + e and back grows with parameters and with tensors, and what the batch makes of it.

Equal tensors with gradients of random numbers, as in ascent.py; then steps of the MLP of 670k parameters, as in
steps.py: two bare passes grow with the batch, what ASAM adds to them does not.
"""

from collections.abc import Callable
from typing import Any

import torch
from measure import clocked, median, ratio, rounds_of, seconds_of
from torch import nn
from workloads import Workload, mlp

from asam import ASAM

RHO = 0.05


def measure_growth(budget: float) -> list[dict[str, Any]]:
    """Three tables, in ``budget`` seconds each."""
    sizes = [(8, 10**power) for power in (4, 5, 6, 7)]
    counts = [(10**power, 10**6) for power in (1, 2, 3, 4)]
    return [
        {"title": "Ascent and restore: 8 tensors, more and more elements", **_ascents(sizes, budget)},
        {"title": "Ascent and restore: a million elements, in more and more tensors", **_ascents(counts, budget)},
        {"title": "Step: MLP of 670k parameters, larger and larger batches", **_steps((8, 32, 128, 512), budget)},
    ]


def _ascents(lists: list[tuple[int, int]], budget: float) -> dict[str, Any]:
    rows, rounds = [], 0
    for count, size in lists:
        model = nn.ParameterList(torch.randn(size // count) for _ in range(count))
        w, g = torch.randn(size), torch.randn(size)

        def floor(w: torch.Tensor = w, g: torch.Tensor = g) -> None:
            torch.dot(w, g)
            torch.add(w, g)

        variants = {
            "floor": clocked(floor),
            "eager": _visit(ASAM(model, rho=RHO), model),
            "compiled": _visit(ASAM(model, rho=RHO, compile=True), model),
        }
        samples = rounds_of(variants, budget / len(lists))
        rounds = len(samples["floor"])
        rows.append(
            {"variant": f"{size:,} elements in {count:,} tensors"}
            | {f"{name}, ms": 1e3 * median(times) for name, times in samples.items()}
        )
    return {"rounds": rounds, "rows": rows}


def _visit(asam: ASAM, model: nn.Module) -> Callable[[], float]:
    grads = [torch.randn_like(param) for param in model.parameters()]

    def through() -> None:
        with asam.perturbed():
            pass

    def visit() -> float:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad.clone()
        return seconds_of(through)

    return visit


def _steps(batches: tuple[int, ...], budget: float) -> dict[str, Any]:
    rows, rounds = [], 0
    for batch in batches:
        workload = Workload("", mlp(784, 512, 512), torch.randn(batch, 784), 1)
        model, closure = workload.model, workload.closure()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        asam = ASAM(model, rho=RHO)

        def two_passes(
            optimizer: torch.optim.Optimizer = optimizer, closure: Callable[[], torch.Tensor] = closure
        ) -> None:
            for _ in range(2):
                optimizer.zero_grad()
                closure().backward()
            optimizer.step()

        def step(
            optimizer: torch.optim.Optimizer = optimizer,
            closure: Callable[[], torch.Tensor] = closure,
            asam: ASAM = asam,
        ) -> None:
            optimizer.zero_grad()
            asam.backward(closure)
            optimizer.step()

        samples = rounds_of({"passes": clocked(two_passes), "asam": clocked(step)}, budget / len(batches))
        rounds = len(samples["asam"])
        rows.append(
            {
                "variant": f"batch of {batch}",
                "two bare passes, ms": 1e3 * median(samples["passes"]),
                "asam.ASAM, ms": 1e3 * median(samples["asam"]),
                "x two bare passes": ratio(samples["asam"], samples["passes"]),
            }
        )
    return {"rounds": rounds, "rows": rows}
