"""Plots of what was measured, each drawn into a matplotlib Axes of yours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .lanczos import SpectralDensity
from .landscape import LossLine, LossPlane
from .worst_case import SharpnessProfile

if TYPE_CHECKING:  # matplotlib is needed by those who draw only
    from matplotlib.axes import Axes


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
        style = {"norm": LogNorm(low, high), "levels": np.geomspace(low, high, 25), **style}
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


def _finite(values: Any) -> Any:
    return values.where(values.isfinite(), float("nan")).numpy()
