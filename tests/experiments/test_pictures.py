"""What a reader of the plots and pages meets: labels, colors, a single seed."""

from itertools import pairwise

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from asam.experiments import html, landscapes, plots, report
from asam.measure import LossLine, LossPlane

LOSSES = {
    "little": lambda r: 2.205 + 0.04 * r,
    "decades": lambda r: 0.003 * (4 * r).exp(),
    "nothing": lambda r: 2.3 + 0 * r,
}
NAMES = ("asam-x1-seed0", "sgd-x1-seed0", "mine")


@pytest.fixture(params=[(name, span) for name in LOSSES for span in (1.0, 0.01)])
def drawn(request, monkeypatch):
    """The figures of lines.svg and planes.svg."""
    loss, span = LOSSES[request.param[0]], request.param[1]
    x, r = (torch.linspace(-span, span, 5, dtype=torch.float64) for span in (span, 1))
    slices = landscapes.Slices(
        {name: LossPlane(x, x, {"loss": loss(r[:, None] ** 2 + r**2)}) for name in NAMES},
        {name: LossLine(x, {"loss": loss(r**2)}) for name in NAMES},
        {f"{a} to {b}": LossLine(x.abs(), {"loss": loss(r**2 / 2)}) for a, b in pairwise(NAMES)},
    )
    monkeypatch.setattr(landscapes, "_svg", lambda figure: figure)
    figures = landscapes._lines(slices), landscapes._planes(slices)
    for figure in figures:
        FigureCanvasAgg(figure).draw()
    return figures


def distinct_labels(axis, of):
    """The texts at an axis, which must not overlap."""
    low, high = sorted(axis.get_view_interval())
    ticks = [
        tick
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if low <= tick.get_loc() <= high and (tick.label1.get_text() or tick.label2.get_text())
    ]
    labels = [tick.label2 if tick.label2.get_visible() else tick.label1 for tick in ticks]
    texts = [label.get_text() for label in labels]
    assert len(set(texts)) == len(texts), texts
    boxes = sorted(getattr(label.get_window_extent(), f"interval{of}").tolist() for label in labels)
    assert all(one[1] < other[0] for one, other in pairwise(boxes)), (texts, boxes)
    return texts


def test_labels_are_distinct_and_do_not_overlap(drawn):
    for figure in drawn:
        for axes in figure.axes:
            distinct_labels(axes.xaxis, "x")
            distinct_labels(axes.yaxis, "y")


@pytest.mark.parametrize("span", [(0.25, 8), (0.09, 4), (1, 60), (0.01, 20)])
def test_a_logarithmic_axis_has_plain_numbers(span):
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.plot(span, (0, 1))
    plots.logarithmic(axes)
    FigureCanvasAgg(figure).draw()
    texts = distinct_labels(axes.xaxis, "x")
    assert {float(text) for text in texts} >= {1, 2}


def test_lines_have_the_colors_of_the_report(drawn):
    of_networks, of_ways = drawn[0].axes
    asam, sgd, mine = (line.get_color() for line in of_networks.lines)
    assert (asam, sgd) == (plots.COLORS["ASAM"], plots.COLORS["SGD"])
    assert not {mine, *(line.get_color() for line in of_ways.lines)} & set(plots.COLORS.values())


@pytest.mark.parametrize(("values", "shown"), [([79.12], "79.1"), ([78.0, 80.0], "79.0 ± 1.4")])
def test_a_single_seed_has_no_standard_deviation(values, shown):
    method = {"test_error": values, "train_error": values, "cost": 1.0, "time_per_step": 1.0}
    assert report.rows({"methods": {"SGD": method}}) == [("SGD", shown, shown, "-", "1x", "1.00x")]


def test_numbers_stay_on_one_line():
    numbers = ["88.8 ± 0.1", "-2.94e-07 to 6e-05", "1 + 2.2e-16", "8 (edge)"]
    page = html.table(["method"] + ["a number"] * 4, [("SGD, early stopping", *numbers)])
    assert ".number{white-space:nowrap}" in html.STYLE
    assert all(f'<td class="number">{number}</td>' in page for number in numbers)
    assert "<td>SGD, early stopping</td>" in page
