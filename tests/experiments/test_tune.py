"""``asam tune`` as a user meets it: on a function of their own, on a run's file, killed, shared, with what is wrong."""

import json
import math
import os
import subprocess
import sys
import time
from statistics import fmean
from types import SimpleNamespace

import optuna
import pytest
from optuna.exceptions import StorageInternalError

from asam.experiments import InputError, search, tuning
from asam.experiments.cli import run as command_line

OWN = """
import math, os, sys, time
from pathlib import Path
from torch import nn

def values(asam):
    made = asam(nn.Linear(2, 1))
    return made.rho, made.geometry.eta, made.geometry.bias

def note(asam, seed):
    rho, eta, bias = values(asam)
    with open("calls", "a") as file:  # one write: whole lines, of several processes too
        file.write(f"{seed} {rho!r} {eta!r} {bias} {os.getpid()}\\n")
    return rho

def quiet(asam, seed, report):
    # best at 1 by the seed of the search, at 2 by all others
    rho = note(asam, seed)
    print("chatter")
    for epoch in range(4):
        report(abs(math.log(rho / (2 if seed else 1))) + 0.01 * seed)

def slow(asam, seed, report):
    time.sleep(0.2)
    quiet(asam, seed, report)

def killed(asam, seed, report):
    rho = values(asam)[0]
    if not Path("killed").exists() and (seed, rho) == eval(Path("kill").read_text()):
        Path("killed").touch()
        os.kill(os.getpid(), 9)
    quiet(asam, seed, report)

def silent(asam, seed, report):
    values(asam)

def without(asam, seed, report):
    report(1.0)

def raises(asam, seed, report):
    report(1.0)
    inner({})

def inner(labels):
    return labels["labels"]  # line 47

def value_error(asam, seed, report):
    raise ValueError("two\\nlines")

def gives_up(asam, seed, report):
    if values(asam)[0] > 2 or seed >= 1000:
        from optuna import TrialPruned
        raise TrialPruned
    quiet(asam, seed, report)

def exits(asam, seed, report):
    sys.exit(3)

class Unportable(Exception):
    def __init__(self, number, text):
        super().__init__(text)

def unportable(asam, seed, report):
    raise Unportable(1, "cannot be unpickled")

def refuses(asam, seed, report):
    asam(nn.Linear(2, 1), p=0.5)

def text(asam, seed, report):
    report("good")

def nan(asam, seed, report):
    values(asam)
    report(math.nan)

def nan_above(asam, seed, report):
    report(math.nan if values(asam)[0] > 1 else note(asam, seed))

def nan_afresh(asam, seed, report):
    values(asam)
    report(math.nan if seed else 1.0)

def raises_later(asam, seed, report):
    report(1.0 if values(asam)[0] < 1 else None)

def two(asam, seed):
    pass

number = 3
"""
STARTS = [0.2, 0.5, 1.0, 2.0, 3.0]


