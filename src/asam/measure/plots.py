"""Plots of what was measured, each drawn into a matplotlib Axes of yours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .lanczos import SpectralDensity
from .landscape import LossLine, LossPlane
from .worst_case import SharpnessProfile

if TYPE_CHECKING:  # matplotlib is needed by those who draw only
    from matplotlib.axes import Axes

METHODS = {"sgd": "#64748b", "sam": "#d97706", "asam": "#2563eb"}  # the same on every page
OTHERS = ("#059669", "#be185d", "#7c3aed", "#0891b2", "#dc2626")


def plot_line(axes: Axes, line: LossLine, *, mean: str = "loss", **style: Any) -> None:
    """A mean along a line, such as the loss or the error; what is not finite leaves a gap.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> positions = torch.linspace(-1, 1, 5)
        >>> plot_line(axes, LossLine(positions, {"loss": positions**2}))
        >>> len(axes.lines)
        1
    """
    axes.plot(line.positions.numpy(), _finite(line.values[mean]), **style)
    axes.set_xlabel("position along the direction")
    axes.set_ylabel(mean)


def plot_plane(axes: Axes, plane: LossPlane, *, mean: str = "loss", **style: Any) -> Any:
    """A mean over a plane as filled contours, evenly spaced in the logarithm; a cross marks the weights.

    ``style`` goes to `Axes.contourf`: give two planes the same ``levels`` and ``norm`` to compare them.

    Returns:
        The contour set, for a color bar.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> x = torch.linspace(-1, 1, 5)
        >>> contours = plot_plane(Figure().subplots(), LossPlane(x, x, {"loss": x[:, None] ** 2 + x**2 + 0.1}))
        >>> bool(contours.levels[0] > 0)
        True
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    values = np.ma.masked_invalid(plane.values[mean].numpy().T)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > low:
        levels = np.unique(np.geomspace(low, high, 25))  # those of a plane that is nearly flat are few
        style = {"norm": LogNorm(low, high), "levels": levels, **style}
    contours = axes.contourf(plane.x.numpy(), plane.y.numpy(), values, **style)
    axes.plot([0], [0], marker="+", color="white", markersize=9, markeredgewidth=1.6)
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    return contours


def plot_profile(axes: Axes, profile: SharpnessProfile, **style: Any) -> None:
    """Worst-case sharpness over rho, both on logarithmic axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> plot_profile(axes, SharpnessProfile((0.1, 0.2), (0.01, 0.04), ()))
        >>> axes.get_yscale()
        'log'
    """
    axes.plot(profile.rhos, profile.values, **{"marker": "o", **style})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rho")
    axes.set_ylabel("sharpness")


def plot_density(axes: Axes, density: SpectralDensity, **style: Any) -> None:
    """The density of the eigenvalues, on a logarithmic axis.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> one, grid = torch.ones(1), torch.linspace(-1, 1, 3)
        >>> axes = Figure().subplots()
        >>> plot_density(axes, SpectralDensity(one, one, grid, grid**2 + 0.1, 0.1, 1))
        >>> axes.get_xlabel()
        'eigenvalue'
    """
    axes.semilogy(density.grid.numpy(), density.density.clamp(min=1e-8).numpy(), **style)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")


def log_ticks(low: float, high: float) -> dict[float, str]:
    """Three to seven round values for a logarithmic axis from ``low`` to ``high``, and their labels, no two alike.

    Example:
        >>> list(log_ticks(2.205, 2.291).values()), list(log_ticks(0.004, 12).values())
        (['2.22', '2.24', '2.26', '2.28'], ['0.01', '0.1', '1', '10'])
    """
    from matplotlib.ticker import MaxNLocator

    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    every = -(-len(powers) // 5)
    if len(powers) >= 3:
        ticks = [10.0**power for power in powers[::every]]
    elif high - low <= 1e-11 * high:  # flat, but for rounding
        return {low: f"{low:.3g}"}
    else:
        around = [10.0**power for power in range(powers.start - 1, powers.stop + 1)]
        ticks = [ten * one for ten in around for one in (1, 3) if low <= ten * one <= high]
        if len(ticks) < 3:
            even = map(float, MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
            ticks = [tick for tick in even if low <= tick <= high]
    short = all(math.isclose(float(f"{tick:g}"), tick, rel_tol=1e-11) for tick in ticks)
    return {tick: f"{tick:g}" if short else f"{tick:.12g}" for tick in ticks}


def styles(names: Iterable[str], methods: Mapping[str, str] = METHODS) -> dict[str, tuple[str, int]]:
    """A color and a number of dashes for each name: as in the reports where it begins with a method's.

    Example:
        >>> styles(["sgd-x1-seed0", "sgd-x1-seed1", "mine"])
        {'sgd-x1-seed0': ('#64748b', 0), 'sgd-x1-seed1': ('#64748b', 1), 'mine': ('#059669', 0)}
    """
    found: dict[str, tuple[str, int]] = {}
    others = 0
    for name in names:
        color = methods.get(re.split("[^a-z]", name.lower(), maxsplit=1)[0])
        if color is None:
            color = OTHERS[others % len(OTHERS)]
            others += 1
        found[name] = (color, sum(color == used for used, _ in found.values()) % 4)
    return found


def _finite(values: Any) -> Any:
    return values.where(values.isfinite(), float("nan")).numpy()
