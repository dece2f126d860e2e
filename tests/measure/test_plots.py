"""Labels of axes, colors and the page of landscapes."""

import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from asam.measure import LossLine, LossPlane
from asam.measure.page import landscape_page
from asam.measure.plots import METHODS, log_ticks, plot_plane, styles

X = torch.linspace(-1, 1, 5, dtype=torch.float64)


def test_ticks_are_round_and_their_labels_say_what_they_are():
    draw = np.random.default_rng(0)
    for _ in range(2000):
        low = 10 ** draw.uniform(-8, 8)
        high = low * (1 + 10 ** draw.uniform(-9, 12))
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 7
        assert len(set(ticks.values())) == len(ticks)
        assert all(low * (1 - 1e-8) <= tick <= high * (1 + 1e-8) for tick in ticks)
        assert all(math.isclose(float(label), tick, rel_tol=1e-11) for tick, label in ticks.items())


@pytest.mark.parametrize("high", [2.2, 2.2 * (1 + 1e-15)])
def test_what_is_flat_has_one_tick(high):
    assert list(log_ticks(2.2, high).values()) == ["2.2"]


def test_a_method_has_its_color_and_the_others_take_none_of_those():
    names = ["asam", "SGD-x1-seed0", "sgd-twice-the-epochs-x1-seed0", "sam.2", "sample", "own-make"]
    found = styles(names)
    assert [found[name] for name in names[:4]] == [
        (METHODS["asam"], 0),
        (METHODS["sgd"], 0),
        (METHODS["sgd"], 1),
        (METHODS["sam"], 0),
    ]
    many = styles(f"net{i}" for i in range(20))
    assert not {color for color, _ in many.values()} & set(METHODS.values())
    assert len(set(many.values())) == 20


def figures(loss):
    """The figures of a page: a surface, a line, a way."""
    page = landscape_page(
        {"sgd-x1": LossPlane(X, X, {"loss": loss(X[:, None] ** 2 + X**2)})},
        {"sgd-x1": LossLine(X, {"loss": loss(X**2)})},
        {"sgd-x1 to asam-x1": LossLine(X, {"loss": loss(X**2)})},
    )
    return json.loads(re.search(r"const figures=(\[.*\]);\n", page)[1])


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (lambda r: 2.21 + 0.04 * r, ["2.22", "2.24", "2.26", "2.28"]),
        (lambda r: 0.003 * (4 * r).exp(), ["0.01", "0.1", "1"]),
        (lambda r: 2.3 + 0 * r, ["2.3"]),
    ],
)
def test_the_heights_of_a_surface_have_labels_no_two_alike(loss, labels):
    axis = figures(loss)[0]["layout"]["scene"]["zaxis"]
    assert axis["ticktext"] == labels
    np.testing.assert_allclose(axis["tickvals"], np.log10(np.array(labels, dtype=float)))
    assert axis["range"][0] < axis["tickvals"][0] <= axis["tickvals"][-1] < axis["range"][1]


def test_a_line_has_the_color_of_its_method_and_a_way_that_of_neither():
    _, line, way = figures(lambda r: 2 + r)
    assert line["data"][0]["line"]["color"] == METHODS["sgd"]
    assert way["data"][0]["line"]["color"] not in METHODS.values()


def test_a_plane_that_is_flat_but_for_rounding():
    loss = torch.ones(5, 5, dtype=torch.float64)
    loss[0, 0] = 1 + 2**-52
    contours = plot_plane(Figure().subplots(), LossPlane(X, X, {"loss": loss}))
    assert list(contours.levels) == [1, 1 + 2**-52]
