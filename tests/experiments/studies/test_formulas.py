"""What the studies compute by themselves, against cases worked out by hand."""

import math

import pytest

from asam.experiments.studies import correlation, noise, rho
from asam.experiments.studies.rho import grid, window

DOUBLING = [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([10.0, 10.0, 10.0, 10.0, 10.0], 4.0),  # all of the grid
        ([30.0, 30.0, 10.0, 30.0, 30.0], 0.2),  # a tenth of a step to both sides
        ([10.0, 14.0, 30.0, 30.0, 30.0], 0.5),  # best at the first: it ends there on one side
        ([30.0, 30.0, 30.0, 18.0, 10.0], 0.25),  # best at the last
        ([12.0, 11.0, 10.0, 12.0, 12.0], 4.0),  # just within the tolerance is within
        ([11.0, 10.0, 11.0, 15.0, 20.0], 1.0 + 1.0 + 0.25),  # interpolated from the last that does well
        ([10.5, 30.0, 10.0, 30.0, 10.5], 0.2),  # what does well beyond a gap is no part of it
        ([20.0, 10.0, 20.0, 10.0, 20.0], 0.4),  # of two that are best, the first
        ([10.0, 12.5, 30.0, 30.0, 30.0], 0.8),  # just beyond the tolerance is beyond
    ],
)
def test_window(errors, expected):
    assert window(DOUBLING, errors, tolerance=2.0) == pytest.approx(expected, abs=1e-12)
    moved = [7 * value for value in DOUBLING]
    assert window(moved, [error + 5 for error in errors], tolerance=2.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("errors", [[30, 30, 10, 30, 30], [10, 14, 30, 30, 30], [11, 10, 11, 15, 20]])
def test_a_window_is_the_same_from_both_sides(errors):
    reflected = [1 / value for value in reversed(DOUBLING)]
    assert window(reflected, errors[::-1], 2.0) == pytest.approx(window(DOUBLING, errors, 2.0), abs=1e-12)


def test_a_window_is_interpolated_in_the_logarithm_of_rho():
    # the error passes 12 half way from 1 to 4 in log rho: at 2, which is one factor of 2
    assert window([1.0, 4.0], [10.0, 14.0], tolerance=2.0) == pytest.approx(1.0, abs=1e-12)


def test_grid():
    assert grid(0.5, 5) == [0.5, 0.707, 1.0, 1.41, 2.0]
    assert grid(0.05, 1) == [0.05]
    settings = rho.Settings()
    for first, count in (settings.fixed, settings.elementwise, settings.filterwise, settings.layerwise):
        values = grid(first, count)
        assert len(values) == count
        assert values[0] == first
        assert values[-1] == pytest.approx(first * math.sqrt(2) ** (count - 1), rel=0.005)
        assert len({f"{value:g}" for value in values}) == count  # they name the runs


def test_every_variant_has_its_own_grid():
    settings = rho.Settings(seeds=1)
    runs = rho.STUDY.plan(settings, {})
    assert len(runs) == settings.fixed[1] + 3 * (
        settings.elementwise[1] + settings.filterwise[1] + settings.layerwise[1]
    )
    for normalization in ("elementwise", "filterwise", "layerwise"):
        for bias in ("unscaled", "scaled", "fixed"):
            tried = [
                run.rho
                for name, run in runs.items()
                if name.startswith(f"ASAM, {normalization}, {bias}/")
                and (run.method, run.normalization, run.bias) == ("asam", normalization, bias)
            ]
            assert tried == grid(*getattr(settings, normalization))
    assert [run.rho for run in runs.values() if run.method == "sam"] == grid(*settings.fixed)


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [
        ([30.0, 10.0, 20.0], [31.0, 12.0, 5.0], 12.0),  # not the best test error
        ([30.0, 10.0, 10.0], [31.0, 12.0, 5.0], 12.0),  # the first of equals
        ([5.0, 10.0, 10.0], [31.0, 12.0, 5.0], 31.0),
        ([30.0, 20.0, 10.0], [31.0, 12.0, 5.0], 5.0),
    ],
)
def test_early_stopping(validation, test, expected):
    outcome = {"test_error": test[-1], "curves": {"validation_error": validation, "test_error": test}}
    assert noise.early_stopped(outcome) == expected


def networks(scale):
    runs = correlation.STUDY.plan(correlation.STUDY.settings[scale], {})
    return [{name: network for name, network in runs.items() if name.startswith(part)} for part in ("sel", "rep")]


def hyperparameters(run):
    return run.batch_size, run.lr, run.weight_decay, run.dropout


def test_the_grid_of_networks():
    selection, reported = networks("laptop")
    assert (len(selection), len(reported)) == (72, 144)
    assert len({hyperparameters(network.training) for network in reported.values()}) == 4 * 3 * 3 * 4
    assert {network.training.method for network in reported.values()} == {"sgd"}
    for network in (*selection.values(), *reported.values()):
        network.training.check()
        assert network.training.epochs == network.training.evaluate_every  # evaluated once, at the end


@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_rho_is_chosen_on_networks_of_other_seeds(scale):
    selection, reported = networks(scale)
    seeds = [[network.training.seed for network in part.values()] for part in (selection, reported)]
    assert len(set(seeds[0] + seeds[1])) == len(selection) + len(reported)
    for name, network in selection.items():
        twin = reported[name.replace("selection", "reported")].training
        assert network.training.but(seed=twin.seed) == twin


def test_networks_of_the_selection_alone_choose_rho():
    """The first rho ranks those of the selection well, the second those that are reported."""
    settings = correlation.STUDY.settings["quick"]
    outcomes = {}
    for i, name in enumerate(correlation.STUDY.plan(settings, {})):
        good, bad = [float(i)], [float(-i)]
        measures = {
            correlation.measure_name(ball, p, method): good + bad if name.startswith("selection") else bad + good
            for ball in correlation.BALLS
            for p in (2.0, math.inf)
            for method in correlation.METHODS
        }
        fit = {"train_error": 0.0, "test_error": 1.0, "generalization_gap": float(i), "loss_gap": float(i)}
        outcomes[name] = fit | {"measures": measures}
    found = correlation.STUDY.report(settings, outcomes)
    taus = [item.estimate for item in found.findings if item.quantity == "Kendall's tau"]
    assert taus == [-1.0, -1.0]
    assert {row[1] for row in found.tables[0].rows} == {f"{settings.rhos[0]:g} (edge)"}


def test_measures_have_names_of_their_own():
    names = [
        correlation.measure_name(ball, p, method)
        for ball in correlation.BALLS
        for p in (2.0, math.inf)
        for method in correlation.METHODS
    ]
    assert len(set(names)) == 8
    assert names[0] == "sharpness, p = 2, ascent"
