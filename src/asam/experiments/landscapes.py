"""Slices of the loss landscapes of several networks: planes, lines and the ways from one to the next."""

import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..measure import LossLine, LossPlane, interpolate, loss_line, loss_plane, random_direction
from ..measure.landscape import differing_layers
from ..measure.page import landscape_page
from ..measure.plots import log_ticks, plot_line, plot_plane, styles
from . import InputError
from .files import write
from .targets import Target, counted

PAGE = "landscape.html"
ALWAYS = ("planes.svg", "lines.svg", PAGE)
OURS = ("plane-*.npz", "line-*.npz", "way-*.npz", *ALWAYS)


@dataclass(frozen=True)
class Slices:
    """What was computed, by the names of the networks or of pairs of them, and why there is no way between a pair."""

    planes: dict[str, LossPlane]
    lines: dict[str, LossLine]
    interpolations: dict[str, LossLine]
    apart: dict[str, str] = field(default_factory=dict)


def check_free(folder: Path, *, force: bool) -> None:
    """See that the slices may be written there.

    Raises:
        InputError: there can be no such folder, or it holds something and there is no ``force``, or what would be
            overwritten is not of this command.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file: choose another --out")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest} is not writable: choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise InputError(f"{folder} is not empty: choose another --out, or overwrite with --force")
    found = [file for pattern in OURS for file in sorted(folder.glob(pattern))]
    if found and not all((folder / name).exists() for name in ALWAYS):  # this command leaves all of them or none
        raise InputError(f"{found[0]} would be overwritten and is of something else: choose another --out")


def passes(targets: list[Target], points: int) -> int:
    """Forward passes over the data that the slices take, with their checks."""
    odd = points + 1 - points % 2
    return len(targets) * (odd * odd + 2 * odd + 7) + (len(targets) - 1) * points


def compute(targets: list[Target], points: int, span: float, seed: int, advance: Callable[[float], None]) -> Slices:
    """The slices; every network is cut along directions of the same random numbers, scaled to its own filters."""
    planes, lines, ways = {}, {}, {}
    apart: dict[str, str] = {}
    objectives = [counted(target, advance) for target in targets]
    for target, objective in zip(targets, objectives, strict=True):
        if not math.isfinite(loss := objective.loss()):
            raise InputError(f"{target.name}: the loss at the weights is {loss}")
        if loss < 0:
            raise InputError(
                f"{target.name}: the loss at the weights is {loss:.4g}, and landscapes are drawn on a logarithmic "
                "scale: use asam.measure.loss_plane"
            )
    for target, objective in zip(targets, objectives, strict=True):
        x, y = (random_direction(objective, seed=2 * seed + i) for i in range(2))
        spans = {"x_span": (-span, span), "y_span": (-span, span)}
        planes[target.name] = loss_plane(objective, x, y, points=points, **spans)
        lines[target.name] = loss_line(objective, x, span=(-span, span), points=2 * points - 1)
    for (one, objective), (other, _) in pairwise(zip(targets, objectives, strict=True)):
        pair = f"{one.name} to {other.name}"
        if _shapes(one.model) != _shapes(other.model) or differing_layers(one.model, other.model):
            apart[pair] = "they are not of the same architecture"
            continue
        try:
            ways[pair] = interpolate(objective, other.model, points=points)
        except ValueError as error:  # frozen parameters of different values, for example
            apart[pair] = str(error)
    return Slices(planes, lines, ways, apart)


def save(slices: Slices, folder: Path) -> list[Path]:
    """Write the slices, their plots and the page in place of earlier ones; return the files.

    Where they cannot be made, the earlier ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".unfinished-*"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        new = Path(unfinished)
        for kind, found in (("plane", slices.planes), ("line", slices.lines), ("way", slices.interpolations)):
            for name, piece in found.items():
                piece.save(new / f"{kind}-{file_name(name)}.npz")
        page = landscape_page(slices.planes, slices.lines, slices.interpolations)
        for name, text in (("planes.svg", _planes(slices)), ("lines.svg", _lines(slices)), (PAGE, page)):
            write(new / name, text)
        for pattern in OURS:
            for file in folder.glob(pattern):
                file.unlink()
        return [file.replace(folder / file.name) for file in sorted(new.iterdir())]


def _planes(slices: Slices) -> str:
    count = len(slices.planes)
    figure = Figure(figsize=(3.8 * count + 1, 3.8), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    losses = torch.cat([plane.values["loss"].flatten() for plane in slices.planes.values()])
    losses = losses[losses.isfinite() & (losses > 0)]
    if len(losses) and losses.min() < losses.max():  # one scale for all
        levels = np.geomspace(float(losses.min()), float(losses.max()) * (1 + 1e-9), 25)
        style: dict[str, Any] = {"levels": levels, "norm": LogNorm(levels[0], levels[-1])}
    else:
        style = {}
    for axes, (name, plane) in zip(grid, slices.planes.items(), strict=True):
        contours = plot_plane(axes, plane, **style)
        axes.set_title(_plain(name), fontsize=10)
        axes.locator_params(axis="x", nbins=5)  # labels of two decimals have room
    bar = figure.colorbar(contours, ax=grid, label="loss")
    if style:
        ticks = log_ticks(levels[0], levels[-1])
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
    return _svg(figure)


def _lines(slices: Slices) -> str:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    kinds = [(slices.lines, styles(slices.lines), "position along the first direction")]
    if ways := slices.interpolations:  # from one method to another: in the color of neither
        kinds.append((ways, styles(ways, {}), "position from one network, 0, to the next, 1"))
    for axes, (lines, styled, label) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for name, line in lines.items():
            color, dashes = styled[name]
            plot_line(axes, line, label=_plain(name), color=color, linestyle=("-", "--", ":", "-.")[dashes])
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yscale("log")
        ticks = log_ticks(*axes.get_ylim())
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _plain(name: str) -> str:
    """A name that matplotlib does not take for a formula."""
    return name.replace("$", r"\$")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def file_name(name: str) -> str:
    """The part of a file's name that stands for a network."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
