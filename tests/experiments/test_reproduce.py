"""``asam reproduce`` as a user meets it: files, refusals, no disk left, interrupted, killed and started again."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_study

from asam.experiments import database, files

FILES = ["config.json", "data.json", "report.html", "results.jsonl", "squares.svg", "summary.json", "table.md"]
TOTAL = sum(number**2 for number in range(6)) + 25**2


@pytest.fixture
def asam(asam, monkeypatch):
    """The command with the small study in it."""
    monkeypatch.setitem(sys.modules, "asam.experiments.studies.toy", SimpleNamespace(STUDY=small_study.STUDY))
    return lambda *arguments, workers=1: asam("reproduce", *arguments, "--workers", workers)


def program(*arguments, **options):
    """The command line in a process of its own, whose workers it starts."""
    command = [sys.executable, small_study.__file__, "reproduce", "toy", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def performed(log):
    path = log / "performed"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def summary(folder):
    found = json.loads((folder / "summary.json").read_text())
    return [item["estimate"] for item in found["findings"]], found["runs"], found["files"]


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def test_two_workers_do_both_stages_once_and_write_the_results(asam, log, tmp_path):
    done = asam("toy", "--quick", "--data-dir", "log", "--out", "out", workers=2)
    assert (done.code, done.said) == (0, [])
    assert "Squares are positive: reproduces at this scale" in done.out
    assert performed(log) == [0, 1, 2, 3, 4, 5, 25]
    out = tmp_path / "out"
    assert sorted(contents(out)) == FILES
    assert summary(out) == ([TOTAL], 7, ["squares.svg", "data.json"])
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {record["name"]: record["outcome"]["square"] for record in records} == {
        **{f"square-{number}": number**2 for number in range(6)},
        "best-25": 625,
    }
    assert "Squares are positive" in (out / "table.md").read_text()


def test_finished_results_stay_without_force_which_removes_ours_only(asam, tmp_path):
    out = tmp_path / "out"
    assert asam("toy", "--quick", "--out", "out").code == 0
    (out / "thesis.txt").write_text("mine")
    (out / "drawing.svg").write_text("mine")
    before = contents(out)
    done = asam("toy", "--quick", "--out", "out")
    assert (done.code, len(done.said)) == (2, 1)
    assert "--force" in done.said[0]
    assert contents(out) == before
    done = asam("toy", "--quick", "--seeds", "2", "--out", "out")
    assert (done.code, len(done.said)) == (2, 1)
    assert "another configuration" in done.said[0]
    assert contents(out) == before
    assert asam("toy", "--quick", "--seeds", "2", "--out", "out", "--force").code == 0
    assert summary(out)[1] == 3
    assert sorted(contents(out)) == sorted([*FILES, "thesis.txt", "drawing.svg"])
    assert (out / "drawing.svg").read_text() == (out / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("file", ["report.html", "drawing.svg"])
@pytest.mark.parametrize("config", [None, '{"hidden_size": 768}', "// no JSON"])
def test_force_leaves_the_files_of_something_else(asam, tmp_path, config, file):
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_text("mine")
    if config:
        (out / "config.json").write_text(config)
    before = contents(out)
    done = asam("toy", "--quick", "--out", "out", "--force")
    assert (done.code, len(done.said)) == (2, 1)
    assert "is of something else" in done.said[0]
    assert contents(out) == before


def test_a_storage_that_cannot_be_used_costs_no_results(asam, tmp_path):
    assert asam("toy", "--quick", "--out", "out").code == 0
    before = contents(tmp_path / "out")
    done = asam("toy", "--quick", "--out", "out", "--force", "--storage", "sqlite:////nowhere/runs.sqlite3")
    assert (done.code, len(done.said)) == (2, 1)
    assert contents(tmp_path / "out") == before


def test_the_storage_is_kept_and_its_url_not_written(asam, log, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    for out in ("one", "two"):
        assert asam("toy", "--quick", "--data-dir", "log", "--storage", url, "--out", out).code == 0
    assert performed(log) == [0, 1, 2, 3, 4, 5, 25]  # the second command found them done
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one["results.jsonl"] == two["results.jsonl"]
    assert sorted(one) == sorted(two) == FILES
    assert not [name for name, content in one.items() if url.encode() in content]
    assert "--storage URL" in (tmp_path / "one" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "no study nonsense"),
        (["toy", "--quick", "--paper"], "exclude each other"),
        (["toy", "--paper"], "no --paper: it has quick, laptop"),
        (["toy", "--quick", "--data-dir", "nowhere"], "nowhere is no folder"),
        (["toy", "--quick", "--seeds", "0"], "--seeds"),
        (["toy", "--quick", "--storage", "nonsense"], "no database URL"),
        (["toy", "--quick", "--storage", "nosql://user:secret@host/name"], "cannot be opened"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(asam, tmp_path, arguments, says):
    done = asam(*arguments)
    assert (done.code, done.out, len(done.said)) == (2, "", 1)
    assert says in done.said[0]
    assert "secret" not in done.said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("out", "says"), [("file", "file is a file"), ("file/out", "Not a directory")])
def test_out_is_a_file(asam, tmp_path, out, says):
    (tmp_path / "file").write_text("mine")
    done = asam("toy", "--quick", "--out", out)
    assert (done.code, len(done.said)) == (2, 1)
    assert says in done.said[0]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("full", ["config.json", "results.jsonl", "squares.svg", "summary.json"])
def test_no_space_left_for_a_file(asam, log, tmp_path, monkeypatch, full):
    out, replace = tmp_path / "out", os.replace
    out.mkdir()

    def refuse(source, target):
        if Path(target).name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        done = asam("toy", "--quick", "--data-dir", "log", "--out", "out")
    assert (done.code, done.said) == (2, [f"asam: out/{full}: No space left on device"])
    assert full not in contents(out)
    assert "summary.json" not in contents(out)
    assert not [name for name in contents(out) if name.endswith(".part")]
    assert asam("toy", "--quick", "--data-dir", "log", "--out", "out").code == 0
    assert sorted(contents(out)) == FILES
    assert performed(log) == [0, 1, 2, 3, 4, 5, 25]


def test_no_space_left_for_the_database(asam, log, tmp_path):
    arguments = ("toy", "--quick", "--data-dir", "log", "--seeds", "60", "--out", "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # the tables fit, the runs do not
    try:
        done = asam(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (done.code, len(done.said)) == (2, 1)
    assert done.said[0].startswith(f"asam: the storage sqlite:///{tmp_path}/out/runs.sqlite3: ")
    assert done.said[0].endswith("the same command goes on")
    assert {name.removesuffix("-wal").removesuffix("-shm") for name in contents(tmp_path / "out")} == {
        "config.json",
        "runs.sqlite3",
    }
    assert 0 < len(performed(log)) < 61
    assert asam(*arguments).code == 0
    assert sorted(contents(tmp_path / "out")) == FILES
    assert summary(tmp_path / "out")[1] == 61
    assert len(performed(log)) <= 61 + 1  # at most the run that could not be written was done again


@pytest.mark.slow
def test_interrupted_and_killed_it_goes_on_to_the_same_summary(asam, log, tmp_path, monkeypatch):
    arguments = ("--data-dir", log, "--out", tmp_path / "out", "--workers", 2)
    first = program(*arguments, start_new_session=True)
    until(lambda: len(performed(log)) >= 3)
    os.killpg(first.pid, signal.SIGINT)  # as the terminal does: the workers get it too
    out, said = first.communicate(timeout=60)
    assert (first.returncode, out) == (130, "")
    assert said.splitlines()[-1] == "asam: interrupted; the same command goes on from here"
    assert "Traceback" not in said

    interrupted = len(performed(log))
    second = program(*arguments, start_new_session=True)
    until(lambda: len(performed(log)) > interrupted)
    os.kill(second.pid, signal.SIGKILL)
    second.communicate(timeout=60)  # the pipes close when the workers have ended too

    monkeypatch.setattr(database, "GRACE", 3)  # as in the program
    monkeypatch.setattr(database, "HEARTBEAT", 1)
    done = asam("toy", *arguments[:-2])
    assert (done.code, done.said) == (0, [])
    assert summary(tmp_path / "out") == ([TOTAL], 7, ["squares.svg", "data.json"])
    assert sorted(contents(tmp_path / "out")) == FILES
    assert set(performed(log)) == {0, 1, 2, 3, 4, 5, 25}
    assert len(performed(log)) <= 7 + 2 * 2  # what the workers had in hand


STARTS = """
import multiprocessing, signal, sys

