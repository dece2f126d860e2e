"""`asam landscape` as a user meets it."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from asam.measure import LossPlane


def test_a_shuffled_loader_gives_the_same_examples_to_every_network(asam, tmp_path):
    sys.path.insert(0, str(tmp_path))
    import own

    for name in ("one", "two"):
        torch.save(own.make()[0].state_dict(), tmp_path / f"{name}.pt")
    arguments = ["--model", "own:shuffled", "--examples", 60, "--points", 3, "--seed", 5]
    assert asam("landscape", "one.pt", "two.pt", *arguments)[0] == 0
    one, two = (LossPlane.load(tmp_path / "asam-landscape" / f"plane-{name}.npz") for name in ("one", "two"))
    assert torch.equal(one.values["loss"], two.values["loss"])


def test_networks_of_the_same_shapes_and_other_layers_have_no_way_between_them(asam, tmp_path):
    code, _, err = asam("landscape", "own:make", "own:tanh", "--points", 3)
    assert code == 0
    assert "no way from own:make to own:tanh: they are not of the same architecture" in err
    assert (tmp_path / "asam-landscape" / "plane-own-tanh.npz").exists()


def test_frozen_parameters_that_differ_have_no_way_between_them(asam, tmp_path):
    sys.path.insert(0, str(tmp_path))
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
    code, _, err = asam("landscape", "0.pt", "1.pt", "--model", "own:frozen", "--points", 3)
    assert code == 0
    assert "no way from 0 to 1: the models differ in '0.weight', which is not one of the" in " ".join(err.split())
    assert (tmp_path / "asam-landscape" / "plane-1.npz").exists()


def test_a_negative_loss_has_no_logarithm(asam, tmp_path):
    code, _, err = asam("landscape", "own:negative", "--points", 3)
    assert code == 2
    assert "asam: own:negative: the loss at the weights is -" in err.strip().splitlines()[-1]
    assert not (tmp_path / "asam-landscape").exists()


def test_what_forces_its_way_and_is_refused_leaves_what_was_there(asam, tmp_path):
    assert asam("landscape", "own:make", "--points", 3)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "asam-landscape").iterdir()}
    code, _, err = asam("landscape", "own:positions", "--points", 3, "--force")
    assert code == 2
    assert err.strip().splitlines()[-1] == "asam: a mean may not be called 'positions'"
    assert {path.name: path.read_bytes() for path in (tmp_path / "asam-landscape").iterdir()} == before


def test_a_landscape_that_cannot_be_written_leaves_nothing(asam, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "landscape.html")

    monkeypatch.setattr("asam.experiments.landscapes.landscape_page", full)
    code, _, err = asam("landscape", "own:make", "--points", 3)
    assert code == 2
    assert err.strip().splitlines()[-1] == "asam: landscape.html: No space left on device"
    assert not (tmp_path / "asam-landscape").exists()


def test_networks_of_different_architecture_have_no_way_between_them(asam, runs):
    _, _, err = asam("landscape", runs / "sgd-mlp", runs / "sgd-cnn", "--points", 3)
    assert "no way from sgd-mlp to sgd-cnn: they are not of the same architecture" in err


def test_landscape_of_runs(asam, runs, tmp_path):
    names = ["sgd-mlp", "asam-mlp", "sgd-cnn"]
    code, out, _ = asam("landscape", *(runs / name for name in names), "--points", 5, "--out", "slices")
    assert code == 0
    files = {file.name for file in (tmp_path / "slices").iterdir()}
    assert files == {
        *(f"{kind}-{name}.npz" for kind in ("plane", "line") for name in names),
        "way-sgd-mlp-to-asam-mlp.npz",  # the cnn is of another architecture
        *("planes.svg", "lines.svg", "landscape.html"),
    }
    assert all(name in out for name in files)
    outcome = json.loads((runs / "sgd-mlp.json").read_text())["outcome"]
    plane = LossPlane.load(tmp_path / "slices" / "plane-sgd-mlp.npz")
    assert plane.x[2] == plane.y[2] == 0
    assert 100 * plane.values["error"][2, 2] == pytest.approx(outcome["train_error"])
    way = np.load(tmp_path / "slices" / "way-sgd-mlp-to-asam-mlp.npz")
    assert way["loss"][0] == plane.values["loss"][2, 2]
    page = (tmp_path / "slices" / "landscape.html").read_text()
    assert "<script src" not in page
    assert all(name in page for name in names)


def test_a_landscape_is_not_overwritten_without_force(asam, tmp_path):
    assert asam("landscape", "own:make", "--points", 3)[0] == 0
    (tmp_path / "asam-landscape" / "mine.txt").write_text("kept")
    before = (tmp_path / "asam-landscape" / "landscape.html").stat().st_mtime_ns
    code, _, err = asam("landscape", "own:make", "--points", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "--force" in err
    assert (tmp_path / "asam-landscape" / "landscape.html").stat().st_mtime_ns == before
    assert asam("landscape", "own:make", "--points", 3, "--force")[0] == 0
    assert (tmp_path / "asam-landscape" / "mine.txt").read_text() == "kept"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "landscape.html").write_text("mine")
    code, _, err = asam("landscape", "own:make", "--points", 3, "--out", "foreign", "--force")
    message = "foreign/landscape.html would be overwritten and is of something else: choose another --out"
    assert (code, err) == (2, f"asam: {message}\n")
    assert (tmp_path / "foreign" / "landscape.html").read_text() == "mine"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, pytest.param(420, marks=pytest.mark.slow)])
def test_the_landscape_page_in_a_browser(asam, browser, runs, tmp_path, width):
    assert asam("landscape", runs / "sgd-mlp", runs / "asam-mlp", "--points", 5)[0] == 0
    page = browser(tmp_path / "asam-landscape" / "landscape.html", width)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    surfaces, lines = (
        page.execute_script(
            f"return [...document.querySelectorAll('.plot.{kind} {drawn}')].map(e => e.getBoundingClientRect().width)"
        )
        for kind, drawn in (("surface", "canvas"), ("lines", ".main-svg:first-child"))
    )
    assert (len(surfaces), len(lines)) == (2, 2)
    assert all(200 < drawn < width for drawn in [*surfaces, *lines])
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    # turning one surface turns the other
    page.execute_script(
        "Plotly.relayout(document.querySelector('.surface'), {'scene.camera': {eye: {x: 2, y: 1, z: 0.5}}})"
    )
    page.set_script_timeout(20)
    eye = page.execute_async_script(
        "const done = arguments[0]; const other = document.querySelectorAll('.surface')[1];"
        "(function look() { const eye = other.layout.scene.camera.eye;"
        "eye.x == 2 ? done(eye) : setTimeout(look, 50) })()"
    )
    assert (eye["x"], eye["y"], eye["z"]) == (2, 1, 0.5)
