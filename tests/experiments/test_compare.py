"""The comparison as a user meets it: the command, its files, its refusals, killed and started again."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import pytest

from asam.experiments import compare, report
from asam.experiments.cli import run
from asam.experiments.run import Run

SMALL = ["--seeds", "2", "--epochs", "2"]


def program(*arguments, **options) -> subprocess.Popen:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "asam", "compare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["asam", "compare", *SMALL, "--workers", "1", "--json", "--out", str(out)])
        assert run() == 0
    assert json.loads(printed.getvalue()) == json.loads((out / "results.json").read_text())
    return out


def test_results_hold_every_method_and_seed(finished):
    found = json.loads((finished / "results.json").read_text())
    assert {"SGD", "SGD, twice the epochs", "SAM", "ASAM"} <= set(found["methods"])
    assert all(len(method["test_error"]) == 2 for method in found["methods"].values())
    assert len(found["methods"]["SGD, twice the epochs"]["curves"]["test_error"][0]) == 4
    assert {label: [len(row) for row in rows] for label, rows in found["transfer"]["test_error"].items()} == {
        label: [2] * 5 for label in ("SGD", "SAM", "ASAM")
    }
    assert {"hardware", "torch", "command"} <= set(found["environment"])


def test_page_is_self_contained_and_holds_every_plot(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert not [word for word in page.split() if word.startswith(('src="http', 'href="http'))]


@pytest.mark.parametrize(("number", "said"), [(1, "1 seed, 1 epoch;"), (2, "2 seeds, 2 epochs;")])
def test_page_counts_seeds_and_epochs(finished, number, said):
    found = json.loads((finished / "results.json").read_text())
    found["comparison"].update(seeds=number, epochs=number)
    assert said in report.page(found)


def test_page_speaks_of_noisy_labels_where_there_are_any(finished):
    found = json.loads((finished / "results.json").read_text())
    assert "training labels are noisy" in report.page(found)
    found["comparison"]["noise"] = 0.0
    assert "noisy" not in report.page(found).partition("How to read this")[2].replace("noisy labels, initial", "")


def test_finished_comparison_is_not_overwritten(asam, finished):
    before = (finished / "results.json").stat().st_mtime_ns
    done = asam("compare", *SMALL, "--out", finished)
    assert (done.code, len(done.said)) == (2, 1)
    assert "--force" in done.said[0]
    assert (finished / "results.json").stat().st_mtime_ns == before


DAMAGED = ["", "{}", "[" * 10**5, '{"outcome": {}}', '{"outcome": {"curves": 1}}']


@pytest.mark.parametrize(
    "content", [*DAMAGED, '{"outcome": OUTCOME, "test_error": "1"}}', '{"outcome": OUTCOME, "curves": []}}']
)
def test_a_run_that_is_damaged(asam, finished, tmp_path, content):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    run = tmp_path / "out" / "runs" / "asam-x1-seed0.json"
    outcome = json.dumps(json.loads(run.read_text())["outcome"])
    run.write_text(content.replace("OUTCOME", outcome[:-1]))
    done = asam("compare", *SMALL, "--workers", 1, "--out", "out")
    assert (done.code, len(done.said)) == (2, 1)
    assert "out/runs/asam-x1-seed0.json cannot be read (" in done.said[0]
    assert done.said[0].endswith("): start again with --force")


@pytest.mark.parametrize("content", ["", "{", "[" * 10**5])
def test_a_configuration_that_is_damaged(asam, finished, tmp_path, content):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(content)
    for option in [], ["--force"]:  # no advice that leads to another refusal
        done = asam("compare", *SMALL, "--out", "out", *option)
        assert (done.code, len(done.said)) == (2, 1)
        assert done.said[0].endswith(": choose another --out")
    assert (tmp_path / "out" / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_foreign_folder_is_not_touched(asam, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert asam("compare", *SMALL, "--out", tmp_path).code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_an_interrupt_does_not_wait_for_long_runs(tmp_path):
    out = tmp_path / "out"
    process = program("--seeds", "1", "--epochs", "100000", "--workers", "2", "--out", out)
    deadline = time.monotonic() + 90
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3:  # the workers, and what tracks their resources
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "asam: interrupted; the same command goes on from here"
    assert "Traceback" not in said


def test_an_interrupt_with_force_goes_on_without(asam, monkeypatch):
    monkeypatch.setattr(compare, "execute", Mock(side_effect=KeyboardInterrupt))
    done = asam("compare", *SMALL, "--force")
    assert done.code == 130
    assert done.said == ["asam: interrupted; the same command without --force goes on from here"]


@pytest.mark.slow
def test_interrupted_and_killed_it_goes_on_to_the_same_results(asam, finished, tmp_path):
    out = tmp_path / "out"

    def runs():
        return {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}

    def stopped(number, count, workers):
        """A signal as soon as so many runs are finished; the exit code, and what was said until the workers ended."""
        process = program(*SMALL, "--workers", workers, "--out", out)
        deadline = time.monotonic() + 90
        while len(runs()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    code, said = stopped(signal.SIGINT, 1, workers=1)
    assert code == 130
    assert said.splitlines()[-1] == "asam: interrupted; the same command goes on from here"
    assert "Traceback" not in said
    interrupted = runs()
    assert 1 <= len(interrupted) < 30

    assert stopped(signal.SIGKILL, len(interrupted) + 2, workers=2)[0] == -signal.SIGKILL
    killed = runs()
    assert len(interrupted) + 2 <= len(killed) < 34
    assert interrupted.items() <= killed.items()

    assert asam("compare", *SMALL, "--workers", 1, "--out", out).code == 0
    assert killed.items() <= runs().items()
    assert runs().keys() == {path.name for path in (finished / "runs").glob("*.json")}
    assert len(runs()) == 34
    assert not list((out / "runs").glob("*.part"))
    again, first = (json.loads((folder / "results.json").read_text()) for folder in (out, finished))
    assert again["transfer"] == first["transfer"]
    assert again["differences"] == first["differences"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "99999999999"], "--seeds"),
        (["--epochs", "x"], "--epochs"),
        (["--epochs", "99999999999999999999"], "--epochs"),
        (["--workers", "99999999999"], "--workers"),
        (["--noise", "1.5"], "--noise"),
        (["--rho-asam", "nan"], "--rho-asam"),
        (["--rho-sam", "-1"], "--rho-sam"),
        (["--rho-sam", "1e39"], "--rho-sam must be a number > 0 and < 1e+18, got 1e+39"),
        (["--dataset", "cifar"], "--dataset"),
        (["--dataset", "fashion-mnist", "--data-dir", "/nowhere"], "/nowhere"),
        (["--data-dir", "/nowhere"], "digits come with scikit-learn: leave --data-dir out"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(asam, arguments, says, tmp_path):
    done = asam("compare", *arguments)
    assert (done.code, done.out, len(done.said)) == (2, "", 1)
    assert says in done.said[0]
    assert list(tmp_path.iterdir()) == []


def test_bad_input_as_a_shell_sees_it(tmp_path):
    process = program("--noise", "1.5", cwd=tmp_path)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_help_fits_80_columns(asam, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    done = asam("compare", "--help")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert "--rho-asam" in done.out


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 420])
def test_page_in_a_browser(finished, browser, width):
    page = browser(finished / "report.html", width)
    assert page.get_log("browser") == []
    sizes = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => {"
        "const b = s.getBoundingClientRect(); return [b.width, b.height, s.querySelectorAll('path,use').length]})"
    )
    assert len(sizes) == 3
    assert all(w > 300 and h > 100 and shapes > 50 for w, h, shapes in sizes)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    overflowing = page.execute_script(
        "return [...document.querySelectorAll('h1,h2,p,li,figcaption,td,th,code')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline')"
        ".map(e => e.textContent)"
    )
    assert overflowing == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asam.experiments.files.os.fsync", full)
    with pytest.raises(OSError, match=r"sgd\.pt"):
        compare._one(Run("sgd", epochs=1), tmp_path / "sgd")
    assert not list(tmp_path.iterdir())