@pytest.fixture
def tune(monkeypatch, capsys, tmp_path):
    """The command line in an empty folder that holds the user's module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nowhere_at_all")
    sys.modules.pop("own", None)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["asam", "tune", *map(str, arguments)])
        code = command_line()
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if line.startswith("asam:") or "Traceback" in line]
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, said=said)

    yield command
    sys.modules.pop("own", None)


def program(*arguments):
    command = [sys.executable, "-m", "asam", "tune", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calls(folder):
    """Seed, rho, eta, bias and process of every training."""
    rows = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return [(int(seed), float(rho), float(eta), bias, int(pid)) for seed, rho, eta, bias, pid in rows]


def searched(folder):
    return [rho for seed, rho, *_ in calls(folder) if seed == 0]


def confirmed(folder):
    return sorted((rho, seed) for seed, rho, *_ in calls(folder) if seed)


def found(folder):
    return json.loads((folder / "tune.json").read_text())


def test_starts_come_first_and_fresh_seeds_decide(tune, tmp_path):
    # two trials are chance's: 1, 0.5 and 2 are among the best five whatever they are
    done = tune("own:quiet", "--trials", 7, "--confirmed", 5, "--out", "out")
    assert (done.code, done.said) == (0, [])
    assert searched(tmp_path)[:5] == STARTS
    assert len(searched(tmp_path)) == 7
    assert all(0.01 <= rho <= 20 for rho in searched(tmp_path))
    result = found(tmp_path / "out")
    assert [row["rho"] for row in result["trials"]] == searched(tmp_path)
    best_searched = min(result["trials"], key=lambda row: row["error"])
    assert abs(best_searched["rho"] - 1) < abs(result["best"]["rho"] - 1)  # the search's seed prefers another
    again = [row for row in result["trials"] if "mean" in row]
    assert len(again) == min(5, sum(not row["pruned"] for row in result["trials"]))
    assert confirmed(tmp_path) == sorted((row["rho"], seed) for row in again for seed in (1000, 1001, 1002))
    assert result["best"]["rho"] == min(again, key=lambda row: row["mean"])["rho"]
    assert result["best"] | {"rho": 0} == {"rho": 0, "eta": 0.01, "bias": "unscaled"}
    assert f"ASAM(model, rho={result['best']['rho']:.3g}, eta=0.01, bias='unscaled')" in done.out
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "config.json"] == ["tune.json"]
    for row in again:
        errors = [abs(math.log(row["rho"] / 2)) + 0.01 * seed for seed in (1000, 1001, 1002)]
        assert (row["mean"], row["sd"], row["n"]) == (pytest.approx(fmean(errors)), pytest.approx(0.01), 3)


def test_a_trial_that_falls_behind_is_stopped_but_not_at_its_first_report(tune, tmp_path):
    done = tune("own:quiet", "--trials", 8, "--out", "out")
    rows = found(tmp_path / "out")["trials"]
    stopped = [row for row in rows if row["pruned"]]
    assert 3.0 in [row["rho"] for row in stopped]  # the fifth, and the fourth best of four before it
    assert {row["reports"] for row in stopped} == {2}
    assert {row["reports"] for row in rows if not row["pruned"]} == {4}
    assert not any("mean" in row for row in stopped)
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("│")]) == 8  # a line a trial
    assert "2, stopped" in done.out
    assert "chatter" not in done.out
    assert "chatter" in done.err


def test_json_and_the_starts_of_a_task(tune, tmp_path):
    done = tune("own:quiet", "--like", "cifar10", "--trials", 2, "--confirmed", 1, "--seeds", 1, "--json")
    assert done.code == 0
    assert json.loads(done.out)["best"]["rho"] == 1.0
    assert searched(tmp_path) == [0.5, 1.0]
    assert confirmed(tmp_path) == [(1.0, 1000)]


def test_eta_and_bias_are_searched_from_where_the_starts_were_good(tune, tmp_path):
    arguments = ["own:quiet", "--trials", 8, "--confirmed", 1, "--seeds", 1, "--tune-eta", "--tune-bias"]
    assert tune(*arguments, "--out", "out").code == 0
    choices = [(eta, bias) for seed, _, eta, bias, _ in calls(tmp_path) if seed == 0]
    assert choices[:5] == [(0.01, "unscaled")] * 5
    assert len({eta for eta, _ in choices}) == 4
    assert all(1e-4 <= eta <= 0.1 for eta, _ in choices)


def test_a_function_that_ends_its_trial_itself(tune, tmp_path):
    done = tune("own:gives_up", "--trials", 5, "--confirmed", 1, "--seeds", 1)
    assert done.code == 2
    assert done.said[-1].endswith("no choice has a finite validation error from fresh seeds")


def test_trials_that_report_nothing_have_no_error():
    rows = [{"trial": i, "rho": 1.0, "eta": 0.01, "bias": "unscaled"} for i in range(3)]
    errors = (None, 0.0, 0.5)
    for row, error in zip(rows, errors, strict=True):
        row |= {"error": error, "pruned": False, "reports": 0}
    cells = tuning.terminal_table({"trials": rows, "search": {"seeds": 1}}).columns[3].cells
    assert list(cells) == ["0", "0.5", "-"]


def test_a_run_of_a_file(tune, tmp_path):
    (tmp_path / "a.toml").write_text('epochs = 2\neta = 0.02\nbias = "scaled"\nbatch_size = 100\nevaluate_every = 1\n')
    done = tune("a.toml", "--like", "cifar10", "--trials", 2, "--confirmed", 1, "--seeds", 1, "--out", "out")
    assert (done.code, done.said) == (0, [])
    result = found(tmp_path / "out")
    assert f"asam train --config a.toml --rho {result['best']['rho']:.3g} --eta 0.02 --bias scaled\n" in done.out
    assert [(row["rho"], row["eta"], row["bias"], row["reports"]) for row in result["trials"]] == [
        (0.5, 0.02, "scaled", 2),
        (1.0, 0.02, "scaled", 2),
    ]
    assert result["search"]["run"]["epochs"] == 2
    assert all(0 < row["error"] < 100 for row in result["trials"])
    (tmp_path / "a.toml").write_text("epochs = 3\n")  # another search: not what the folder holds
    done = tune("a.toml", "--like", "cifar10", "--trials", 2, "--confirmed", 1, "--seeds", 1, "--out", "out")
    assert "out holds another configuration" in done.said[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1001], ids=["search", "confirming"])
def test_killed_and_started_again_it_repeats_nothing_that_was_done(tune, tmp_path, monkeypatch, seed):
    monkeypatch.setattr("asam.experiments.database.GRACE", 3)
    (tmp_path / "kill").write_text(f"({seed}, 1.0)")
    arguments = ["own:killed", "--trials", 5, "--confirmed", 2, "--out", "out"]
    process = program(*arguments)
    process.communicate(timeout=120)
    assert process.returncode == -9
    before = calls(tmp_path)
    assert before
    assert tune(*arguments).code == 0
    assert calls(tmp_path)[: len(before)] == before
    assert sorted(searched(tmp_path)) == STARTS  # that of the killed trial too
    assert len(confirmed(tmp_path)) == len(set(confirmed(tmp_path))) == 6
    assert tune(*arguments).said[0].endswith("finished: choose another --out, or run again with --force")
    assert len(calls(tmp_path)) == 11


@pytest.mark.slow
def test_two_workers(tune, tmp_path):
    done = tune("own:slow", "--trials", 8, "--workers", 2, "--out", "out", "--json")
    assert (done.code, done.said) == (0, [])
    result = json.loads(done.out)
    assert len(result["trials"]) == 8
    assert sorted(searched(tmp_path))[:8] == sorted(row["rho"] for row in result["trials"])
    assert set(STARTS) <= set(searched(tmp_path))
    assert len({pid for *_, pid in calls(tmp_path)} - {os.getpid()}) == 2
    assert len(confirmed(tmp_path)) == 9


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")  # of the other worker here
def test_a_trial_that_is_one_too_many_is_not_trained(tmp_path, monkeypatch):
    """Two workers that look at the same moment both see one to do."""
    monkeypatch.setattr("asam.experiments.search.POLL", 0)
    small, trained = search.Search("module:function", trials=2, starts=(0.5,)), []

    def train(choice, seed, report):
        trained.append(choice.rho)
        report(0.1)

    with search.opened_study(small, f"sqlite:///{tmp_path / 'trials.sqlite3'}") as study:
        others = []

        def offer_while_another_begins(_, study):
            if len(study.get_trials()) == 1:
                others.append(study.ask({"rho": optuna.distributions.FloatDistribution(*search.RHO, log=True)}))

        monkeypatch.setattr("asam.experiments.search.offer_starts", offer_while_another_begins)
        assert not search.searched(small, study, train, set())
        assert not search.searched(small, study, train, set())
        assert not search.searched(small, study, train, set())  # waits for the other
        assert len(trained) == 1
        study.tell(others[0], 0.2)
        assert search.searched(small, study, train, set())
        states = [trial.state.name for trial in study.get_trials()]
    assert states == ["COMPLETE", "COMPLETE", "FAIL"]


@pytest.mark.slow
def test_two_commands_share_a_storage_whose_url_is_not_written(tune, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    arguments = ["own:slow", "--trials", 10, "--confirmed", 2, "--seeds", 2, "--storage", url]
    other = program(*arguments, "--out", "other")
    while not (tmp_path / "calls").exists():
        assert other.poll() is None
        time.sleep(0.02)
    assert tune(*arguments, "--out", "one").code == 0
    _, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    assert len({pid for *_, pid in calls(tmp_path)}) == 2
    assert 10 <= len(searched(tmp_path)) <= 11
    assert len(confirmed(tmp_path)) == len(set(confirmed(tmp_path))) == 4
    one, two = found(tmp_path / "one"), found(tmp_path / "other")
    assert (one["best"], one["trials"]) == (two["best"], two["trials"])
    assert url not in (tmp_path / "one" / "tune.json").read_text()
    assert (tmp_path / "shared.sqlite3").exists()


def test_an_error_that_is_not_finite_is_the_worst(tune, tmp_path):
    done = tune("own:nan_above", "--trials", 5, "--json", "--out", "out")
    assert done.code == 0
    assert json.loads(done.out)["best"]["rho"] == 0.2
    assert {row["rho"] for row in found(tmp_path / "out")["trials"] if row["error"] == "inf"} <= {2.0, 3.0}


BAD = [
    (["own:missing"], "own:missing must be a function of (asam, seed, report): AttributeError: "),
    (["own:number"], "own:number must be a function of (asam, seed, report): TypeError: 3 is not a callable object"),
    (["own:two"], "own:two must be a function of (asam, seed, report): TypeError: too many positional arguments"),
    (["broken:train"], "ModuleNotFoundError: No module named 'nowhere_at_all' ("),
    (["nowhere:train"], "ModuleNotFoundError: No module named 'nowhere'"),
    ([":train"], "a function is named module:function, got ':train'"),
    (["nowhere.toml"], "nowhere.toml: No such file or directory"),
    (["sgd.toml"], "sgd.toml: method must be asam, got sgd"),
    (["wrong.toml"], "wrong.toml: a run has no 'speed'"),
    (["all.toml"], "the run has no validation data: choose a smaller train_size"),
    (["own:quiet", "--like", "mnist"], "--like must be one of cifar10, cifar100, "),
    (["own:quiet", "--trials", "0"], "Invalid value for '--trials'"),
    (["own:quiet", "--storage", "nothing"], "--storage is no database URL"),
    (["own:quiet", "--storage", "sqlite:///\udcff"], "--storage is no database URL"),
    (["own:silent"], "the training never called report(validation_error)"),
    (["own:without"], "own:without: the training never called asam(model): all values of rho would do the same"),
    (["own:raises"], "own:raises: the training raised KeyError: 'labels' ("),
    (["own:value_error"], "own:value_error: the training raised ValueError: two lines ("),
    (["own:exits"], "own:exits: the training raised SystemExit: 3 ("),
    (["own:refuses"], "own:refuses: the training raised ValueError: p must be "),
    (["own:text"], "own:text: the training raised ValueError: could not convert string to float: 'good' ("),
    (["own:nan", "--trials", "3"], "own:nan: no trial came to an end with a finite validation error"),
    (["own:nan_afresh", "--trials", "2"], "own:nan_afresh: no choice has a finite validation error from fresh seeds"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(tune, tmp_path, arguments, message):
    (tmp_path / "sgd.toml").write_text('method = "sgd"')
    (tmp_path / "wrong.toml").write_text("speed = 1")
    (tmp_path / "all.toml").write_text("train_size = 797\nepochs = 1")
    done = tune(*arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.said) == 1, done.err
    assert message in done.said[0]
    assert not (tmp_path / "asam-tune" / "tune.json").exists()


def test_a_training_that_fails_at_once_leaves_nothing_and_a_later_one_its_trials(tune, tmp_path):
    assert tune("own:raises").code == 2
    assert not (tmp_path / "asam-tune").exists()
    assert tune("own:raises_later").code == 2
    assert sorted(path.name for path in (tmp_path / "asam-tune").iterdir()) == ["config.json", "trials.sqlite3"]


def test_an_error_names_the_users_line(tune, tmp_path):
    line = 1 + OWN.splitlines().index('    return labels["labels"]  # line 47')
    assert tune("own:raises").said[0].endswith(f"({tmp_path / 'own.py'}, line {line})")


@pytest.mark.parametrize("function", ["raises", pytest.param("unportable", marks=pytest.mark.slow)])
def test_an_error_in_a_worker_is_one_line_too(tune, function):
    done = tune(f"own:{function}", "--workers", 2)
    assert done.code == 2
    assert len(done.said) == 1, done.err
    assert f"asam: own:{function}: the training raised " in done.said[0]


def test_what_is_refused_with_force_costs_no_results(tune, tmp_path):
    arguments = ["own:quiet", "--trials", 1, "--confirmed", 1, "--seeds", 1, "--out", "out", "--force"]
    assert tune(*arguments).code == 0
    before = (tmp_path / "out" / "tune.json").read_bytes()
    assert tune(*arguments, "--storage", "sqlite:////nowhere/a.sqlite3").code == 2
    assert tune("own:missing", *arguments[1:]).code == 2
    assert (tmp_path / "out" / "tune.json").read_bytes() == before
    assert tune(*arguments).code == 0


@pytest.mark.parametrize(
    ("cause", "told"),
    [(StorageInternalError("disk full"), InputError), (ValueError("of another kind"), AssertionError)],
)
def test_a_fault_of_the_storage_at_the_end_of_a_trial_is_told_as_one(cause, told, tmp_path, monkeypatch):
    def optimize(study, objective, n_trials, catch):
        try:
            raise cause
        except Exception:
            raise AssertionError("Should not reach.")  # noqa: B904 - as Optuna does

    monkeypatch.setattr(optuna.Study, "optimize", optimize)
    tuned = search.Search("own:quiet")
    with pytest.raises(told), search.opened_study(tuned, f"sqlite:///{tmp_path}/a.db") as study:
        search.searched(tuned, study, lambda choice, seed, report: None, set())
