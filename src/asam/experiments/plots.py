"""The plots of a comparison, each as an SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..measure.plots import METHODS
from .statistics import mean_sd

matplotlib.use("Agg")
COLORS = {name.upper(): color for name, color in METHODS.items()}
PALETTE = ("#16a34a", "#db2777", "#7c3aed", "#0891b2", "#ca8a04", "#dc2626", "#0f766e", "#9333ea", "#65a30d", "#be185d")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "svg.hashsalt": "asam",
}


def errors(found: dict[str, Any]) -> str:
    """Test error of every method."""
    return dots({label: method["test_error"] for label, method in found["methods"].items()}, "test error (%)")


def dots(values: Mapping[str, Sequence[float]], quantity: str, *, from_zero: bool = True) -> str:
    """A quantity by method: every seed a dot, lines between the same seeds, mean and standard deviation."""
    labels = sorted(values, key=lambda label: -float(np.mean(values[label])))
    points = np.array([values[label] for label in labels])

    def draw(axes: Axes) -> None:
        axes.plot(points, range(len(labels)), color="#cbd5e1", linewidth=0.6)
        for y, (label, row) in enumerate(zip(labels, points, strict=True)):
            color = color_of(label)
            mean, sd = mean_sd(list(row))
            axes.scatter(row, np.full(len(row), y), s=18, color=color, alpha=0.45, linewidths=0)
            spread = sd if len(row) > 1 else None
            axes.errorbar(mean, y + 0.22, xerr=spread, color=color, marker="D", markersize=5, capsize=3)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        if from_zero:
            axes.set_xlim(left=0)
        axes.set_xlabel(quantity)

    return svg(draw, (8, 0.9 + 0.45 * len(labels)))


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    top: float | None = None,
) -> str:
    """Curves by label, each of x and, at every x, a value a seed: line of means, band: standard error."""

    def draw(axes: Axes) -> None:
        for i, (label, (x, rows)) in enumerate(curves.items()):
            mean = np.array([np.mean(row) for row in rows])
            error = np.array([np.std(row, ddof=1) / len(row) ** 0.5 if len(row) > 1 else 0.0 for row in rows])
            color = color_of(label, i)
            axes.plot(x, mean, color=color, marker="o", markersize=4, label=label, linewidth=1.8)
            axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        if log_x:
            logarithmic(axes)
        axes.set_ylim(0, top)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False, fontsize=8)

    return svg(draw, (8, 4))


def logarithmic(axes: Axes) -> None:
    """Give the horizontal axis a logarithmic scale, with plain numbers at 1, 2 and 5."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")


def transfer(found: dict[str, Any], names: Sequence[str] = ("1/3", "1/2", "1", "2", "3")) -> str:
    """Test error at the same rho over the scale of the first layer: mean line, every seed a dot."""
    scales = found["transfer"]["scales"]

    def draw(axes: Axes) -> None:
        for label, by_scale in found["transfer"]["test_error"].items():
            axes.plot(scales, np.mean(by_scale, axis=1), color=COLORS[label], marker="o", label=label, linewidth=2)
            for scale, row in zip(scales, by_scale, strict=True):
                axes.scatter(np.full(len(row), scale), row, s=14, color=COLORS[label], alpha=0.35, linewidths=0)
        axes.set_xscale("log")
        axes.set_xticks(scales, list(names))
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.set_xlabel("first layer times a, second divided by a (the same function)")
        axes.set_ylabel("test error (%)")
        axes.legend(frameon=False)

    return svg(draw, (8, 3.6))


def curves(found: dict[str, Any]) -> str:
    """Training and test error over gradient passes: mean and standard deviation over seeds."""

    def draw(left: Axes, right: Axes) -> None:
        for axes, name in ((left, "train_error"), (right, "test_error")):
            for label, method in found["methods"].items():
                if "curves" not in method or label.startswith("SGD, weight"):
                    continue
                runs = np.array(method["curves"][name])
                passes = np.arange(1, runs.shape[1] + 1) * (1 if label.startswith("SGD") else 2)
                mean, sd = runs.mean(axis=0), runs.std(axis=0)
                style = "--" if label != "SGD" and label.startswith("SGD") else "-"
                axes.plot(passes, mean, style, color=color_of(label), label=label)
                axes.fill_between(passes, mean - sd, mean + sd, color=color_of(label), alpha=0.12, linewidth=0)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("gradient passes over the training data")
            axes.set_title("training error (%)" if name == "train_error" else "test error (%)", loc="left", fontsize=10)
        left.legend(frameon=False, fontsize=8)

    return svg(draw, (8, 3.4), columns=2)


def color_of(label: str, otherwise: int | None = None) -> str:
    """The color of a method; labels such as "SGD, early stopping" and "SAM on weights" have that of their method."""
    method = label.replace(",", " ").split(" ")[0]
    if otherwise is not None and label != method:
        return PALETTE[otherwise % len(PALETTE)]
    return COLORS.get(method, PALETTE[(otherwise or 0) % len(PALETTE)])


def svg(draw: Any, size: tuple[float, float], columns: int = 1, rows: int = 1) -> str:
    """A figure that ``draw`` fills, given its axes, as text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(*np.ravel(figure.subplots(rows, columns)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
