"""Several workers and commands share the runs through a real PostgreSQL server, as several machines would."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import small_study
from optuna.trial import TrialState

from asam.experiments.runs import Runs

psycopg = pytest.importorskip("psycopg")
WORKERS = """
import multiprocessing, sys
from pathlib import Path
from asam.experiments import database, runs
import test_postgresql as shared
database.GRACE, database.HEARTBEAT, runs.POLL = 2, 1, 0.1
context = multiprocessing.get_context("fork")  # before there are threads, so that torch is imported once
workers = [context.Process(target=shared.worker, args=(sys.argv[1], Path(sys.argv[2]))) for _ in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(*(worker.exitcode for worker in workers))
"""


def _program(name):
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # where Debian has them, outside of PATH
    return shutil.which(name) or (str(places[-1]) if places else None)


def _user():
    """The options that start a process as a user that the server accepts: any but root."""
    if os.getuid():
        return {}
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a database on a server of its own."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if not (initdb and postgres):
        pytest.skip("no PostgreSQL server is installed (initdb and postgres)")
    user = _user()
    # not under pytest's own folder, which another user must not enter
    home = Path(tempfile.mkdtemp(prefix="asam-postgresql-"))
    if user:
        shutil.chown(home, user["user"], user["group"])
    options = {"cwd": home, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **user}
    cluster = ["--pgdata", str(home / "data"), "--username=asam", "--auth=trust", "--no-sync", "--encoding=UTF8"]
    subprocess.run([initdb, *cluster, "--locale=C"], check=True, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": home, "fsync": "off"}
    flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
    process = subprocess.Popen([postgres, "-D", str(home / "data"), *flags], **options)
    url = f"postgresql+psycopg://asam:secret@127.0.0.1:{port}/postgres"
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, "the server ended"
            try:
                psycopg.connect(url.replace("+psycopg", "")).close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # at once, without waiting for clients
        process.wait(30)
        shutil.rmtree(home)


def planned():
    return {f"run-{number}": small_study.Run(number, 0.02, None) for number in range(24)}


def worker(url, log):
    def perform(run):
        with (log / "performed").open("a") as file:
            file.write(f"{run.number} {os.getpid()}\n")
        if not (log / "victim").exists():
            try:
                (log / "victim").symlink_to(str(os.getpid()))  # the first one dies in its run
            except FileExistsError:
                pass
            else:
                time.sleep(600)
        return small_study.perform(run)

    (log / f"ready-{os.getpid()}").touch()
    while len(list(log.glob("ready-*"))) < 4:
        time.sleep(0.01)
    Runs(url, "study").work(planned(), perform)


@pytest.mark.slow
def test_four_workers_one_of_them_killed_do_every_run_once(server, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", WORKERS, server, str(tmp_path)]
    workers = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    victim = tmp_path / "victim"
    deadline = time.monotonic() + 120
    while not victim.is_symlink():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed = int(os.readlink(victim))
    os.kill(killed, signal.SIGKILL)
    codes, _ = workers.communicate(timeout=120)
    assert sorted(map(int, codes.split())) == [-signal.SIGKILL, 0, 0, 0]

    storage = Runs(server, "study")
    assert storage.outcomes() == {name: {"square": run.number**2} for name, run in planned().items()}
    records = storage.records()
    assert [record["name"] for record in records] == sorted(planned())
    assert str(killed) not in {record["worker"].split(":")[1] for record in records}
    states = [trial.state for trial in storage._study.get_trials()]
    assert states.count(TrialState.COMPLETE) == 24
    assert TrialState.RUNNING not in states
    storage.close()
    lines = [line.split() for line in (tmp_path / "performed").read_text().splitlines()]
    (in_hand,) = [number for number, pid in lines if int(pid) == killed]
    assert sorted(int(number) for number, _ in lines) == sorted([*range(24), int(in_hand)])


@pytest.mark.slow
def test_two_commands_share_the_runs_and_write_the_same(server, tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    (log / "wait").touch()
    common = [sys.executable, small_study.__file__, "reproduce", "toy", "--quick", "--data-dir", str(log)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [
        subprocess.Popen([*common, "--workers", "1", "--storage", server, "--out", str(tmp_path / out)], **options)
        for out in "ab"
    ]
    deadline = time.monotonic() + 120
    while not (log / "performed").exists() or len((log / "performed").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (log / "wait").unlink()  # each of the commands has a run in hand
    said = [command.communicate(timeout=120) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    numbers = sorted(map(int, (log / "performed").read_text().split()))
    assert numbers == [0, 1, 2, 3, 4, 5, 25]
    a, b = ((tmp_path / out / "results.jsonl").read_text() for out in "ab")
    assert a == b
    assert len({json.loads(line)["worker"] for line in a.splitlines()}) == 2
    summaries = [json.loads((tmp_path / out / "summary.json").read_text()) for out in "ab"]
    assert summaries[0]["findings"] == summaries[1]["findings"]
    assert summaries[0]["runs"] == summaries[1]["runs"] == 7
    assert not [path for out in "ab" for path in (tmp_path / out).iterdir() if "secret" in path.read_text()]


def test_a_connection_that_the_server_closed_is_made_again(server):
    storage = Runs(server, "closed")
    with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    storage.work({"run": small_study.Run(3, 0.0, None)}, small_study.perform)
    assert storage.outcomes() == {"run": {"square": 9}}
    storage.close()
