"""One training step of a small network: plain, with two bare passes, by this library and by another implementation.

The yardstick is two bare passes (forward and backward twice, one SGD step): what no method that takes two gradients
can be faster than. On small networks that is less than twice an SGD step. Extra memory is the step's peak of live
tensors minus that of the SGD step, in units of the parameters' bytes P.
"""

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from measure import clocked, median, peak_bytes, ratio, rounds_of
from torch import Tensor
from workloads import Workload

from asam import ASAM, SAM, Momentum

RHO = 0.05
SGD, PASSES = "SGD step", "two bare passes"


def steps(workload: Workload) -> dict[str, Callable[[], object]]:
    """One step each. They share the model, so that none has the better place in memory."""
    model, closure = workload.model, workload.closure()
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
    optimizer = torch.optim.SGD(model.parameters(), **options)

    def forward_backward() -> Tensor:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    def sgd() -> None:
        forward_backward()
        optimizer.step()

    def two_passes() -> None:
        forward_backward()
        forward_backward()
        optimizer.step()

    def ours(minimizer: ASAM) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            minimizer.backward(closure)
            optimizer.step()

        return step

    def peer(foreach: bool | None) -> Callable[[], None]:
        peer = pytorch_optimizer.SAM(
            model.parameters(), torch.optim.SGD, rho=RHO, adaptive=True, foreach=foreach, **options
        )

        def step() -> None:
            forward_backward()
            peer.step(forward_backward)

        return step

    return {
        SGD: sgd,
        PASSES: two_passes,
        f"{PASSES}, again": two_passes,
        "asam.ASAM": ours(ASAM(model, rho=RHO)),
        "asam.SAM": ours(SAM(model, rho=RHO)),
        "asam.ASAM, Momentum()": ours(ASAM(model, rho=RHO, direction=Momentum())),
        "asam.ASAM, Momentum(optimizer)": ours(ASAM(model, rho=RHO, direction=Momentum(optimizer))),
        "pytorch_optimizer.SAM": peer(None),
        "pytorch_optimizer.SAM, foreach": peer(True),
    }


def measure_steps(workload: Workload, budget: float) -> dict[str, Any]:
    variants = steps(workload)
    size = sum(param.nbytes for param in workload.model.parameters())
    peaks = {}
    for name, step in variants.items():
        step()  # momentum buffers stay: they are no part of the step's peak
        workload.model.zero_grad()
        peaks[name] = peak_bytes(step)
    samples = rounds_of({name: clocked(step, workload.repeats) for name, step in variants.items()}, budget)
    if not workload.closure()().isfinite():
        raise RuntimeError(f"the loss of {workload.title} is no longer finite")
    rows = [
        {
            "variant": name,
            "milliseconds": 1e3 * median(times),
            f"x {PASSES}": ratio(times, samples[PASSES]),
            f"x {SGD}": ratio(times, samples[SGD]),
            "extra memory / P": (peaks[name] - peaks[SGD]) / size,
        }
        for name, times in samples.items()
    ]
    return {"title": f"Step: {workload.title}", "rounds": len(samples[SGD]), "rows": rows}
