"""Draws the pictures of the documentation into docs/pictures/: `python docs/pictures.py`, half a minute.

Everything in them is computed here, by the library itself. The same versions draw the same files.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from torch import nn

from asam import ASAM, SAM
from asam.experiments import plots
from asam.experiments.data import load
from asam.measure import Geometry, Objective, worst_case_sharpness

FOLDER = Path(__file__).parent / "pictures"
BLUE, ORANGE, GRAY, INK = plots.COLORS["ASAM"], plots.COLORS["SAM"], plots.COLORS["SGD"], "#0f172a"
GREEN = plots.PALETTE[0]
SHADES = [str(shade) for shade in np.linspace(0.98, 0.6, 13)]  # of gray
TARGET = 0.5
W, SCALE = (0.9, 0.75), 0.45  # weights, and the factor that makes the same network of them


class TwoWeights(nn.Module):
    """The network w1 relu(w2 x)."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def loss(self) -> torch.Tensor:
        """Half the squared distance to the target at x = 1."""
        return (self.weight[0] * torch.relu(self.weight[1]) - TARGET).square() / 2


def loss(w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    """The loss of `TwoWeights` over a grid."""
    return (w1 * np.maximum(w2, 0) - TARGET) ** 2 / 2


def ground(axes: Axes, side: np.ndarray) -> None:
    """Contours of the loss, light where it is low, its valley dotted."""
    grid = loss(*np.meshgrid(side, side))
    axes.contourf(side, side, grid, np.linspace(0, 3.4, 13) ** 2 / 2, colors=SHADES, extend="max")
    valley = side[side > 0.05]
    axes.plot(valley, TARGET / valley, color=INK, linestyle=":", linewidth=1.2)
    axes.set(xlim=(side[0], side[-1]), ylim=(side[0], side[-1]), aspect="equal", xlabel="w1", ylabel="w2")
    axes.grid(visible=False)


def balls(matrix: torch.Tensor, geometry: Geometry, rho: float) -> list[np.ndarray]:
    """Points around ``||T_w^-1 e||_p <= rho`` in the plane of every row of a matrix of two columns, each (256, 2)."""
    angle = np.linspace(0, 2 * math.pi, 256, endpoint=False)
    u = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    u /= np.linalg.norm(u, geometry.p, axis=1, keepdims=True)
    scales = geometry.scales({"weight": matrix})["weight"].numpy()
    return [row + rho * scale * u for row, scale in zip(matrix.numpy(), scales, strict=True)]


def ball(weights: Sequence[float], geometry: Geometry, rho: float) -> np.ndarray:
    """The same around one point."""
    return balls(torch.tensor([weights], dtype=torch.float64), geometry, rho)[0]


def idea(*axes: Axes) -> None:
    """The same network twice: what SAM's neighborhood holds changes, what ASAM's holds does not."""
    same = (W[0] * SCALE, W[1] / SCALE)
    panels = (
        ("SAM: a ball of fixed size", Geometry("none"), 0.2),
        ("ASAM: in units of the weights", Geometry(eta=0), 0.25),
    )
    for panel, (title, geometry, rho) in zip(axes, panels, strict=True):
        ground(panel, np.linspace(0, 2.2, 89))
        for name, weights, color in (("w", W, BLUE), ("the same network", same, GREEN)):
            objective = Objective(TwoWeights(weights), lambda network, _: network.loss(), [torch.ones(1)])
            sharpness = worst_case_sharpness(objective, rho, geometry=geometry, restarts=6)
            around = ball(weights, geometry, rho)
            panel.add_patch(Polygon(around, facecolor=(color, 0.3), edgecolor=color, linewidth=1.5))
            panel.plot(*weights, "o", color=color, markersize=4)
            worst = np.asarray(weights) + sharpness.perturbation["weight"].numpy()
            panel.plot(*worst, "*", color=color, markersize=13, markeredgecolor="white")
            text = f"{name}\nsharpness {sharpness.value:.3f}"
            corner = around.max(axis=0)
            panel.annotate(
                text, corner, (4, 0), textcoords="offset points", va="center", color=color, fontweight="bold"
            )
        panel.set_title(f"{title}, rho = {rho:g}", loc="left", fontsize=11)


def step(*axes: Axes) -> None:
    """One step of SGD, SAM and ASAM from the same weights."""
    lr, start = 0.35, (0.55, 1.5)
    for panel, (name, make) in zip(
        axes,
        (
            ("SGD", None),
            ("SAM", lambda model: SAM(model, rho=0.3)),
            ("ASAM", lambda model: ASAM(model, rho=0.3, eta=0)),
        ),
        strict=True,
    ):
        ground(panel, np.linspace(0, 2, 81))
        model, color = TwoWeights(start), plots.COLORS[name]
        top = np.asarray(start)
        if make is None:
            model.loss().backward()
        else:
            points = []

            def closure(model: TwoWeights = model, points: list[np.ndarray] = points) -> torch.Tensor:
                points.append(model.weight.detach().numpy().copy())
                return model.loss()

            make(model).backward(closure)
            top = points[1]
            geometry, style = Geometry("none" if name == "SAM" else "elementwise", eta=0), (0, (3, 2))
            around = ball(start, geometry, 0.3)
            panel.add_patch(Polygon(around, facecolor=(color, 0.2), edgecolor=color, linewidth=1.2, linestyle=style))
            arrow(panel, start, top, color)
            panel.annotate("w + e", top, (6, 2), textcoords="offset points", color=color, fontweight="bold")
        move = -lr * model.weight.grad.numpy()
        arrow(panel, start, np.asarray(start) + move, INK)
        if make is not None:
            arrow(panel, top, top + move, color, dashed=True)
        panel.plot(*start, "o", color=INK, markersize=5)
        panel.annotate("w", start, (-4, 8), textcoords="offset points", color=INK, fontweight="bold")
        panel.set_title(
            {"SGD": "SGD: the gradient at w"}.get(name, f"{name}: the gradient at w + e"), loc="left", fontsize=11
        )


def arrow(axes: Axes, start: Sequence[float], end: Sequence[float], color: str, *, dashed: bool = False) -> None:
    """An arrow between two points of the plot."""
    style = {"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0, "shrinkB": 0, "ls": "--" if dashed else "-"}
    axes.annotate("", end, start, arrowprops=style)


def normalizations(*axes: Axes) -> None:
    """Two filters of two weights each, a point each: the neighborhoods of every normalization, p = 2 and inf."""
    matrix = torch.tensor([[0.5, 1.6], [1.5, 0.5]], dtype=torch.float64)
    for panel, name in zip(axes, ("none", "elementwise", "filterwise", "layerwise"), strict=True):
        for p, color in ((2, BLUE), (math.inf, ORANGE)):
            for around in balls(matrix, Geometry(name, p=p, eta=0), 0.3):
                panel.add_patch(Polygon(around, facecolor=(color, 0.15), edgecolor=color, linewidth=1.3))
        panel.plot(*matrix.T, "o", color=INK, markersize=4)
        panel.axhline(0, color=GRAY, linewidth=0.8)
        panel.axvline(0, color=GRAY, linewidth=0.8)
        panel.set(xlim=(-0.4, 2.5), ylim=(-0.4, 2.5), aspect="equal", title=f'"{name}"')


def trained(rho: float, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network for the digits with 40 % of the labels wrong, and its data."""
    torch.manual_seed(seed)
    data = load("digits", None, 0.4, seed, 500)
    inputs, targets = data.train.inputs.flatten(1), data.train.labels
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    asam = ASAM(model, rho=rho)
    for _ in range(30):
        for batch in torch.randperm(len(inputs)).split(50):
            asam.backward(lambda batch=batch: nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
            optimizer.step()
            optimizer.zero_grad()
    return model, inputs, targets


def m_sharpness(axes: Axes) -> None:
    """Worst-case sharpness of two networks by the number of examples that share a worst point."""
    sizes = (500, 250, 125, 50, 25, 10)
    for name, rho, color in (("trained by SGD", 0.0, plots.COLORS["SGD"]), ("trained by ASAM, rho = 2", 2.0, BLUE)):
        model, inputs, targets = trained(rho)
        objective = Objective(
            model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), [(inputs, targets)]
        )
        geometry = Geometry(eta=0, bias="scaled")
        values = [worst_case_sharpness(objective, 0.5, geometry=geometry, m=size, steps=10).value for size in sizes]
        axes.plot(sizes, values, "o-", color=color, label=name)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="m, examples that share one worst point", ylabel="adaptive m-sharpness, rho = 0.5", ylim=(0, None))
    axes.legend(frameon=False)


def main() -> None:
    """Draw all of them."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # sums in another order would move a point
    for draw, size, columns in (
        (idea, (10, 5.2), 2),
        (step, (12, 4.4), 3),
        (normalizations, (12, 3.5), 4),
        (m_sharpness, (7, 3.6), 1),
    ):
        (FOLDER / f"{draw.__name__}.svg").write_text(plots.svg(draw, size, columns=columns) + "\n")


if __name__ == "__main__":
    main()
