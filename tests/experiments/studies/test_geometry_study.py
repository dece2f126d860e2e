import json
import math

import numpy as np
import pytest

from asam.experiments import reproduce
from asam.experiments.studies import geometry
from asam.experiments.studies.geometry import REGIONS, STUDY, TARGET, Region, boundary, loss, perform, weights
from asam.experiments.study import REPRODUCES, UNDECIDED


def test_in_miniature_it_writes_everything(tmp_path):
    settings = reproduce.configured(STUDY, "quick")
    folder = tmp_path / "out"
    reproduce.claim(STUDY, "quick", settings, folder, None, force=False)
    found = reproduce.reproduce(STUDY, "quick", settings, folder, None, 1, lambda done, planned: None)
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "results.jsonl", "summary.json", "table.md", "report.html", "geometry.svg")
    }
    assert json.loads((folder / "summary.json").read_text())["runs"] == len(REGIONS)
    invariant = [item for item in found.findings if "same" in item.claim]
    assert len(invariant) == 2
    assert {item.verdict for item in invariant} == {REPRODUCES}
    assert all(item.verdict in (REPRODUCES, UNDECIDED) for item in found.findings)


@pytest.mark.parametrize(("region", "power"), [("normalized ball, p = inf", 1.0), ("normalized ball, p = 2", 0.5)])
def test_on_the_valley_a_normalized_ball_has_the_closed_form(region, power):
    w = TARGET**0.5
    run = Region(region, 0.2, pairs=0, steps=20, restarts=2, drawn=(2 * w, w / 2, 0.3))
    outcome = perform(run)
    factor = 1 + 0.2 / 2 ** (1 - power)  # of each weight at the worst point: both grow alike
    expected = TARGET**2 * (factor**2 - 1) ** 2 / 2
    np.testing.assert_allclose([*outcome["at_w"], *outcome["at_aw"]], expected, rtol=1e-6)
    np.testing.assert_allclose(outcome["worst_w"][0], [2 * w * factor, w / 2 * factor], rtol=1e-3)
    np.testing.assert_allclose(outcome["worst_aw"][0], [0.6 * w * factor, w / 0.6 * factor], rtol=1e-3)


def test_the_worst_point_of_the_fixed_square_is_its_corner():
    w = TARGET**0.5
    outcome = perform(Region("fixed ball, p = inf", 0.1, pairs=0, steps=10, restarts=2, drawn=(w, w, 0.5)))
    np.testing.assert_allclose(outcome["worst_w"][0], [w + 0.1, w + 0.1], rtol=1e-12)
    np.testing.assert_allclose(outcome["worst_aw"][0], [w / 2 + 0.1, 2 * w + 0.1], rtol=1e-12)


@pytest.mark.parametrize("region", REGIONS)
def test_the_boundary_is_that_of_the_region(region):
    ball = REGIONS[region]
    points = boundary((0.5, 2.0), region, 0.1)
    scales = np.array([0.5, 2.0]) if ball.normalization == "elementwise" else np.ones(2)
    np.testing.assert_allclose(np.linalg.norm((points - [0.5, 2.0]) / scales, ball.p, axis=1), 0.1, rtol=1e-12)
    np.testing.assert_allclose(points.mean(axis=0), [0.5, 2.0], atol=1e-12)


def test_w_and_its_rescaling_are_the_same_function():
    for w1, w2, a in weights(10, (1.0, 0.5, 2.0)):
        assert math.isclose(loss(w1, w2), loss(a * w1, w2 / a), rel_tol=1e-9, abs_tol=1e-15)
        assert TARGET / 2 <= w1 * w2 <= 2 * TARGET


def test_an_ascent_that_misses_the_worst_point_is_told():
    settings = geometry.Settings(pairs=2)
    outcomes = {name: perform(run) for name, run in STUDY.plan(settings, {}).items()}
    outcomes["fixed ball, p = 2"]["missed"][1] = 0.5
    found = STUDY.report(settings, outcomes)
    assert found.findings[-1].verdict == UNDECIDED
    assert found.findings[-1].estimate == 0.5
