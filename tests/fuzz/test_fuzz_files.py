"""Files of any content, as configurations, runs and checkpoints, are read or refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzzing import OPTIONS, WILD_NUMBERS, WILD_TEXTS, damaged, ends_well, wild_values
from hypothesis import given, settings
from hypothesis import strategies as st

from asam.experiments import sessions
from asam.experiments.run import Run, as_run
from asam.experiments.training import Training

SMALL = {"epochs": 1, "train_size": 100, "test_size": 10, "rho": 0.5}
QUICK = ["--steps=1", "--samples=2", "--eigenvalues=1", "--examples=50", "--rho=0.1", "--adaptive-rho=0.5"]
FIELDS = sorted({*Run.__dataclass_fields__} - {"data_dir", "dataset", "model", "epochs"})  # those may take long


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run, and its checkpoint half way."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.toml").write_text("\n".join(f"{name} = {value}" for name, value in SMALL.items()))
    assert ends_well("train", "--config", str(folder / "run.toml"), "--out", str(folder / "out")) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def unfinished(finished, tmp_path_factory):
    """A folder whose run was stopped between two epochs."""

    def stop(step, steps):
        if step == 3:
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped") / "out"
    run = as_run({**SMALL, "epochs": 2}, "here")
    with pytest.raises(KeyboardInterrupt):
        sessions.execute(run, folder, checkpoint_every=1, progress=stop)
    assert Training(run).steps == 4
    assert (folder / "checkpoint.pt").exists()
    return folder


def check_configuration(folder, content, suffix):
    file = folder / f"run.{suffix}"
    file.write_bytes(content)
    ends_well("train", "--config", str(file), "--out", str(folder / "out"), "--force", "--json")


@st.composite
def configurations(draw):
    """The bytes of a file of values, some of which are of another type or size."""
    values = dict(SMALL)
    for name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        choices = Run.__dataclass_fields__[name].metadata["choices"]
        meant = st.sampled_from(choices) if choices else st.sampled_from([1, 0.5, 2, True])
        values[name] = draw(st.one_of(meant, st.sampled_from(WILD_NUMBERS), st.sampled_from(WILD_TEXTS), wild_values()))
    content = json.dumps({"run": values} if draw(st.booleans()) else values).encode()
    return damaged(draw, content) if not draw(st.integers(0, 3)) else content


@given(content=configurations())
@settings(OPTIONS, max_examples=10)
def test_configurations(tmp_path, content):
    check_configuration(tmp_path, content, "json")


@pytest.mark.slow
@given(content=configurations())
@settings(OPTIONS, max_examples=300)
def test_many_configurations(tmp_path, content):
    check_configuration(tmp_path, content, "json")


@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode(errors="replace"))))
@settings(OPTIONS, max_examples=30)
def test_any_bytes_as_a_configuration(tmp_path, content):
    for suffix in ("toml", "json"):
        check_configuration(tmp_path, content + b"\x00", suffix)  # never an empty file, which is a run as it is


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "a = " + "[" * 100_000, "9" * 5000])
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_deep_and_long_configurations(content, suffix, tmp_path):
    check_configuration(tmp_path, content.encode(), suffix)


def check_run(draw, finished, folder):
    """Measure a run one of whose files is damaged, or holds something else."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    if draw(st.booleans()):
        (folder / "run.pt").write_bytes(damaged(draw, (folder / "run.pt").read_bytes()))
    elif draw(st.booleans()):
        torch.save(draw(states()), folder / "run.pt")
    else:
        found = json.loads((folder / "run.json").read_text())
        if draw(st.booleans()):
            found["run"] = {**found["run"], **SMALL, draw(st.sampled_from(FIELDS)): draw(wild_values())}
        else:
            found[draw(st.sampled_from([*found]))] = draw(wild_values())
        content = json.dumps(found).encode()
        (folder / "run.json").write_bytes(damaged(draw, content) if draw(st.booleans()) else content)
    ends_well("measure", str(folder / "run"), *QUICK, "--json")


def states():
    """What torch can save and load without running code, of any shape."""
    tensors = st.sampled_from(
        [
            torch.zeros(()),
            torch.full((3, 64), float("nan")),
            torch.zeros(64, 64, dtype=torch.complex64),
            torch.zeros(2, dtype=torch.int8),
        ]
    )
    leaves = st.one_of(tensors, st.none(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3))
    names = st.sampled_from(["0.weight", "run", "state", "model", "state_dict", "random", ""]) | st.integers()
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))


@given(data=st.data())
@settings(OPTIONS, max_examples=8)
def test_runs(finished, tmp_path, data):
    check_run(data.draw, finished, tmp_path)


@pytest.mark.slow
@given(data=st.data())
@settings(OPTIONS, max_examples=300)
def test_many_runs(finished, tmp_path, data):
    check_run(data.draw, finished, tmp_path)


def check_resumption(draw, unfinished, folder):
    """Go on with a run one of whose files is damaged, or holds something else."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(unfinished, folder)
    name = draw(st.sampled_from(["checkpoint.pt", "config.json", "metrics.jsonl", "state"]))
    if name == "state":
        found = torch.load(folder / "checkpoint.pt", weights_only=True)
        place = found["state"]
        key = draw(st.sampled_from([*place]))
        if key == "network" and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from([*place]))
        if draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(states())
        torch.save(found, folder / "checkpoint.pt")
    else:
        (folder / name).write_bytes(damaged(draw, (folder / name).read_bytes()))
    ends_well("train", "--config", str(unfinished / "config.json"), "--out", str(folder), "--json")


@given(data=st.data())
@settings(OPTIONS, max_examples=8)
def test_resumptions(unfinished, tmp_path, data):
    check_resumption(data.draw, unfinished, tmp_path / "out")


@pytest.mark.slow
@given(data=st.data())
@settings(OPTIONS, max_examples=400)
def test_many_resumptions(unfinished, tmp_path, data):
    check_resumption(data.draw, unfinished, tmp_path / "out")


@pytest.mark.slow
def test_what_reaches_new_code(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed")
    script = Path(__file__).with_name("coverage_guided.py")
    command = [sys.executable, str(script), "-max_total_time=30", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr
