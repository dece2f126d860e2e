"""The loss along lines and over planes through the weights.

A random direction is scaled filter by filter to the norms of the weights (Li et al., 2018, arXiv:1712.09913), so that
networks of different scale can be compared. Every point is computed from the weights themselves, w + a d1 + b d2; the
grid contains 0, where the loss is that of w exactly; nan and inf stay in the data.
"""

import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..geometry import Geometry
from .draws import draw
from .evaluation import Evaluation
from .objective import Objective, check_objective

Direction = Mapping[str, Tensor] | Tensor


@dataclass(frozen=True)
class LossLine:
    """Means along a line: ``values["loss"][i]`` is the loss at ``positions[i]``.

    Example:
        >>> positions = torch.linspace(-1, 1, 3)
        >>> line = LossLine(positions, {"loss": positions**2})
        >>> line.values["loss"].tolist()
        [1.0, 0.0, 1.0]
    """

    positions: Tensor
    values: dict[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Write the line as an npz file of ``positions`` and one array per mean."""
        _save(path, {"positions": self.positions}, self.values)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        (positions,), values = _load(path, ("positions",))
        return cls(positions, values)


@dataclass(frozen=True)
class LossPlane:
    """Means over a plane: ``values["loss"][i, j]`` is the loss at ``(x[i], y[j])``.

    Example:
        >>> x, y = torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 5)
        >>> plane = LossPlane(x, y, {"loss": x[:, None] ** 2 + y**2})
        >>> plane.values["loss"].shape, plane.values["loss"][1, 2].item()  # 0 at the weights
        (torch.Size([3, 5]), 0.0)
    """

    x: Tensor
    y: Tensor
    values: dict[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Write the plane as an npz file of ``x``, ``y`` and one array per mean."""
        _save(path, {"x": self.x, "y": self.y}, self.values)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        (x, y), values = _load(path, ("x", "y"))
        return cls(x, y, values)


def random_direction(objective: Objective, *, seed: int = 0) -> dict[str, Tensor]:
    """A random direction, filter-normalized: each of its filters has the norm of the weights' filter.

    A filter is a slice of the first dimension: a row of a linear layer, an output channel of a convolution (an input
    channel of a transposed one). Parameters of fewer than two dimensions (biases, normalization) stay where they are.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> direction = random_direction(Objective(model, lambda model, x: model(x).mean(), [torch.ones(1, 2)]))
        >>> torch.allclose(direction["weight"].norm(), model.weight.norm()), direction["bias"].item()
        (True, 0.0)
    """
    check_objective(objective)
    z = objective.named(draw(objective.like, seed, 0, "normal"))
    filters = Geometry("filterwise", eta=0, bias="scaled")
    weights = {name: param.detach() for name, param in objective.params.items()}
    norms, own = filters.scales(weights), filters.scales(z)
    return {
        name: z[name] * norms[name] / own[name] if param.ndim >= 2 else torch.zeros_like(z[name])
        for name, param in weights.items()
    }


