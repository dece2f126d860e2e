"""One training step of a small network: plain, with two bare passes, by each recipe and by another implementation.

The yardstick is two bare passes (forward and backward twice, one SGD step): what no method that takes two gradients
can be faster than. On small networks that is less than twice an SGD step. Extra memory is the step's peak of live
tensors minus that of the SGD step, in units of the parameters' bytes P.

A recipe that is exact in some steps only is timed over a cycle of them, and its memory is that of the exact step. That
of the economical recipe is one exact step in four.
"""

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import sam
import torch
from measure import clocked, median, peak_bytes, ratio, rounds_of
from torch import Tensor
from workloads import Workload

from asam import ASAM, SAM, Gradient, Momentum, norm_parameters

RHO = 0.05
SGD, PASSES, OURS = "SGD step", "two bare passes", "asam.ASAM"
COMPILED, NORMS = "asam.ASAM, compile=True", "normalization layers only"


def steps(workload: Workload) -> dict[str, tuple[Callable[[], object], int]]:
    """One step each, or a cycle of steps with their number. They share the model, and so their place in memory."""
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

    def ours(minimizer: ASAM, **options: Any) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            minimizer.backward(closure, **options)
            optimizer.step()

        return step

    def cycle(exact: Callable[[], None], others: Callable[[], None], length: int) -> tuple[Callable[[], None], int]:
        def steps() -> None:
            exact()
            for _ in range(length - 1):
                others()

        return steps, length

    def peer(foreach: bool | None) -> Callable[[], None]:
        peer = pytorch_optimizer.SAM(
            model.parameters(), torch.optim.SGD, rho=RHO, adaptive=True, foreach=foreach, **options
        )

        def step() -> None:
            forward_backward()
            peer.step(forward_backward)

        return step

    not_adaptive = sam.SAM(model.parameters(), torch.optim.SGD(model.parameters(), **options), RHO)
    asam = ours(ASAM(model, rho=RHO))
    against_own = ours(ASAM(model, rho=RHO, direction=Momentum()))
    part = workload.closure(len(workload.inputs) // 4)
    single = {
        SGD: sgd,
        PASSES: two_passes,
        f"{PASSES}, again": two_passes,
        OURS: asam,
        COMPILED: ours(ASAM(model, rho=RHO, compile=True)),
        "asam.SAM": ours(SAM(model, rho=RHO)),
        "Gradient(mean=-1.0), Friendly": ours(ASAM(model, rho=RHO, direction=Gradient(mean=-1.0))),
        "combine, WSAM": ours(ASAM(model, rho=RHO, combine=lambda g00, g01, g11: (-1.0, 2.0))),
        "ascent on a quarter of the batch": ours(ASAM(model, rho=RHO), ascent=part),
        "Momentum()": against_own,
        "Momentum(optimizer)": ours(ASAM(model, rho=RHO, direction=Momentum(optimizer))),
        "pytorch_optimizer.SAM": peer(None),
        "pytorch_optimizer.SAM, foreach": peer(True),
        "sam_pytorch.SAM": lambda: not_adaptive.step(forward_backward),
    }
    norms = norm_parameters(model)
    if norms:
        single[NORMS] = ours(ASAM(model, rho=RHO, params=norms))
    return {name: (step, 1) for name, step in single.items()} | {
        "every 2nd step": cycle(asam, sgd, 2),
        "every 5th step": cycle(asam, sgd, 5),
        "economical, a quarter exact": cycle(asam, against_own, 4),
    }


def measure_steps(workload: Workload, budget: float) -> dict[str, Any]:
    variants = steps(workload)
    size = sum(param.nbytes for param in workload.model.parameters())
    peaks = {}
    for name, (step, _) in variants.items():
        step()  # momentum buffers stay: they are no part of the step's peak
        workload.model.zero_grad()
        peaks[name] = peak_bytes(step)
    timed = {name: clocked(step, -(-workload.repeats // length), length) for name, (step, length) in variants.items()}
    samples = rounds_of(timed, budget)
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
