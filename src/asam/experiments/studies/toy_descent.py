"""Descent with SAM and ASAM on a loss of two weights, from many starts at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...measure import Geometry
from ..study import Outcome

TARGET = 0.04
STARTS = ((0.2, 0.05), (0.3, 0.033))  # the paper's
LOW = TARGET / 10  # the steps of SGD alone keep the loss at up to a third of it
BALANCED = 1.5  # how far w1 / w2 may be from 1 at the flat end


@dataclass(frozen=True)
class Settings:
    """The grid of starts, ``side`` by ``side`` between 0 and ``widest``, and of rho, the same for both methods."""

    steps: int = 4000
    lr: float = 0.02
    eta: float = 0.01
    side: int = 12
    widest: float = 0.4
    rhos: tuple[float, ...] = (
        *(0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
        *(0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0),
    )
    shown: tuple[float, float] = (0.05, 0.5)  # rho of SAM and ASAM whose paths are drawn


@dataclass(frozen=True)
class Descent:
    """One method with one rho from all starts; of the paper's two, so many steps are kept."""

    method: str
    rho: float
    steps: int
    lr: float
    eta: float
    side: int
    widest: float
    keep: int


def loss(w: Tensor) -> Tensor:
    """The loss ``|w1 relu(w2) - 0.04|`` of every row of weights."""
    return (w[:, 0] * torch.relu(w[:, 1]) - TARGET).abs()


def gradient(w: Tensor) -> Tensor:
    """Its gradient, row by row; as in torch, that of ``|x|`` and of relu is 0 at 0."""
    output = torch.relu(w[:, 1])
    sign = (w[:, 0] * output - TARGET).sign()
    return torch.stack([sign * output, sign * w[:, 0] * (w[:, 1] > 0)], dim=1)


def gradient_at_worst(w: Tensor, geometry: Geometry, rho: float) -> Tensor:
    """The gradient at w + e, with e = rho T^2 g / ||T g||_2 for every row on its own."""
    scales = geometry.scales({"weight": w})["weight"]
    tg = scales * gradient(w)
    norm = torch.linalg.vector_norm(tg, dim=1, keepdim=True)
    return gradient(w + torch.where(norm > 0, rho * scales * tg / norm, 0))


def starts(side: int, widest: float) -> Tensor:
    """The paper's two starts, and then the middles of a grid of cells, (2 + side^2, 2)."""
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) * widest / side
    return torch.cat([torch.tensor(STARTS, dtype=torch.float64), torch.cartesian_prod(axis, axis)])


def at_flat_end(w: Tensor) -> Tensor:
    """Which rows are near the minimum with equal weights."""
    return (loss(w) < LOW) & ((w[:, 0] / w[:, 1]).log().abs() < math.log(BALANCED))


def plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Descent]:
    """SGD, and both methods with every rho."""
    same = (settings.steps, settings.lr, settings.eta, settings.side, settings.widest)
    runs = {name("SGD", 0.0): Descent("SGD", 0.0, *same, keep=0)}
    for method, shown in zip(("SAM", "ASAM"), settings.shown, strict=True):
        for rho in settings.rhos:
            runs[name(method, rho)] = Descent(method, rho, *same, keep=settings.steps // 2 if rho == shown else 0)
    return runs


def perform(run: Descent) -> Outcome:
    """Descend from all starts at once: ends, the step of arrival at the flat end (0: never), the first two paths."""
    geometry = Geometry(eta=run.eta) if run.method == "ASAM" else Geometry("none")
    w = starts(run.side, run.widest)
    arrived = torch.zeros(len(w), dtype=torch.long)
    paths: list[list[list[float]]] = [[], []]
    for step in range(run.steps):
        if step < run.keep:
            for path, here in zip(paths, w.tolist(), strict=False):
                path.append([round(value, 5) for value in here])
        w = w - run.lr * gradient_at_worst(w, geometry, run.rho)
        arrived[(arrived == 0) & at_flat_end(w)] = step + 1
    return {
        "end": w.tolist(),
        "arrived": arrived.tolist(),
        "low": (loss(w) < LOW).tolist(),
        "flat": at_flat_end(w).tolist(),
        "stuck": (gradient_at_worst(w, geometry, run.rho) == 0).all(dim=1).tolist(),
        "paths": paths,
    }


def name(method: str, rho: float) -> str:
    """That of a run."""
    return f"{method}, rho = {rho:g}" if rho else method
