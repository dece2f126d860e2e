"""The comparison as a user meets it: the command, its files, its refusals, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ["--seeds", "2", "--epochs", "2"]


def asam(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "asam", *arguments], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    done = asam("compare", *SMALL, "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "results.json").read_text())
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


def test_runs_are_the_same_again(finished, tmp_path):
    asam("compare", *SMALL, "--workers", "1", "--out", str(tmp_path / "again"))
    first, again = (json.loads((p / "results.json").read_text()) for p in (finished, tmp_path / "again"))
    assert first["transfer"] == again["transfer"]
    assert first["differences"] == again["differences"]


def test_page_is_self_contained_and_holds_every_plot(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert not [word for word in page.split() if word.startswith(('src="http', 'href="http'))]


def test_finished_comparison_is_not_overwritten(finished):
    before = (finished / "results.json").stat().st_mtime_ns
    done = asam("compare", *SMALL, "--out", str(finished))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--force" in done.stderr
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = asam("compare", *SMALL, "--out", str(tmp_path))
    assert done.returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_killed_and_started_again_does_not_repeat_finished_runs(tmp_path):
    command = [sys.executable, "-m", "asam", "compare", "--seeds", "2", "--epochs", "8", "--out", str(tmp_path / "o")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "o" / "runs"
    deadline = time.monotonic() + 90
    while len(list(runs.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # the workers end with their parent
    finished = {p: p.stat().st_mtime_ns for p in runs.glob("*.json")}
    assert 4 <= len(finished) < 34
    done = asam(*command[3:])
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert len(list(runs.glob("*.json"))) == 34
    assert not list(runs.glob("*.part"))


def test_interrupt_ends_it_in_one_line_and_keeps_the_finished_runs(tmp_path):
    command = [sys.executable, "-m", "asam", "compare", "--epochs", "10", "--out", str(tmp_path / "o")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "o" / "runs").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("asam: interrupted")
    assert "Traceback" not in said
    assert 1 <= len(list((tmp_path / "o" / "runs").glob("*.json"))) < 170


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--epochs", "x"], "--epochs"),
        (["--noise", "1.5"], "--noise"),
        (["--rho-asam", "nan"], "--rho-asam"),
        (["--rho-sam", "-1"], "--rho-sam"),
        (["--dataset", "cifar"], "--dataset"),
        (["--dataset", "fashion-mnist", "--data-dir", "/nowhere"], "/nowhere"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(arguments, says, tmp_path):
    done = asam("compare", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_fits_80_columns():
    done = asam("compare", "--help", env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "--rho-asam" in done.stdout


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
