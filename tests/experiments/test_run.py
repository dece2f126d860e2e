"""A run's configuration: what it refuses, and that it is read back as it was written."""

import json
import math
from dataclasses import asdict, fields

import pytest

from asam.experiments import InputError
from asam.experiments.run import Run, as_run, read_run

# of every field, values of the right type that cannot be; of those that may be any text, none
BAD = {
    "method": ["adam", "SAM", ""],
    "seed": [-1, 2**63],
    "rho": [-0.1, 0, 1e18, math.inf, math.nan],
    "eta": [-1e-9, 1e18, math.inf, math.nan],
    "normalization": ["rowwise"],
    "p": [1, 0.5, -math.inf, math.nan],
    "bias": ["free"],
    "perturb": ["biases"],
    "every": [0],
    "ascent_share": [0.0, -0.5, 1.5, math.nan],
    "exact": [-0.1, 1.1, math.nan],
    "momentum_rho": [-1, 1e18, math.inf, math.nan],
    "memory": ["none"],
    "decay": [-0.1, 1, math.nan],
    "optimizer": ["rmsprop"],
    "lr": [0, -1, 1e18, math.inf, math.nan],
    "momentum": [-0.1, 1, math.nan],
    "beta2": [-0.1, 1, math.nan],
    "weight_decay": [-1, 1e18, math.inf, math.nan],
    "clip": [-1, 1e18, math.inf, math.nan],
    "schedule": ["step"],
    "warmup": [-1],
    "epochs": [0],
    "batch_size": [0],
    "label_smoothing": [-0.1, 1, math.nan],
    "dataset": ["mnist"],
    "data_dir": [],
    "train_size": [0],
    "image_size": [0],
    "test_size": [0],
    "noise": [-0.1, 1, math.nan],
    "augment": [],
    "model": [],
    "dropout": [-0.1, 1, math.nan],
    "scale": [0, -1, 1e18, math.inf, math.nan],
    "evaluate_every": [0],
    "device": [],
    "parallel": ["dp"],
    "precision": ["float64"],
}
GOOD = {"rho": 1.0}


def refusal(values):
    with pytest.raises(InputError) as caught:
        as_run(GOOD | values, "here")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_field_is_named_here_and_says_what_it_is():
    assert list(BAD) == [item.name for item in fields(Run)]
    assert all(len(item.metadata["help"]) > 4 and item.metadata["help"][-1] == "." for item in fields(Run))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_value_that_cannot_be(name, value):
    message = refusal({name: value})
    assert name in message
    assert f"got {value!r}" in message


def test_the_largest_and_smallest_values_that_can_be():
    edges = {"seed": 2**63 - 1, "p": math.inf, "eta": 0.0, "momentum": 0.0, "clip": 0.0, "noise": 0.0, "epochs": 1}
    edges |= {"lr": 9.9e17}
    assert asdict(as_run(GOOD | edges, "here")) == asdict(Run(rho=1.0)) | edges
    assert as_run({"method": "sgd"}, "here").rho == 0


@pytest.mark.parametrize("item", fields(Run), ids=lambda item: item.name)
def test_a_value_of_another_type(item):
    wrong = {str: [1, True], int: [True, 1.0, "1", None], float: [True, "1", None], bool: [1, "yes", None]}
    wrong |= {str | None: [1, False], int | None: [True, 1.5, "1"]}
    for value in [*wrong[item.type], [1], {"a": 1}]:
        assert refusal({item.name: value}) == f"here: {item.name} has a wrong type, {value!r}"


def test_a_whole_number_will_do_for_a_float():
    assert as_run({"rho": 1, "lr": 1}, "here") == Run(rho=1.0, lr=1.0)


def test_a_name_that_a_run_does_not_have():
    message = refusal({"learning_rate": 0.1})
    assert message.startswith("here: a run has no 'learning_rate'; it has method, seed, rho")
    assert all(item.name in message for item in fields(Run))


EVERYTHING = Run(
    "sam", 3, 0.1, 0.02, "none", math.inf, "fixed", "norm", optimizer="adamw", lr=0.01, train_size=7, augment=True
)


def test_a_run_stored_as_json_is_read_back_equal(tmp_path):
    path = tmp_path / "run.json"
    for run in (EVERYTHING, Run(rho=1.0), Run("sgd", data_dir="a folder")):
        path.write_text(json.dumps(asdict(run)))
        assert as_run(read_run(path), str(path)) == run
        path.write_text(json.dumps({"run": asdict(run), "outcome": {"test_error": 1.0}}))  # what asam train leaves
        assert as_run(read_run(path), str(path)) == run


def test_a_number_that_json_does_not_have():
    assert as_run({"p": "inf", "rho": 0.1, "data_dir": "inf"}, "here") == Run(p=math.inf, rho=0.1, data_dir="inf")
    with pytest.raises(InputError, match="here: p has a wrong type, 'infinite'"):
        as_run({"p": "infinite"}, "here")
    with pytest.raises(InputError, match="rho must be a number >= 0 and < 1e\\+18, got inf"):
        as_run({"rho": "inf"}, "here")


def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = "sam"  # the plain one\nrho = 0.1\np = inf\naugment = true\ntrain_size = 7\n')
    expected = Run("sam", rho=0.1, p=math.inf, augment=True, train_size=7)
    assert as_run(read_run(path), str(path)) == expected
    path.write_text(f"[run]\n{path.read_text()}")
    assert as_run(read_run(path), str(path)) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.toml", b"rho = ", "a.toml is neither TOML nor JSON: "),
        ("a.toml", b'{"rho": 1}', "a.toml is neither TOML nor JSON: "),
        ("a.json", b"", "a.json is neither TOML nor JSON: "),
        ("a.json", b'{"rho": 1', "a.json is neither TOML nor JSON: "),
        ("a.json", b"rho = 1", "a.json is neither TOML nor JSON: "),
        ("a.json", b"\xff\xfe", "a.json is neither TOML nor JSON: "),
        ("a.json", b"[1, 2]", "a.json must hold the names and values of a run"),
        ("a.json", b'{"run": 3}', "a.json must hold the names and values of a run"),
        ("a.json", None, "a.json: No such file or directory"),
        ("", None, ": Is a directory"),
    ],
)
def test_a_file_that_is_broken(tmp_path, file, content, message):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_run(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_passes_and_changes():
    assert [Run(method).passes for method in ("sgd", "sam", "asam")] == [1, 2, 2]
    assert EVERYTHING.but(seed=4) == Run(**asdict(EVERYTHING) | {"seed": 4})


@pytest.mark.parametrize("method", ["sgd", "economical"])
@pytest.mark.parametrize(("name", "value"), [("every", 5), ("ascent_share", 0.25)])
def test_what_only_sam_and_asam_do_is_refused_elsewhere(method, name, value):
    assert f"{name} goes with sam and asam, not with {method}" in refusal({"method": method, name: value})
    assert getattr(as_run(GOOD | {"method": "asam", name: value}, "here"), name) == value


def test_economical_runs_are_not_sharded_with_a_memory_of_their_own():
    run = {"method": "economical", "parallel": "fsdp"}
    assert "needs memory optimizer" in refusal(run)
    assert as_run(GOOD | run | {"memory": "optimizer"}, "here").parallel == "fsdp"
