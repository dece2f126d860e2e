"""Each run is done once and has one outcome: workers that start together, are killed, stopped, or find no disk left."""

import gc
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy import event

from asam.experiments import InputError, database, runs
from asam.experiments.database import file_url
from asam.experiments.runs import Runs

context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Run:
    number: int


def planned(count):
    return {f"run-{number}": Run(number) for number in range(count)}


def square(run):
    return {"square": run.number**2}


@pytest.fixture
def url(tmp_path):
    return file_url(tmp_path / "runs.sqlite3")


@pytest.fixture
def impatient(monkeypatch):
    """Whoever is silent for more than a second is dead."""
    monkeypatch.setattr(database, "GRACE", 1)
    monkeypatch.setattr(runs, "POLL", 0.05)


def states(storage):
    return [trial.state for trial in storage._study.get_trials()]


def await_file(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


def start(function, *arguments):
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def together(url, count, barrier, log):
    waited = []

    def perform(run):
        if not waited:  # each of the workers holds a run now
            waited.append(barrier.wait(60))
        with log.open("a") as file:
            file.write(f"{run.number}\n")
        return square(run)

    barrier.wait(60)
    Runs(url, "study").work(planned(count), perform)


@pytest.mark.slow
def test_workers_that_start_together_on_a_new_database_do_each_run_once(url, tmp_path):
    barrier, log = context.Barrier(3), tmp_path / "log"
    workers = [start(together, url, 30, barrier, log) for _ in range(3)]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(30))
    storage = Runs(url, "study")
    assert storage.outcomes() == {name: square(run) for name, run in planned(30).items()}
    records = storage.records()
    assert [record["name"] for record in records] == sorted(planned(30))
    assert all(record["run"] == {"number": int(record["name"][4:])} for record in records)
    assert len({record["worker"] for record in records}) == 3
    assert all(record["seconds"] >= 0 for record in records)
    assert TrialState.RUNNING not in states(storage)


def test_of_runs_that_two_offered_at_the_same_time_one_is_done(url, monkeypatch):
    ours, theirs = Runs(url, "study"), Runs(url, "study")
    offer, performed = ours._study.add_trial, []

    def perform(run):
        performed.append(run.number)
        return square(run)

    def late(trial):
        theirs.work(planned(5), perform)  # between our look at the database and our offer
        offer(trial)

    monkeypatch.setattr(ours._study, "add_trial", late)
    ours.work(planned(5), perform)
    assert sorted(performed) == list(range(5))
    assert len(states(ours)) == 10
    assert states(ours).count(TrialState.COMPLETE) == 5
    assert ours.outcomes() == theirs.outcomes() == {name: square(run) for name, run in planned(5).items()}


def test_studies_in_one_database_are_apart(url):
    Runs(url, "one").work(planned(2), square)
    assert Runs(url, "other").outcomes() == {}


def test_nothing_to_do(url):
    Runs(url, "study").work({}, square)


def dies_after(url, method):
    storage = Runs(url, "study")
    original = getattr(storage._storage, method)

    def last(*arguments):
        if original(*arguments) is not False:  # which is what a claim of another's run returns
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(storage._storage, method, last)
    storage.work(planned(5), square)


def dies_in_a_run(url):
    Runs(url, "study").work(planned(5), lambda run: os.kill(os.getpid(), signal.SIGKILL))


def finishes(url):
    database.GRACE = 1
    Runs(url, "study").work(planned(5), square)


@pytest.mark.slow
def test_runs_of_workers_that_were_killed_are_done_again(url):
    victims = [start(dies_in_a_run, url)]
    victims += [start(dies_after, url, method) for method in ("set_trial_state_values", "set_trial_user_attr")]
    victims += [start(dies_after, url, "record_heartbeat")]
    for victim in victims:
        victim.join(60)
    assert [victim.exitcode for victim in victims] == [-signal.SIGKILL] * 4
    storage = Runs(url, "study")
    assert states(storage).count(TrialState.RUNNING) == 3  # the last one had not claimed its run
    assert storage.outcomes() == {}
    last = start(finishes, url)
    last.join(60)
    assert last.exitcode == 0
    assert storage.outcomes() == {name: square(run) for name, run in planned(5).items()}
    assert states(storage).count(TrialState.COMPLETE) == 5
    assert states(storage).count(TrialState.FAIL) == 3
    assert TrialState.RUNNING not in states(storage)


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyboardInterrupt(), SystemExit(1)])
def test_a_run_that_fails_is_raised_and_free_at_once(url, error):
    storage = Runs(url, "study")

    def fail(run):
        raise error

    with pytest.raises(type(error)) as raised:
        storage.work(planned(1), fail)
    assert raised.value is error
    assert states(storage) == [TrialState.FAIL]
    started = time.monotonic()
    storage.work(planned(1), square)
    assert time.monotonic() - started < database.GRACE / 2
    assert storage.outcomes() == {"run-0": {"square": 0}}


def test_an_outcome_that_is_no_json_is_a_failure(url):
    storage = Runs(url, "study")
    with pytest.raises(TypeError, match="not JSON serializable"):
        storage.work(planned(1), lambda run: object())
    assert states(storage) == [TrialState.FAIL]