def between(objective: Objective, other: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The direction from the weights to those of another model (or its state dict): there at position 1.

    Raises:
        ValueError: the other lacks a parameter or has it in another shape, or has two in the place of a shared one.

    Example:
        >>> model, other = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> direction = between(Objective(model, lambda model, x: model(x).mean(), [torch.ones(1, 2)]), other)
        >>> torch.allclose(model.weight + direction["weight"], other.weight)
        True
    """
    check_objective(objective)
    state = _state(other)
    _check_shared(objective.model, state)
    with torch.no_grad():
        return {name: _entry(state, name, param) - param for name, param in objective.params.items()}


def loss_line(
    objective: Objective, direction: Direction, *, span: tuple[float, float] = (-1.0, 1.0), points: int = 51
) -> LossLine:
    """The loss along a line through the weights.

    Args:
        objective: the loss as a function of the weights.
        direction: a tensor per parameter, such as `random_direction`, `between` or ``objective.gradient()``, or one
            vector of all, such as an eigenvector; parameters that are not named stay where they are.
        span: the first and the last position, ``w + position * direction``; 0 lies between them.
        points: of the grid, evenly spaced; 0 is put in if it is not one of them.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.ones(1, 1)])
        >>> line = loss_line(objective, {"weight": -model.weight.detach()}, span=(0, 2), points=3)
        >>> line.positions.tolist(), bool(line.values["loss"][1] == 0)  # w - w = 0
        ([0.0, 1.0, 2.0], True)
    """
    check_objective(objective)
    positions = _grid("span", span, points)
    d = _vector(objective, direction)

    def along(evaluation: Evaluation) -> list[dict[str, float]]:
        means = []
        for position in positions.tolist():
            evaluation.move(position * d)
            means.append(evaluation.means(objective.pieces))
        return means

    return LossLine(positions, _stacked(objective.run(along)))


def loss_plane(
    objective: Objective,
    x_direction: Direction,
    y_direction: Direction,
    *,
    x_span: tuple[float, float] = (-1.0, 1.0),
    y_span: tuple[float, float] = (-1.0, 1.0),
    points: int = 25,
) -> LossPlane:
    """The loss over a plane through the weights, at ``w + x * x_direction + y * y_direction``.

    The arguments are those of `loss_line`, for each axis; ``points`` is that of one axis.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.ones(1, 2)])
        >>> x, y = random_direction(objective, seed=0), random_direction(objective, seed=1)
        >>> loss_plane(objective, x, y, points=3).values["loss"].shape
        torch.Size([3, 3])
    """
    check_objective(objective)
    x, y = _grid("x_span", x_span, points), _grid("y_span", y_span, points)
    dx, dy = _vector(objective, x_direction), _vector(objective, y_direction)

    def over(evaluation: Evaluation) -> list[dict[str, float]]:
        means = []
        for a in x.tolist():
            for b in y.tolist():
                evaluation.move(a * dx + b * dy)
                means.append(evaluation.means(objective.pieces))
        return means

    means = _stacked(objective.run(over))
    return LossPlane(x, y, {name: values.view(len(x), len(y)) for name, values in means.items()})


def interpolate(objective: Objective, other: nn.Module | Mapping[str, Tensor], *, points: int = 25) -> LossLine:
    """The loss on the straight way from the model, at 0, to another of the same architecture, at 1.

    Floating-point buffers, such as the running statistics of batch norm, are interpolated too, and other buffers are
    those of the model but at 1, so both ends have exactly the losses of the two models. In between, the statistics of
    batch norm are not those of the network there: with ``batchnorm="train"`` the objective takes them from its batches.

    Raises:
        ValueError: the other has other layers, differs in a parameter that is not measured, or has two parameters in
            the place of one that layers of the model share.

    Example:
        >>> model, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.ones(1, 1)])
        >>> line = interpolate(objective, other, points=3)
        >>> line.positions.tolist(), bool(line.values["loss"][0] == objective.loss())
        ([0.0, 0.5, 1.0], True)
    """
    check_objective(objective)
    check_count("points", points, 2)
    if isinstance(other, nn.Module) and (difference := differing_layers(objective.model, other)):
        raise ValueError(f"the models differ in {difference}")
    ours, end = _state(objective.model), _state(other)
    if not isinstance(other, nn.Module):  # a state dict has no others
        ours = {name: value for name, value in ours.items() if name in objective.model.state_dict()}
    _check_shared(objective.model, end)
    for name, param in objective.model.named_parameters():
        if name not in objective.params and not torch.equal(_entry(end, name, param), param):
            raise ValueError(f"the models differ in {name!r}, which is not one of the parameters that are measured")
    start = {name: value.clone() for name, value in ours.items()}
    end = {name: _entry(end, name, value) for name, value in start.items()}
    differing = [name for name, value in start.items() if not torch.equal(value, end[name])]
    positions = torch.linspace(0, 1, points, dtype=torch.float64, device="cpu")

    def on_the_way(evaluation: Evaluation) -> list[dict[str, float]]:
        means = []
        for t in positions.tolist():
            evaluation.put({name: _mixed(start[name], end[name], t) for name in differing})
            means.append(evaluation.means(objective.pieces))
        return means

    return LossLine(positions, _stacked(objective.run(on_the_way)))


def differing_layers(model: nn.Module, other: nn.Module) -> str | None:
    """In words, the first layer that is of another kind in the other model; dropout is none in evaluation."""
    # by name: each parametrized layer is of a class of its own
    layers, others = (
        {name: re.sub(r".*Drop(out|Path).*", "Identity", type(module).__name__) for name, module in net.named_modules()}
        for net in (model, other)
    )
    for name, kind in layers.items():
        if name and others.get(name, "nothing") != kind:
            return f"{name!r}: {kind} in the one, {others.get(name, 'nothing')} in the other"
    return None


def _vector(objective: Objective, direction: Direction) -> Tensor:
    """The direction as a vector of its own: the one given may be a view of the weights, which move."""
    vector = objective.flat(direction).clone()
    if not vector.isfinite().all():
        raise ValueError("a direction must be finite")
    return vector


def _mixed(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Both ends exactly: a + (b - a) is not b in floating point, and not a number where both are infinite."""
    if t == 1 or not start.is_floating_point():
        return end if t == 1 else start
    return torch.where(start == end, start, start + t * (end - start)) if t else start


def _state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {**dict(model.named_buffers()), **model.state_dict()} if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise TypeError(f"the other must be a module or its state dict, got {type(model).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _check_shared(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise where the state has two values for a parameter that has two names in the model."""
    first: dict[nn.Parameter, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        one = first.setdefault(param, name)
        if name in state and one in state and not torch.equal(state[name], state[one]):
            raise ValueError(f"{one!r} and {name!r} are one parameter of the model, and two in the other model")


def _entry(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in state:
        raise ValueError(f"the other model has no {name!r}")
    if state[name].shape != like.shape:
        raise ValueError(f"{name!r} has shape {tuple(like.shape)}, in the other model {tuple(state[name].shape)}")
    return state[name].detach().to(like)


def _grid(name: str, span: tuple[float, float], points: int) -> Tensor:
    check_count("points", points, 2)
    try:
        low, high = span
        numbers = math.isfinite(low), math.isfinite(high)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two numbers, got {span!r}") from None
    if not (all(numbers) and low <= 0 <= high and low < high):
        raise ValueError(f"{name} must be two finite numbers with 0 between them, the smaller one first, got {span}")
    grid = low + (high - low) * torch.arange(points, dtype=torch.float64, device="cpu") / (points - 1)
    grid[-1] = high
    grid[grid.abs() < 1e-9 * (high - low)] = 0.0
    return grid if (grid == 0).any() else torch.cat([grid, grid.new_zeros(1)]).sort().values


def _stacked(means: list[dict[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([mean[name] for mean in means], dtype=torch.float64, device="cpu") for name in means[0]}


def _save(path: str | Path, axes: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    import numpy as np

    reserved = {"file", "allow_pickle", *axes} & set(values)  # two are arguments of NumPy's savez
    if reserved:
        raise ValueError(f"a mean may not be called {sorted(reserved)[0]!r}")
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in {**axes, **values}.items()}
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _load(path: str | Path, axes: tuple[str, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    import numpy as np

    try:
        with open(path, "rb") as file:
            loaded = np.load(io.BytesIO(file.read()), allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:  # a lone array has no files
        raise ValueError(f"{path} is not an npz file") from error
    missing = [name for name in axes if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}")
    try:
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except TypeError as error:
        raise ValueError(f"{path} holds something else than numbers") from error
    return [found.pop(name) for name in axes], found