def blocked():
    sys.exit(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    from asam.experiments.processes import interrupts_held_back
    process = multiprocessing.get_context("spawn").Process(target=blocked)
    with interrupts_held_back():
        process.start()
    process.join()
    sys.exit(process.exitcode != 1 or signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


@pytest.mark.slow
def test_an_interrupt_does_not_reach_a_worker_that_is_starting(tmp_path):
    (tmp_path / "starts.py").write_text(STARTS)
    assert subprocess.run([sys.executable, tmp_path / "starts.py"]).returncode == 0


def test_a_run_that_fails_ends_the_command_with_the_workers_traceback(asam, log):
    (log / "fail").touch()
    with pytest.raises(RuntimeError, match=r"UnportableError: run \d: asked to fail") as raised:
        asam("toy", "--quick", "--data-dir", "log", "--out", "out", workers=2)
    assert "in perform" in raised.value.__notes__[0]
    (log / "fail").unlink()
    started = time.monotonic()
    assert asam("toy", "--quick", "--data-dir", "log", "--out", "out").code == 0
    assert time.monotonic() - started < 10  # the runs were put down and need not go stale


def test_workers_that_were_killed_are_told_from_a_study_that_ended(asam, log):
    (log / "kill").touch()
    done = asam("toy", "--quick", "--data-dir", "log", "--out", "out", workers=2)
    assert (done.code, len(done.said)) == (2, 1)
    assert "worker processes were killed" in done.said[0]
