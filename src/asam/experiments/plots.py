"""The plots of a comparison, each as an SVG text."""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .statistics import mean_sd

matplotlib.use("Agg")
COLORS = {"SGD": "#64748b", "SAM": "#d97706", "ASAM": "#2563eb"}
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
    """Test error of every method: every seed a dot, lines between the same seeds, mean and standard deviation."""
    methods = found["methods"]
    labels = sorted(methods, key=lambda label: -float(np.mean(methods[label]["test_error"])))
    values = np.array([methods[label]["test_error"] for label in labels])

    def draw(axes: Axes) -> None:
        axes.plot(values, range(len(labels)), color="#cbd5e1", linewidth=0.6)
        for y, (label, row) in enumerate(zip(labels, values, strict=True)):
            color = _color(label)
            mean, sd = mean_sd(list(row))
            axes.scatter(row, np.full(len(row), y), s=18, color=color, alpha=0.45, linewidths=0)
            axes.errorbar(mean, y + 0.22, xerr=sd, color=color, marker="D", markersize=5, capsize=3)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel("test error (%)")

    return _svg(draw, (8, 3.6))


def transfer(found: dict[str, Any]) -> str:
    """Test error at the same rho over the scale of the first layer: mean line, every seed a dot."""
    scales = found["transfer"]["scales"]

    def draw(axes: Axes) -> None:
        for label, by_scale in found["transfer"]["test_error"].items():
            axes.plot(scales, np.mean(by_scale, axis=1), color=COLORS[label], marker="o", label=label, linewidth=2)
            for scale, row in zip(scales, by_scale, strict=True):
                axes.scatter(np.full(len(row), scale), row, s=14, color=COLORS[label], alpha=0.35, linewidths=0)
        axes.set_xscale("log")
        axes.set_xticks(scales, ["1/3", "1/2", "1", "2", "3"])
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.set_xlabel("first layer times a, second divided by a (the same function)")
        axes.set_ylabel("test error (%)")
        axes.legend(frameon=False)

    return _svg(draw, (8, 3.6))


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
                axes.plot(passes, mean, style, color=_color(label), label=label)
                axes.fill_between(passes, mean - sd, mean + sd, color=_color(label), alpha=0.12, linewidth=0)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("gradient passes over the training data")
            axes.set_title("training error (%)" if name == "train_error" else "test error (%)", loc="left", fontsize=10)
        left.legend(frameon=False, fontsize=8)

    return _svg(draw, (8, 3.4), columns=2)


def _color(label: str) -> str:
    return COLORS[label.split(",")[0]]


def _svg(draw: Any, size: tuple[float, float], columns: int = 1) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(*np.ravel(figure.subplots(1, columns)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
