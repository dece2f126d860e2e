"""``asam train`` as a user meets it: what it writes, killed and started again, refused, and against a loop by hand."""

import errno
import json
import os
import pathlib
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import killed_training
import pytest
import torch

from asam import __version__
from asam.experiments import checkpoints, files
from asam.experiments.run import Run
from asam.experiments.training import Training

# 500 digits: 4 steps of 128 an epoch, 12 in all
QUICK = ["--epochs", "3", "--batch-size", "128", "--evaluate-every", "2", "--checkpoint-every", "3"]
FINISHED = ["config.json", "metrics.jsonl", "run.json", "run.pt", "tensorboard"]


@pytest.fixture
def train(asam):
    return partial(asam, "train", *QUICK)


def killed(folder, *arguments, **when):
    killed_training.killed([*QUICK, *arguments, "--out", folder], **when)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def outcome(folder):
    found = json.loads((folder / "run.json").read_text())["outcome"]
    assert found.pop("seconds_per_step") > 0
    return found


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder):
    """Epochs and values that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def assert_same_training(one, other):
    weights, others = (torch.load(folder / "run.pt", weights_only=True) for folder in (one, other))
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name
    assert outcome(one) == outcome(other)
    assert metrics(one) == metrics(other)
    assert scalars(one) == scalars(other)


def refused(done, *words):
    assert done.code == 2
    assert len(done.said) == 1, done.said
    for word in words:
        assert word in done.said[0]


def test_what_is_written(train, tmp_path):
    done = train("--rho", 0.5)
    out = tmp_path / "asam-train"
    assert (done.code, done.said) == (0, [])
    assert sorted(path.name for path in out.iterdir()) == FINISHED
    run = asdict(Run(rho=0.5, epochs=3, batch_size=128, evaluate_every=2))
    assert json.loads((out / "config.json").read_text()) == {"asam": __version__, "run": run}
    assert json.loads(done.out.splitlines()[0]) == run
    found = json.loads((out / "run.json").read_text())
    assert (found["run"], found["processes"]) == (run, 1)
    assert found["environment"]["torch"] == torch.__version__
    curves = found["outcome"]["curves"]
    assert [row["epoch"] for row in metrics(out)] == [2, 3]
    for name in ("train_error", "validation_error", "test_error"):
        assert [row[name] for row in metrics(out)] == curves[name]
        assert found["outcome"][name] == curves[name][-1]
        assert scalars(out)[name] == [(2, pytest.approx(curves[name][0])), (3, pytest.approx(curves[name][1]))]
        assert f"{name}: {curves[name][-1]:.4g}\n" in done.out
    assert f"Written: {Path('asam-train') / 'run.json'}" in done.out


def test_the_weights_are_those_of_the_outcome_and_can_be_measured(asam, train, tmp_path):
    assert train("--rho", 0.5, "--noise", 0.2, "--out", "out").code == 0
    quick = ["--samples", 2, "--steps", 3, "--eigenvalues", 1, "--json"]
    for target in ("out/run", "out/run.pt", "out/run.json"):
        done = asam("measure", target, *quick)
        assert done.code == 0
        found = json.loads(done.out)
        assert 100 * found["training"]["error"] == pytest.approx(outcome(tmp_path / "out")["train_error"])
    refused(asam("measure", "out", *quick), "name one of its runs, such as out/run")


def test_the_files_of_an_infinite_p_are_json(asam, train, tmp_path):
    out, arguments = tmp_path / "asam-train", ("--rho", 0.01, "--p", "inf")
    done = train(*arguments)
    assert done.code == 0
    texts = [done.out.splitlines()[0], (out / "config.json").read_text(), (out / "run.json").read_text()]
    runs = [json.loads(text) for text in texts]  # Python reads Infinity, which is no JSON, as a number
    assert [found.get("run", found)["p"] for found in runs] == ["inf"] * 3
    quick = ["--samples", 2, "--steps", 3, "--eigenvalues", 1, "--json"]
    assert asam("measure", "asam-train/run", *quick).code == 0
    refused(train(*arguments), "holds the same, finished")
    again = train("--config", "asam-train/run.json", "--out", "again")
    assert again.code == 0
    assert outcome(tmp_path / "again") == outcome(out)


def test_options_beat_the_file(train, tmp_path):
    (tmp_path / "a.toml").write_text('method = "sam"\nlr = 0.05\nmomentum = 0.5\n')
    done = train("--config", "a.toml", "--lr", 0.02, "--json")
    assert done.code == 0
    assert json.loads(done.out)["train_error"] < 100
    run = json.loads((tmp_path / "asam-train" / "run.json").read_text())["run"]
    assert (run["method"], run["rho"], run["lr"], run["momentum"]) == ("sam", 0.05, 0.02, 0.5)


def test_a_file_in_capitals(train, tmp_path):
    (tmp_path / "A.TOML").write_text("epochs = 1\n")
    assert train("--config", "A.TOML", "--out", "capitals").code == 0


def test_a_run_that_was_written_is_a_file_of_values(train, tmp_path):
    assert train("--method", "sgd", "--out", "one").code == 0
    assert train("--config", "one/run.json", "--out", "two").code == 0
    assert_same_training(tmp_path / "one", tmp_path / "two")


KINDS = {
    "sgd": "--method sgd",
    "asam": "--rho 0.5",
    "asam, dropout": "--rho 0.5 --dropout 0.3",
    "economical": "--method economical --rho 0.5 --exact 0.5",
    "asam, adam": "--rho 0.5 --optimizer adam --lr 0.001 --schedule inverse-sqrt --warmup 3 --clip 1",
    "asam, cnn, augmented": "--rho 0.5 --model cnn --augment --batch-size 250 --evaluate-every 1",
}


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(v, marks=[pytest.mark.slow] if i != 1 else []) for i, v in enumerate(KINDS.values())],
    ids=KINDS.keys(),
)
def test_killed_and_started_again_it_ends_in_the_same_numbers(train, tmp_path, arguments):
    arguments = arguments.split()
    assert train(*arguments, "--out", "whole").code == 0
    out = tmp_path / "out"
    if "--dropout" in arguments:  # 12 steps, 4 an epoch; checkpoints after 3, 6, 9, 12
        killed(out, *arguments, step=5)
        killed(out, *arguments, step=2)  # no further than it was
        killed(out, *arguments, step=5)  # 3 + 5, an epoch's end with its metrics; goes on from 6
        assert [row["epoch"] for row in metrics(out)] == [2]
    elif "cnn" in arguments:  # 6 steps, 2 an epoch; goes on from 3
        killed(out, *arguments, step=5)
    else:
        killed(out, *arguments, step=7)  # goes on from 6, in the second epoch
        assert not (out / "metrics.jsonl").exists()
    assert (out / "checkpoint.pt").exists()
    assert train(*arguments, "--out", "out").code == 0
    assert_same_training(tmp_path / "whole", out)
    assert sorted(path.name for path in out.iterdir()) == FINISHED


def test_killed_before_the_first_checkpoint_and_after_the_last_step(train, tmp_path):
    assert train("--out", "whole").code == 0
    out = tmp_path / "out"
    killed(out, step=2)
    assert not (out / "checkpoint.pt").exists()
    killed(out, step=12)
    assert (out / "checkpoint.pt").exists()
    assert not (out / "run.json").exists()
    assert train("--out", "out").code == 0
    assert_same_training(tmp_path / "whole", out)


def test_killed_while_it_writes_a_checkpoint(train, tmp_path):
    assert train("--out", "whole").code == 0
    out = tmp_path / "out"
    killed(out, write=1)
    assert (out / "checkpoint.pt.part").stat().st_size > 0
    assert not (out / "checkpoint.pt").exists()
    killed(out, write=4)
    assert checkpoints.load(out / "checkpoint.pt", Run(rho=0.5, epochs=3, batch_size=128, evaluate_every=2), 1)
    assert (out / "checkpoint.pt.part").exists()
    assert train("--out", "out").code == 0
    assert_same_training(tmp_path / "whole", out)
    assert sorted(path.name for path in out.iterdir()) == FINISHED


def test_killed_while_it_claims_the_folder(train, tmp_path):
    (tmp_path / "asam-train").mkdir()
    (tmp_path / "asam-train" / "config.json.part").write_text('{"asam"')
    assert train().code == 0


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    killed(folder, step=10)
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(interrupted, tmp_path):
    """The folder of a training that was killed after step 10 of 12."""
    for path, content in interrupted.items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    return tmp_path / "out"


def of_another_run(path):
    found = torch.load(path, weights_only=True)
    found["run"] |= {"lr": 0.5, "seed": 8}
    torch.save(found, path)


def of_settings_unknown_here(path):
    found = torch.load(path, weights_only=True)
    found["run"] |= {"line\x1ebreak": 1, 7: torch.ones(2)}
    torch.save(found, path)


def of_two_processes(path):
    found = torch.load(path, weights_only=True)
    found["state"]["random"] *= 2
    torch.save(found, path)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Code:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("was_run"),)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_another_run, "is of another run (lr, seed): choose another --out, or --force"),
        (of_settings_unknown_here, "is of another run (settings unknown here): choose another"),
        (of_two_processes, "is of 2 processes, not 1: start as many, or again with --force"),
        (truncated, "is not a checkpoint of a run ("),
        (lambda path: path.write_bytes(b""), "is not a checkpoint of a run ("),
        (lambda path: torch.save(Code(), path), "is not a checkpoint of a run (UnpicklingError: "),
        (lambda path: torch.save({"run": Code(), "state": {}}, path), "is not a checkpoint of a run (UnpicklingError"),
        (lambda path: torch.save({"run": {}, "state": {}}, path), "is not a checkpoint of a run (KeyError: 'random')"),
        (lambda path: torch.save([1], path), "is not a checkpoint of a run (TypeError: "),
        (lambda path: torch.save(torch.ones(3), path), "is not a checkpoint of a run (IndexError: "),
    ],
)
def test_a_checkpoint_that_cannot_be_taken_up_is_left(train, out, tmp_path, spoil, message):
    spoil(out / "checkpoint.pt")
    before = contents(out)
    refused(train("--out", "out"), "out/checkpoint.pt", message)
    assert contents(out) == before
    assert not (tmp_path / "was_run").exists()
    assert train("--out", "out", "--force").code == 0
    assert sorted(path.name for path in out.iterdir()) == FINISHED


def test_folders_of_something_else(train, out, tmp_path):
    before = contents(out)
    refused(train("--out", "out", "--lr", 0.5), "out holds another configuration or other files", "--force")
    assert contents(out) == before
    assert train("--out", "out").code == 0
    (out / "mine.txt").write_text("kept")
    before = contents(out)
    refused(train("--out", "out"), "out holds the same, finished")
    assert contents(out) == before
    assert train("--out", "out", "--lr", 0.5, "--force").code == 0
    assert json.loads((out / "run.json").read_text())["run"]["lr"] == 0.5
    assert (out / "mine.txt").read_text() == "kept"
    assert len(list((out / "tensorboard").iterdir())) == 1
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.pt").write_text("mine")
    refused(train("--out", "foreign", "--force"), "foreign/run.pt would be overwritten and is of something else")
    refused(train("--out", "foreign/run.pt"), "foreign/run.pt is a file")


@pytest.mark.parametrize("full", ["checkpoint.pt", "metrics.jsonl", "run.pt", "run.json"])
def test_a_full_disk(train, out, monkeypatch, full):
    before = contents(out)
    writing = []

    def fsync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        writing.append(name)
        if name == f"{full}.part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    refused(train("--out", "out"), f"out/{full}: No space left on device")
    assert f"{full}.part" in writing
    after = contents(out)
    assert not [name for name in after if name.endswith(".part")]
    assert "run.json" not in after
    assert after.get(full) == before.get(full)
    monkeypatch.undo()
    os.chdir(out.parent)
    assert train("--out", "out").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "-1"], ["lr must be a number > 0 and < 1e+18, got -1"]),
        (["--lr", "1e39"], ["lr must be a number > 0 and < 1e+18, got 1e+39"]),
        (["--lr", "fast"], ["Invalid value for '--lr'"]),
        (["--method", "adam"], ["Invalid value for '--method'"]),
        (["--rho", "0"], ["asam needs rho > 0, got 0"]),
        (["--seed", "-1"], ["seed must be at least 0 and less than 2**63, got -1"]),
        (["--checkpoint-every", "0"], ["Invalid value for '--checkpoint-every'"]),
        (["--model", "transformer"], ["there is no network 'transformer'"]),
        (["--dropout", "0.5", "--model", "cnn"], ["only the mlp has dropout, not cnn"]),
        (["--train-size", "600"], ["train_size must be at most 500, or 797"]),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], ["nowhere"]),
        (["--dataset", "fashion-mnist", "--data-dir", "nowhere"], ["nowhere", "is not there"]),
        (["--dataset", "image-folder", "--data-dir", "nowhere"], ["nowhere"]),
        (["--dataset", "help-texts"], ["model must be transformer-tiny or transformer-iwslt"]),
        (["--device", "tpu"], ["device must be cpu, cuda or auto, got 'tpu'"]),
        (["--device", "mps"], ["device must be cpu, cuda or auto, got 'mps'"]),
        (["--device", "cuda:99"], ["device cuda:99: there is no such GPU that this torch can use"]),
        (["--log", "mlflow"], ["--log mlflow needs mlflow: pip install mlflow"]),
        (["--log", "wandb"], ["--log wandb needs wandb: pip install wandb"]),
        (["--config", "nowhere.toml"], ["nowhere.toml: No such file or directory"]),
        (["--config", "bad.toml"], ["bad.toml is neither TOML nor JSON"]),
        (["--config", "wrong.toml", "--lr", "1"], ["wrong.toml: epochs has a wrong type, '3'"]),
        (["--config", "unknown.toml"], ["unknown.toml: a run has no 'speed'"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(asam, monkeypatch, tmp_path, arguments, words):
    (tmp_path / "bad.toml").write_text("lr = ")
    (tmp_path / "wrong.toml").write_text('epochs = "3"')
    (tmp_path / "unknown.toml").write_text("speed = 1")
    for service in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, service, None)  # not installed
    done = asam("train", *arguments)
    refused(done, *words)
    assert done.out == ""
    assert not (tmp_path / "asam-train").exists()


def test_no_gpu(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(train("--device", "cuda"), "device cuda: there is no such GPU that this torch can use")
    assert train("--device", "auto").code == 0


def test_what_is_refused_with_force_costs_no_results(train, monkeypatch, out):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    before = contents(out)
    refused(train("--out", "out", "--force", "--log", "mlflow"), "pip install mlflow")
    refused(train("--out", "out", "--force", "--dropout", 0.5, "--model", "cnn"), "only the mlp has dropout")
    assert contents(out) == before


class Service:
    """MLflow and Weights & Biases, as far as they are used; an error ends their runs as failed."""

    def __init__(self):
        self.said, self.ended = [], None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.ended = kind

    def start_run(self, run_name):
        self.said.append(run_name)
        return self

    def init(self, *, name, config, **_):
        self.said += [name, config["rho"]]
        return self

    def log_params(self, config):
        self.said.append(config["rho"])

    def log_metrics(self, metrics, step):
        self.said.append((step, metrics["test_error"]))

    log = log_metrics


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_services(train, monkeypatch, tmp_path, name):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    assert train("--out", "out", "--log", name).code == 0
    errors = [(row["epoch"], row["test_error"]) for row in metrics(tmp_path / "out")]
    assert service.said == ["out", 0.5, *errors]
    assert service.ended is None
    monkeypatch.setattr(Training, "outcome", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--out", "other", "--log", name)
    assert service.ended is ZeroDivisionError


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["sgd", "asam"])
def test_reduced_precision(train, tmp_path, precision, method):
    done = train("--precision", precision, "--method", method, "--clip", 1, "--epochs", 20, "--out", "out")
    assert (done.code, done.said) == (0, [])
    weights = torch.load(tmp_path / "out" / "run.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert outcome(tmp_path / "out")["train_error"] < 10
    whole = train("--method", method, "--clip", 1, "--epochs", 20, "--out", "whole")
    assert whole.code == 0
    other = torch.load(tmp_path / "whole" / "run.pt", weights_only=True)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)  # it was in effect


def test_a_training_that_diverges_leaves_json(train, tmp_path):
    assert train("--method", "sgd", "--lr", 1e17, "--out", "out").code == 0

    def forbidden(constant):
        raise AssertionError(constant)

    found = json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=forbidden)
    assert found["outcome"]["loss_gap"] is None
