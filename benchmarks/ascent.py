"""The way to w + e and back alone, with no pass in between, given gradients of random numbers.

The floor is 5 P of traffic over flat tensors of all the parameters: ``torch.dot(w, g)`` reads 2 P, as the norm must,
and ``torch.add(w, g, out=...)`` reads 2 P and writes 1 P, as the perturbation must. In place and bit for bit, with a
saved copy, it takes 8 P. Extra memory is the peak beyond weights and gradients; the gradients may be let go, and are
cloned anew outside the clock. Before the rounds each variant is checked: the norm of its perturbation, computed in
float64, and the restored weights.
"""

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from measure import clocked, median, operations_of, peak_bytes, ratio, rounds_of, seconds_of
from torch import Tensor, nn
from workloads import Weights

from asam import ASAM, SAM, Geometry

Visit = Callable[[Callable[[], object]], None]

RHO = 0.05
FLOOR = "floor: dot and add, 5 P"
COMPILED = "asam.ASAM, compile=True"


class NoStep(torch.optim.Optimizer):
    """A base optimizer that leaves the weights alone."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    def step(self, closure: Any = None) -> None:
        pass


def floor_of(flat: Tensor) -> Callable[[], None]:
    """5 P of traffic over a flat tensor of all parameters and one like it."""
    grad, out = torch.randn_like(flat), torch.empty_like(flat)

    def floor() -> None:
        torch.dot(flat, grad)
        torch.add(flat, grad, out=out)

    return floor


def installing(model: nn.Module) -> Callable[[], None]:
    """What gives every parameter a fresh clone of its gradient of random numbers."""
    params = list(model.parameters())
    grads = [torch.randn_like(param) for param in params]

    def install() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()

    return install


def ours(minimizer: ASAM) -> Visit:
    def visit(there: Callable[[], object]) -> None:
        with minimizer.perturbed():
            there()

    return visit


def timed(visit: Visit, install: Callable[[], None]) -> Callable[[], float]:
    """The seconds of a visit with nothing to do there."""

    def variant() -> float:
        install()
        return seconds_of(lambda: visit(_nothing))

    return variant


def measure_ascent(lists: Weights, budget: float) -> dict[str, Any]:
    model = lists.model
    params = list(model.parameters())
    install = installing(model)
    flat = torch.cat([param.detach().flatten() for param in params])
    out, size = torch.empty_like(flat), flat.nbytes
    asam_, sam = ASAM(model, rho=RHO), SAM(model, rho=RHO)
    fast = ASAM(model, rho=RHO, compile=True)
    loop, foreach = (
        pytorch_optimizer.SAM(params, NoStep, rho=RHO, adaptive=True, foreach=flag) for flag in (None, True)
    )

    def peer(optimizer: pytorch_optimizer.SAM) -> Visit:
        def visit(there: Callable[[], object]) -> None:
            optimizer.first_step(zero_grad=True)
            there()
            optimizer.second_step()

        return visit

    # each with the geometry its perturbation must have: the peer has no stabilizer and scales biases too
    plain = Geometry(eta=0, bias="scaled")
    visits = {
        "asam.ASAM": (ours(asam_), asam_.geometry),
        COMPILED: (ours(fast), fast.geometry),
        "asam.SAM": (ours(sam), sam.geometry),
        "pytorch_optimizer.SAM": (peer(loop), plain),
        "pytorch_optimizer.SAM, foreach": (peer(foreach), plain),
    }

    floor = floor_of(flat)
    variants = {
        FLOOR: clocked(floor),
        f"{FLOOR}, again": clocked(floor),
        "copy, 2 P": clocked(lambda: out.copy_(flat)),
    }
    errors, operations, peaks = {}, {}, {}
    for name, (visit, geometry) in visits.items():
        install()
        errors[name] = _norm_error(name, visit, geometry, model)

        def all_of_it(visit: Visit = visit) -> None:
            install()
            visit(_nothing)

        peaks[name] = peak_bytes(all_of_it) / size - 1  # the gradients themselves
        if name != COMPILED:  # which dispatches none
            install()
            operations[name] = operations_of(lambda visit=visit: visit(_nothing))
        variants[name] = timed(visit, install)
    samples = rounds_of(variants, budget)
    rows = [
        {
            "variant": name,
            "milliseconds": 1e3 * median(times),
            "x floor": ratio(times, samples[FLOOR]),
            "operations": operations.get(name),
            "extra memory / P": peaks.get(name),
            "norm error": errors.get(name),
        }
        for name, times in samples.items()
    ]
    title = f"Ascent and restore: {lists.title}, {len(params)} tensors, {len(flat):,} elements"
    return {"title": title, "rounds": len(samples[FLOOR]), "rows": rows}


def _norm_error(name: str, visit: Visit, geometry: Geometry, model: nn.Module) -> float:
    """``| ||T^-1 e|| / rho - 1 |``, after a check that the weights came back."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    before = {name: param.clone() for name, param in params.items()}
    scales = geometry.scales(before)
    squares: list[Tensor] = []

    def look() -> None:
        for key, param in params.items():
            e, scale = (param - before[key]).double(), scales[key].double()
            squares.append(torch.where(e == 0, 0, e / scale).square().sum())

    visit(look)
    if not all(torch.equal(params[key], before[key]) for key in params):
        raise RuntimeError(f"{name} did not restore the weights")
    error = abs(float(torch.stack(squares).sum().sqrt()) / RHO - 1)
    if name.startswith("asam") and error > 1e-4:
        raise RuntimeError(f"the perturbation of {name} has a norm that is off by {error:.1e}")
    return error


def _nothing() -> None:
    pass
