"""Every example runs, with the least that its options allow."""

import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SERVER = multiprocessing.get_context("forkserver")
ARGUMENTS = {
    "accelerate_loop.py": ["--epochs", "1", "--seeds", "1", "--cpu"],
    "ddp.py": ["--epochs", "1"],
    "fastai_learner.py": ["--epochs", "1", "--seeds", "1"],
    "fsdp2.py": ["--epochs", "1"],
    "gan.py": ["--epochs", "1"],
    "ignite_engine.py": ["--epochs", "1", "--seeds", "1"],
    "lightning_callback.py": ["--epochs", "1", "--seeds", "0"],
    "plain_loop.py": ["--epochs", "1", "--seeds", "1"],
    "skorch_net.py": ["--epochs", "1", "--rho", "1"],
    "transformers_sentences.py": [
        *("--data", "sentences.tar.gz", "--seeds", "0", "--train", "16", "--held-out", "8", "--epochs", "1")
    ],
    "weight_averaging.py": ["--epochs", "4", "--seeds", "1"],
}
MARKS = {"ddp.py": pytest.mark.slow, "fsdp2.py": pytest.mark.fsdp2, "transformers_sentences.py": pytest.mark.slow}


def run(folder, example, *arguments, places=({},)):
    """The script as the main program of processes, one for each place, that have imported torch already."""
    processes = [SERVER.Process(target=_main, args=(folder, example, arguments, place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()  # one that has not ended yet
        process.join()
    printed = {stream: (folder / f"{stream}.txt").read_text() for stream in ("stdout", "stderr")}
    return SimpleNamespace(returncode=max(abs(process.exitcode) for process in processes), **printed)


def _main(folder, example, arguments, place):
    os.chdir(folder)
    os.environ.update(ENVIRONMENT | place)
    torch.set_num_threads(1)
    for descriptor, stream in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(f"{stream}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = [str(EXAMPLES / example), *arguments]
    sys.path = [path for path in sys.path if not Path(path).is_relative_to(TESTS)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def torchrun(folder, example, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(EXAMPLES / example), *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def two_places():
    """What torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def archive_like_the_real_one(path):
    """As many made-up sentences as the splits of the example need, where those of the real archive are."""
    rows = [f"{i}\t{2.5 if i % 2 else -2.5}\tthis is number {i}, {'fine' if i % 2 else 'poor'}" for i in range(2100)]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", "\n".join(rows).encode())
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())


@pytest.mark.parametrize(
    "example",
    [pytest.param(path.name, marks=MARKS.get(path.name, ())) for path in sorted(EXAMPLES.glob("*.py"))],
)
def test_an_example_runs(example, tmp_path):
    if example == "transformers_sentences.py":
        archive_like_the_real_one(tmp_path / "sentences.tar.gz")
    if example == "ddp.py":
        done = torchrun(tmp_path, example, *ARGUMENTS[example])
    else:
        places = two_places() if example == "fsdp2.py" else [{}]
        done = run(tmp_path, example, *ARGUMENTS[example], places=places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ASAM" in done.stdout or "rho" in done.stdout or "test error" in done.stdout


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_says_what_is_asams(example):
    text = (EXAMPLES / example).read_text()
    assert 1 <= text.count("# ASAM") <= 10
    assert "RESULT" not in text


def test_missing_sentences_are_told_in_one_line(tmp_path):
    done = run(tmp_path, "transformers_sentences.py")
    assert done.returncode == 2
    assert done.stderr.startswith("no file vaderSentiment-3.3.2.tar.gz: pip download")
    assert done.stderr.count("\n") == 1
