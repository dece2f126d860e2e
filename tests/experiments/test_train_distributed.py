"""``asam train`` on two processes that torchrun starts, against one; killed and started again; refused.

A launch by torchrun takes about ten seconds.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import launch

from asam.experiments import InputError, distributed

# 500 digits: 5 steps an epoch, 10 in all
QUICK = ["--rho", "0.5", "--epochs", "2", "--batch-size", "100"]
FINISHED = ["config.json", "metrics.jsonl", "run.json", "run.pt", "tensorboard"]


def launched(folder, *arguments, processes=2):
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "asam", "train", *QUICK, *arguments]
    return subprocess.Popen(
        [*command, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(folder, *arguments, processes=2):
    process = launched(folder, *arguments, processes=processes)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("Written:") == out.count('"method"') == 1  # by the first process alone
    assert sorted(path.name for path in folder.iterdir()) == FINISHED
    found = json.loads((folder / "run.json").read_text())
    assert found["processes"] == processes
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert len(list((folder / "tensorboard").iterdir())) == 1
    del found["outcome"]["seconds_per_step"]
    return torch.load(folder / "run.pt", weights_only=True), found["outcome"]


def killed(folder, *arguments):
    """Killed as soon as there is a checkpoint, all processes at once."""
    process = launched(folder, *arguments, "--checkpoint-every", "1")
    deadline = time.monotonic() + 240
    while not (folder / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    stopped = workers(process.pid)
    for pid in (process.pid, *stopped):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(stopped) == 2
    assert not (folder / "run.json").exists()


def workers(pid):
    """torchrun gives each of its processes a session of its own."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("alone") / "out", processes=1)


@pytest.mark.slow
def test_fsdp_is_the_single_process_and_a_kill_does_not_change_it(alone, tmp_path):
    options = ["--parallel", "fsdp", "--checkpoint-every", "1"]
    weights, outcome = finished(tmp_path / "whole", *options)
    assert weights.keys() == alone[0].keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, alone[0][name], rtol=1e-4, atol=1e-4)
    assert outcome["train_error"] == pytest.approx(alone[1]["train_error"], abs=0.5)
    killed(tmp_path / "killed", "--parallel", "fsdp")
    again, outcome_again = finished(tmp_path / "killed", *options)
    assert outcome_again == outcome
    for name in weights:
        assert torch.equal(again[name], weights[name]), name


@pytest.mark.slow
def test_ddp_is_another_ascent_and_a_kill_does_not_change_it(alone, tmp_path):
    options = ["--model", "cnn", "--augment", "--checkpoint-every", "1"]
    weights, outcome = finished(tmp_path / "whole", *options)
    killed(tmp_path / "killed", "--model", "cnn", "--augment")
    again, outcome_again = finished(tmp_path / "killed", *options)
    assert outcome_again == outcome
    for name in weights:
        assert torch.equal(again[name], weights[name]), name


@pytest.mark.slow
def test_what_one_process_refuses_is_said_once(tmp_path):
    process = launched(tmp_path / "out", "--batch-size", "99")
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if "asam: " in line]
    assert len(said) == 1, err
    assert "asam: batch_size must be a multiple of the 2 processes, got 99" in said[0]
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    process = launched(tmp_path / "out")  # the first process alone claims the folder
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if "asam: " in line]
    assert len(said) == 1, err
    assert "holds another configuration or other files" in said[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def no_process_leaves_before_a_refusal_is_said(rank):
    place, said = distributed.Place(torch.device("cpu"), rank, 2), []

    def slowly(message):
        time.sleep(0.5)
        said.append((message, time.monotonic()))

    distributed.last_words = slowly

    def refuse():
        if rank == 1:
            raise InputError("no")

    with pytest.raises(SystemExit, match="2"), distributed.agreed(place):
        refuse()
    left = distributed.from_all(time.monotonic(), place)
    by_first, by_second = distributed.from_all(said, place)
    assert not by_first
    assert [message for message, _ in by_second] == ["no"]
    assert by_second[0][1] <= min(left)


def test_a_refusal_is_said_first(tmp_path):
    launch(tmp_path, 2, no_process_leaves_before_a_refusal_is_said)
