"""Small networks trained as one: the tensors of several runs stacked, and every operation taken on all of them.

A step of a small network costs what its operations cost to start, not what they compute. Ten networks with a dimension
more take about as many operations as one. Each goes the way it would go alone, up to rounding.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from .. import Geometry
from .run import Run
from .tasks import find
from .training import factor, initial_network

OWN = ("seed", "rho", "noise", "scale")  # what may differ: it is data, not operations
PLAIN = ("optimizer", "clip", "p", "every", "ascent_share", "perturb", "dropout", "device", "precision")


def alike(run: Run) -> Hashable | None:
    """The same for runs that can be trained as one; None for a run that is trained alone.

    These are multilayer perceptrons without dropout, trained by SGD with or without an ascent in the 2-norm at every
    step.
    """
    usual = Run()
    if run.model != "mlp" or run.method == "economical" or any(getattr(run, x) != getattr(usual, x) for x in PLAIN):
        return None
    return tuple((name, value) for name, value in asdict(run).items() if name not in OWN)


def train_together(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The outcomes of runs that are alike, on one thread; the time of a step is each one's share."""
    torch.set_num_threads(1)
    run, tasks = runs[0], [find(run) for run in runs]
    networks = [initial_network(run, task) for run, task in zip(runs, tasks, strict=True)]
    weights = {name: stacked.detach().requires_grad_() for name, stacked in stack_module_state(networks)[0].items()}
    optimizer = torch.optim.SGD(weights.values(), run.lr, run.momentum, weight_decay=run.weight_decay)
    steps = run.epochs * tasks[0].steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, run, steps))
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    rhos = torch.tensor([run.rho for run in runs])
    geometry = Geometry("none" if run.method == "sam" else run.normalization, eta=run.eta, bias=run.bias)

    def loss(weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
        network: Any = partial(functional_call, networks[0], weights)
        return tasks[0].loss(network, batch)

    def gradient(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # no loss depends on another's weights: the gradient of the sum is that of each
        return torch.autograd.grad(vmap(loss)(weights, *batch).sum(), list(weights.values()))

    seconds = 0.0
    curves: list[dict[str, list[float]]] = [{} for _ in runs]
    for epoch in range(1, run.epochs + 1):
        epochs = (task.batches(generator, 0, 1) for task, generator in zip(tasks, generators, strict=True))
        for batches in zip(*epochs, strict=True):
            start = time.process_time()
            batch = [torch.stack(parts) for parts in zip(*batches, strict=True)]
            grads = gradient(batch)
            if run.method != "sgd":
                grads = _at(weights, maximizers(geometry, weights, grads, rhos), partial(gradient, batch))
            for weight, grad in zip(weights.values(), grads, strict=True):
                weight.grad = grad
            optimizer.step()
            scheduler.step()
            seconds += time.process_time() - start
        if epoch % run.evaluate_every == 0 or epoch == run.epochs:
            for i, (task, network) in enumerate(zip(tasks, networks, strict=True)):
                network.load_state_dict({name: stacked[i] for name, stacked in weights.items()})
                for name, value in task.evaluate(network).items():
                    curves[i].setdefault(name, []).append(value)
    share = {"seconds_per_step": seconds / steps / len(runs)}
    return [
        {name: values[-1] for name, values in curve.items()} | task.final(network) | share | {"curves": curve}
        for task, network, curve in zip(tasks, networks, curves, strict=True)
    ]


def maximizers(geometry: Geometry, weights: dict[str, Tensor], grads: Sequence[Tensor], rhos: Tensor) -> list[Tensor]:
    """The perturbation of each of the networks, ``e = rho T^2 g / ||T g||`` with the norm over its own part."""
    with torch.no_grad():
        scales = vmap(geometry.scales)({name: weight.detach() for name, weight in weights.items()})
        scaled = [scale * grad for scale, grad in zip(scales.values(), grads, strict=True)]
        norms = torch.stack([part.flatten(1).norm(dim=1) for part in scaled]).norm(dim=0)
        lengths = rhos / norms.clamp(min=torch.finfo(norms.dtype).tiny)  # no slope, no perturbation
        return [
            scale * part * lengths.view(-1, *[1] * (part.ndim - 1))
            for scale, part in zip(scales.values(), scaled, strict=True)
        ]


def _at(
    weights: dict[str, Tensor], perturbations: Sequence[Tensor], gradient: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The gradient at the weights plus the perturbations."""
    moved = [weight.data for weight in weights.values()]
    kept = [weight.clone() for weight in moved]
    torch._foreach_add_(moved, list(perturbations))
    found = gradient()
    torch._foreach_copy_(moved, kept)
    return found