def sleeper(url, folder):
    def perform(run):
        (folder / "started").touch()
        await_file(folder / "go", 60)
        return {"by": os.getpid()}

    Runs(url, "study").work(planned(1), perform, done=(folder / "done").touch)


def test_a_worker_that_slept_too_long_makes_no_second_outcome(url, tmp_path, impatient):
    other = start(sleeper, url, tmp_path)
    await_file(tmp_path / "started")
    os.kill(other.pid, signal.SIGSTOP)
    storage = Runs(url, "study")
    storage.work(planned(1), lambda run: {"by": os.getpid()})
    (tmp_path / "go").touch()
    os.kill(other.pid, signal.SIGCONT)
    other.join(60)
    assert other.exitcode == 0
    assert not (tmp_path / "done").exists()
    assert storage.outcomes() == {"run-0": {"by": os.getpid()}}
    assert sorted(states(storage)) == [TrialState.COMPLETE, TrialState.FAIL]


def slow(url, folder):
    database.HEARTBEAT = 1
    storage = Runs(url, "study")
    beat, beats = storage._storage.record_heartbeat, []

    def record_heartbeat(trial):
        beats.append(trial)
        if len(beats) == 2:  # the first one after the claim
            raise StorageInternalError("no answer")
        beat(trial)

    def perform(run):
        (folder / "started").touch()
        time.sleep(6)
        return {"by": os.getpid()}

    storage._storage.record_heartbeat = record_heartbeat
    storage.work(planned(1), perform)


@pytest.mark.slow
def test_a_slow_run_is_not_given_away_though_a_heartbeat_failed(url, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "GRACE", 4)
    other = start(slow, url, tmp_path)
    await_file(tmp_path / "started")
    storage = Runs(url, "study")
    storage.work(planned(1), square)
    other.join(60)
    assert other.exitcode == 0
    assert storage.outcomes() == {"run-0": {"by": other.pid}}
    assert states(storage) == [TrialState.COMPLETE]


def test_no_space_left_is_bad_input_and_the_work_goes_on_afterwards(url):
    storage = Runs(url, "study")
    storage.work(planned(1), square)

    def limit(connection, _):
        connection.execute("PRAGMA max_page_count = 60")

    storage.close()
    event.listen(storage._storage.engine, "connect", limit)
    with pytest.raises(InputError, match=r"database or disk is full; the same command goes on$") as raised:
        storage.work(planned(3), lambda run: {"text": "x" * 10**6})
    assert "\n" not in str(raised.value)
    storage.close()
    again = Runs(url, "study")
    assert again.outcomes() == {"run-0": {"square": 0}}
    assert TrialState.RUNNING not in states(again)
    again.work(planned(3), square)
    assert again.outcomes() == {name: square(run) for name, run in planned(3).items()}


def test_a_run_costs_five_writes_however_many_there_are(url):
    storage, commits = Runs(url, "study"), []
    event.listen(storage._storage.engine, "commit", commits.append)
    storage.work(planned(40), square)
    # and a few reads for every handful of runs: offers, heartbeat, claim, result, state
    assert len(commits) <= 40 * (5 + 5 / runs.HANDFUL) + 5


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("secret", "no database URL such as"),
        ("nosql://user:secret@host/x", "nosql"),
        ("mysql+pymysql://user:secret@host/x", "needs pymysql"),
        ("postgresql://user:secret@127.0.0.1:1/x?password=secret", "refused"),
        ("postgresql+psycopg://user:secret@nowhere.invalid/x", "nowhere.invalid"),
        ("sqlite://", "in the memory"),
        ("sqlite:////nowhere/secret/runs.sqlite3", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_in_one_line_without_its_password(url, says):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(InputError, match=says) as raised:
        Runs(url, "study")
    assert "\n" not in str(raised.value)
    assert url.startswith("sqlite") or "secret" not in str(raised.value)


def test_a_missing_driver_of_postgresql_comes_with_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(InputError, match=r"needs psycopg: pip install 'asam\[postgresql\]'"):
        Runs("postgresql://user@host/name", "study")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine " * 1000)
    with pytest.raises(InputError, match=r"notes\.txt cannot be opened: file is not a database"):
        Runs(file_url(path), "study")
    gc.collect()  # Optuna leaves what it could not open to be found; Python 3.13 says so
    assert path.read_text() == "mine " * 1000


def test_any_name_of_a_folder_will_do(tmp_path):
    folder = tmp_path / "50% {of} a?b#c @home"
    folder.mkdir()
    storage = Runs(file_url(folder / "runs.sqlite3"), "study")
    storage.work(planned(1), square)
    storage.close()
    assert [path.name for path in folder.iterdir()] == ["runs.sqlite3"]
    assert list(tmp_path.iterdir()) == [folder]


def test_outcomes_keep_every_digit(url):
    outcome = {"pi": 0.1 + 0.2, "nan": float("inf"), "list": [1e-300, None, True], "text": "ü\n"}
    storage = Runs(url, "study")
    storage.work(planned(1), lambda run: outcome)
    assert Runs(url, "study").outcomes() == {"run-0": outcome}
    assert json.loads(json.dumps(storage.records()[0]))["outcome"] == outcome
    assert Path(storage._storage.engine.url.database).is_file()
