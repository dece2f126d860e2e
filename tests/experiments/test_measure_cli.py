"""`asam measure` and `asam landscape` as a user meets them: on runs, on a model of their own, with wrong arguments."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from asam.experiments import cli
from asam.experiments.compare import _one
from asam.experiments.run import Run
from asam.measure import Geometry, LossPlane, Objective, hessian, worst_case_sharpness

OWN = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(40, 3)
    data = [(part, (part[:, 0] > 0).long()) for part in inputs.split(16)]
    return model, loss_fn, data

def with_held_out():
    return *make(), make()[2]

def loss_fn(model, batch):
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits, batch[1]), {"error": (logits.argmax(1) != batch[1]).double().mean()}

def of_tokens():
    def of_all(model, batch):
        loss, means = loss_fn(model, batch)
        return loss, {"error": means["error"] / 3}
    return make()[0], of_all, make()[2], make()[2]

def steep():
    model, loss_fn, data = make()
    with torch.no_grad():
        model[0].weight.mul_(1e24), model[2].weight.div_(1e24), model[0].bias.mul_(1e24)
    return model, loss_fn, data

def dropout():
    return nn.Linear(3, 2), lambda model, batch: nn.functional.dropout(model(batch[0])).mean(), make()[2]

def shuffled():
    model, loss_fn, _ = make()
    torch.seed()
    inputs = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return model, loss_fn, torch.utils.data.DataLoader(dataset, 50, shuffle=True)

def talkative():
    print("hello")
    return make()[0], lambda model, batch: (print("again"), loss_fn(model, batch))[1], make()[2]

def exits():
    raise SystemExit(3)

def faulty():
    def loss_fn(model, batch):
        return {}["labels"]
    return make()[0], loss_fn, make()[2]

def percent():
    def loss_fn(model, batch):
        return model(batch[0]).square().mean(), {"error": 17.5}
    return make()[0], loss_fn, make()[2]

def tensor_held_out():
    return *make(), torch.ones(3, 3)

def nan():
    return make()[0], lambda model, batch: model(batch[0]).mean() * float("nan"), make()[2]

def tanh():
    model, loss_fn, data = make()
    model[1] = nn.Tanh()
    return model, loss_fn, data

def ok():
    def loss_fn(model, batch):
        loss = model(batch[0]).square().mean()
        return loss, {"top[error]": 0.25, "a[/b]": 0.5, ":train:": 0.75}
    return make()[0], loss_fn, make()[2]

def bags():
    model = nn.Sequential(nn.EmbeddingBag(9, 3), nn.Linear(3, 2))
    def loss_fn(model, batch):
        logits = model(batch)
        return logits.square().mean(), {"error": (logits[:, 0] > 0).double().mean()}
    return model, loss_fn, [torch.arange(8).view(4, 2)]

def reentrant():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    def loss_fn(model, batch):
        return model[1](torch.utils.checkpoint.checkpoint(torch.tanh, model[0](batch[0]), use_reentrant=True)).mean()
    return model, loss_fn, make()[2]

def positions():
    return make()[0], lambda model, batch: (model(batch[0]).square().mean(), {"positions": 0.25}), make()[2]

def frozen():
    model, loss_fn, data = make()
    model[0].requires_grad_(False)
    return model, loss_fn, data

def uncopied():
    model, loss_fn, data = make()
    torch.nn.utils.weight_norm(model[0])
    return model, loss_fn, data

def failing():
    def fail(grad):
        raise RuntimeError("of the user's own making")
    def loss_fn(model, batch):
        loss = model(batch[0]).square().mean()
        if loss.requires_grad:
            loss.register_hook(fail)
        return loss
    return make()[0], loss_fn, make()[2]

def negative():
    return make()[0], lambda model, batch: model(batch[0]).square().mean() - 9, make()[2]

def wrong():
    return 1, 2, 3

def broken():
    raise OSError("no such data")
"""
QUICK = ["--samples", "2", "--steps", "3", "--eigenvalues", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "runs"
    folder.mkdir()
    for method, model in (("sgd", "mlp"), ("asam", "mlp"), ("sgd", "cnn")):
        _one(Run(method, seed=0, rho=1.0, epochs=1, model=model, noise=0.4), folder / f"{method}-{model}")
    return folder


@pytest.fixture
def asam(monkeypatch, capsys, tmp_path):
    """The command line in an empty folder that holds the user's module, with its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own.py").write_text(OWN)
    sys.modules.pop("own", None)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["asam", *map(str, arguments)])
        code = cli.run()
        return code, *capsys.readouterr()

    yield command
    sys.modules.pop("own", None)


def test_measure_a_run(asam, runs):
    code, out, _ = asam("measure", runs / "sgd-mlp", "--json", *QUICK)
    assert code == 0
    found = json.loads(out)
    assert (found["examples"], found["parameters"]) == (500, 26122)
    assert {row["quantity"] for row in found["rows"]} == {
        *(f"{kind}, {case} case" for kind in ("sharpness", "adaptive") for case in ("worst", "average")),
        *(f"{what} of {which}" for what in ("top eigenvalues", "trace") for which in ("H", "THT")),
    }
    outcome = json.loads((runs / "sgd-mlp.json").read_text())["outcome"]
    assert 100 * found["training"]["error"] == pytest.approx(outcome["train_error"])
    noisy, clean = found["held_out"].values()
    assert 100 * clean["error"] == pytest.approx(outcome["test_error"])
    assert 100 * noisy["error"] == pytest.approx(outcome["train_error"] + outcome["generalization_gap"])
    assert [bound["explanation"].split()[0] for bound in found["bounds"]] == ["SAM", "ASAM", "Gibbs", "Held-out"]


def test_the_numbers_are_those_of_the_library(asam, tmp_path):
    code, out, _ = asam("measure", "own:make", "--json", "--rho", 0.3, "--adaptive-rho", 0.7, *QUICK)
    assert code == 0
    found = json.loads(out)
    sys.path.insert(0, str(tmp_path))
    import own

    objective = Objective(*own.make())
    k = 50
    by_ball = {(row["quantity"], row.get("p")): row for row in found["rows"]}
    adaptive = {"normalization": "elementwise", "eta": 0, "bias": "scaled"}
    for quantity, ball, rho in (("sharpness", {"normalization": "none"}, 0.3), ("adaptive", adaptive, 0.7)):
        for p, size in ((2, rho), (math.inf, rho / math.sqrt(k))):
            expected = worst_case_sharpness(objective, size, geometry=Geometry(p=p, **ball), steps=3)
            row = by_ball[f"{quantity}, worst case", str(p)]
            assert (row["rho"], row["value"]) == (expected.rho, expected.value)
    dense = hessian(objective) @ torch.eye(k)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert by_ball["top eigenvalues of H", None]["value"][0] == pytest.approx(top, rel=1e-3)
    assert found["held_out"] == {}
    assert [bound["explanation"].split()[0] for bound in found["bounds"]] == ["SAM", "ASAM"]


def test_measure_prints_a_table(asam, monkeypatch):
    code, out, err = asam("measure", "own:with_held_out", *QUICK)
    assert code == 0
    assert all(text in out for text in ("50 parameters", "40 training examples", "held-out error", "trace of THT"))
    assert "Held-out bound" in out
    assert "measuring own:with_held_out" in err
    assert max(map(len, out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "40")
    rows, narrow = (
        [line for line in text.splitlines() if line.startswith("│")]
        for text in (out, asam("measure", "own:with_held_out", *QUICK)[1])
    )
    assert narrow == rows


@pytest.mark.parametrize("wrapped", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}])
def test_measure_a_checkpoint_of_ones_own(asam, tmp_path, wrapped):
    sys.path.insert(0, str(tmp_path))
    import own

    model, loss_fn, data = own.make()
    nn.init.constant_(model[2].bias, 3.0)
    torch.save(wrapped(model.state_dict()), tmp_path / "weights.pt")
    code, out, _ = asam("measure", "weights.pt", "--model", "own:make", "--json", *QUICK)
    assert code == 0
    assert json.loads(out)["training"]["loss"] == Objective(model, loss_fn, data).loss()


def test_the_largest_seed(asam):
    assert asam("measure", "own:make", "--seed", 2**63 - 1, "--json", *QUICK)[0] == 0
    assert asam("landscape", "own:make", "--seed", 2**63 - 1, "--points", 3)[0] == 0


def test_only_so_many_examples(asam):
    code, out, _ = asam("measure", "own:make", "--examples", 21, "--json", *QUICK)
    assert (code, json.loads(out)["examples"]) == (0, 21)


def test_what_the_users_code_prints_is_no_part_of_the_json(asam):
    code, out, err = asam("measure", "own:talkative", "--json", *QUICK)
    assert (code, json.loads(out)["examples"]) == (0, 40)
    assert "hello" in err
    assert "again" in err


def test_a_shuffled_loader_gives_the_same_examples_to_every_network(asam, tmp_path):
    sys.path.insert(0, str(tmp_path))
    import own

    for name in ("one", "two"):
        torch.save(own.make()[0].state_dict(), tmp_path / f"{name}.pt")
    arguments = ["--model", "own:shuffled", "--examples", 60, "--points", 3, "--seed", 5]
    assert asam("landscape", "one.pt", "two.pt", *arguments)[0] == 0
    one, two = (LossPlane.load(tmp_path / "asam-landscape" / f"plane-{name}.npz") for name in ("one", "two"))
    assert torch.equal(one.values["loss"], two.values["loss"])


def test_bounds_need_two_examples(asam):
    code, out, _ = asam("measure", "own:make", "--examples", 1, "--json", *QUICK)
    assert (code, json.loads(out)["bounds"]) == (0, [])


def test_no_prior_where_running_statistics_know_the_sample(asam, runs):
    found = json.loads(asam("measure", runs / "sgd-cnn", "--json", *QUICK)[1])
    assert [bound["explanation"].split()[0] for bound in found["bounds"]] == ["SAM", "ASAM", "Held-out"]


def test_the_certificate_states_the_probability_of_all_three(asam, runs):
    found = json.loads(asam("measure", runs / "sgd-mlp", "--json", *QUICK)[1])
    assert {bound["delta"] for bound in found["bounds"]} == {0.05}


def test_many_eigenvalues(asam):
    code, out, _ = asam("measure", "own:make", "--json", "--samples", 2, "--steps", 2, "--eigenvalues", 200)
    assert code == 0
    assert all(len(row["value"]) == 50 for row in json.loads(out)["rows"] if "eigenvalues" in row["quantity"])


def test_networks_of_the_same_shapes_and_other_layers_have_no_way_between_them(asam, tmp_path):
    code, _, err = asam("landscape", "own:make", "own:tanh", "--points", 3)
    assert code == 0
    assert "no way from own:make to own:tanh: they are not of the same architecture" in err
    assert (tmp_path / "asam-landscape" / "plane-own-tanh.npz").exists()


def test_frozen_parameters_that_differ_have_no_way_between_them(asam, tmp_path):
    sys.path.insert(0, str(tmp_path))
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
    code, _, err = asam("landscape", "0.pt", "1.pt", "--model", "own:frozen", "--points", 3)
    assert code == 0
    assert "no way from 0 to 1: the models differ in '0.weight', which is not one of the" in " ".join(err.split())
    assert (tmp_path / "asam-landscape" / "plane-1.npz").exists()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_model_that_cannot_be_copied(asam, tmp_path):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.nn.utils.weight_norm(model[0])
    for name in ("one", "two"):
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    assert asam("measure", "one.pt", "--model", "own:uncopied", *QUICK)[0] == 0
    code, _, err = asam("landscape", "one.pt", "two.pt", "--model", "own:uncopied", "--points", 3)
    assert code == 2
    assert (
        err.strip().splitlines()[-1].startswith("asam: the model cannot be copied, so give one checkpoint at a time (")
    )


def test_a_backward_pass_of_the_users_own_that_fails(asam):
    code, _, err = asam("measure", "own:failing", *QUICK)
    assert code == 2
    assert "of the user's own making" in err.strip().splitlines()[-1]


def test_a_negative_loss_has_no_logarithm(asam, tmp_path):
    code, _, err = asam("landscape", "own:negative", "--points", 3)
    assert code == 2
    assert "asam: own:negative: the loss at the weights is -" in err.strip().splitlines()[-1]
    assert not (tmp_path / "asam-landscape").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_a_wrapped_model(asam, tmp_path, prefix):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save({f"{prefix}{name}": value for name, value in model.state_dict().items()}, tmp_path / "weights.pt")
    asked = ["measure", "weights.pt", "--model", "own:make", "--json", *QUICK]
    loss = json.loads(asam(*asked)[1])["training"]["loss"]
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert json.loads(asam(*asked)[1])["training"]["loss"] == loss


def test_what_the_user_named_is_printed_as_it_is(asam, tmp_path):
    _, out, err = asam("measure", "own:ok", *QUICK)
    assert out.startswith("own:ok: 50 parameters, ")
    for name in ("top[error] 0.25", "a[/b] 0.5", ":train: 0.75"):
        assert f"training {name}\n" in out
    assert "measuring own:ok" in err
    for folder in ("r[asam]", "x[/y]"):
        _, out, _ = asam("landscape", "own:ok", "--points", 3, "--out", folder)
        assert f"{folder}/plane-own-ok.npz" in out
        assert (tmp_path / folder / "plane-own-ok.npz").exists()


def test_without_second_derivatives_the_rest_is_measured(asam):
    reason = (
        "no eigenvalues and trace of H and THT: the loss has no second derivative: "
        "the derivative for '_embedding_bag_backward'"
    )
    code, out, _ = asam("measure", "own:bags", *QUICK)
    assert code == 0
    assert reason in " ".join(out.split())
    assert "adaptive, average case" in out
    assert "SAM bound" in out
    found = json.loads(asam("measure", "own:bags", *QUICK, "--json")[1])
    assert [each.startswith(reason) for each in found["left_out"]] == [True]
    assert not [row for row in found["rows"] if "H" in row["quantity"]]
    assert json.loads(asam("measure", "own:make", *QUICK, "--json")[1])["left_out"] == []


def test_where_the_hessian_is_not_finite_the_rest_is_measured(asam):
    code, out, _ = asam("measure", "own:steep", *QUICK, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["left_out"] == [
        "no eigenvalues and trace of H: a product of the operator is not finite: it has no eigenvalues"
    ]
    assert [row["quantity"] for row in found["rows"] if "THT" in row["quantity"]] == [
        "top eigenvalues of THT",
        "trace of THT",
    ]


def test_a_share_of_something_else_than_examples_has_no_held_out_bound(asam):
    code, out, _ = asam("measure", "own:of_tokens", *QUICK)
    assert code == 0
    assert "no held-out bound: the mean 'error' does not count examples" in " ".join(out.split())
    assert "Held-out bound" not in out


def test_what_forces_its_way_and_is_refused_leaves_what_was_there(asam, tmp_path):
    assert asam("landscape", "own:make", "--points", 3)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "asam-landscape").iterdir()}
    code, _, err = asam("landscape", "own:positions", "--points", 3, "--force")
    assert code == 2
    assert err.strip().splitlines()[-1] == "asam: a mean may not be called 'positions'"
    assert {path.name: path.read_bytes() for path in (tmp_path / "asam-landscape").iterdir()} == before


def test_a_landscape_that_cannot_be_written_leaves_nothing(asam, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "landscape.html")

    monkeypatch.setattr("asam.experiments.landscapes.landscape_page", full)
    code, _, err = asam("landscape", "own:make", "--points", 3)
    assert code == 2
    assert err.strip().splitlines()[-1] == "asam: landscape.html: No space left on device"
    assert not (tmp_path / "asam-landscape").exists()


def test_runs_of_asam_train_are_called_as_their_folders(asam, runs, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for suffix in (".json", ".pt"):
            shutil.copy(runs / f"sgd-mlp{suffix}", tmp_path / folder / f"run{suffix}")
            shutil.copy(runs / f"sgd-mlp{suffix}", tmp_path / folder / f"$a_{{$<b>{suffix}")
    (tmp_path / "one" / "inside").mkdir()
    code, out, _ = asam("landscape", "one/inside/../run", "two/run.json", "--points", 3, "--examples", 20)
    assert code == 0
    assert "way-one-to-two.npz" in out
    assert asam("measure", "one/run", *QUICK, "--examples", 20)[1].startswith("one: 26,122 parameters")
    # neither a formula nor markup
    assert asam("landscape", "one/$a_{$<b>", "--points", 3, "--examples", 20, "--out", "plain")[0] == 0
    assert "$a_{$&lt;b&gt;" in (tmp_path / "plain" / "landscape.html").read_text()


def test_networks_of_different_architecture_have_no_way_between_them(asam, runs):
    _, _, err = asam("landscape", runs / "sgd-mlp", runs / "sgd-cnn", "--points", 3)
    assert "no way from sgd-mlp to sgd-cnn: they are not of the same architecture" in err


def test_m_sharpness_has_a_standard_error(asam):
    code, out, _ = asam("measure", "own:make", "--m", 8, "--json", *QUICK)
    assert code == 0
    assert all(row["stderr"] > 0 for row in json.loads(out)["rows"] if "worst" in row["quantity"])


def test_normalized_logits_change_the_loss_and_not_the_error(asam, runs):
    plain, normalized = (
        json.loads(asam("measure", runs / "sgd-mlp", "--json", *QUICK, *option)[1])["training"]
        for option in ([], ["--normalize-logits"])
    )
    assert plain["error"] == normalized["error"]
    assert plain["loss"] != normalized["loss"]


def test_landscape_of_runs(asam, runs, tmp_path):
    names = ["sgd-mlp", "asam-mlp", "sgd-cnn"]
    code, out, _ = asam("landscape", *(runs / name for name in names), "--points", 5, "--out", "slices")
    assert code == 0
    files = {file.name for file in (tmp_path / "slices").iterdir()}
    assert files == {
        *(f"{kind}-{name}.npz" for kind in ("plane", "line") for name in names),
        "way-sgd-mlp-to-asam-mlp.npz",  # the cnn is of another architecture
        *("planes.svg", "lines.svg", "landscape.html"),
    }
    assert all(name in out for name in files)
    outcome = json.loads((runs / "sgd-mlp.json").read_text())["outcome"]
    plane = LossPlane.load(tmp_path / "slices" / "plane-sgd-mlp.npz")
    assert plane.x[2] == plane.y[2] == 0
    assert 100 * plane.values["error"][2, 2] == pytest.approx(outcome["train_error"])
    way = np.load(tmp_path / "slices" / "way-sgd-mlp-to-asam-mlp.npz")
    assert way["loss"][0] == plane.values["loss"][2, 2]
    page = (tmp_path / "slices" / "landscape.html").read_text()
    assert "<script src" not in page
    assert all(name in page for name in names)


def test_a_landscape_is_not_overwritten_without_force(asam, tmp_path):
    assert asam("landscape", "own:make", "--points", 3)[0] == 0
    (tmp_path / "asam-landscape" / "mine.txt").write_text("kept")
    before = (tmp_path / "asam-landscape" / "landscape.html").stat().st_mtime_ns
    code, _, err = asam("landscape", "own:make", "--points", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "--force" in err
    assert (tmp_path / "asam-landscape" / "landscape.html").stat().st_mtime_ns == before
    assert asam("landscape", "own:make", "--points", 3, "--force")[0] == 0
    assert (tmp_path / "asam-landscape" / "mine.txt").read_text() == "kept"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "landscape.html").write_text("mine")
    code, _, err = asam("landscape", "own:make", "--points", 3, "--out", "foreign", "--force")
    message = "foreign/landscape.html would be overwritten and is of something else: choose another --out"
    assert (code, err) == (2, f"asam: {message}\n")
    assert (tmp_path / "foreign" / "landscape.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure"], "Missing argument 'target'"),
        (["measure", "nothing"], "nothing is not a run of asam compare or asam train, and there is no such file"),
        (["measure", "own.py"], "name the function that makes its model with --model module:function"),
        (["measure", "nothing.pt", "--model", "own:make"], "there is no checkpoint nothing.pt"),
        (
            ["measure", "own.py", "--model", "own:make"],
            "own.py is not a checkpoint of tensors alone (UnpicklingError): save model.state_dict()",
        ),
        (["measure", "other.pt", "--model", "own:make"], "the checkpoint does not fit the model"),
        (["measure", "list.pt", "--model", "own:make"], "list.pt holds no state dict"),
        (["measure", "pickle.pt", "--model", "own:make"], "pickle.pt is not a checkpoint of tensors alone"),
        (["measure", "own:nothing"], "own:nothing: AttributeError"),
        (["measure", "nowhere:make"], "nowhere:make: ModuleNotFoundError"),
        (["measure", ":make"], "a function is named module:function, got ':make'"),
        (["measure", "own:wrong"], "own:wrong: it must return (model, loss_fn, data)"),
        (["measure", "own:broken"], "own:broken: OSError: no such data"),
        (["measure", "own:exits"], "own:exits: SystemExit: 3"),
        (["measure", "own:faulty"], "own:faulty: the loss raised KeyError: 'labels'"),
        (["measure", "own:percent"], "own:percent: the mean 'error' must be a share of the examples, in [0, 1], got"),
        (["measure", "own:tensor_held_out"], "own:tensor_held_out: TypeError: data must be an iterable of batches"),
        (["measure", "empty.pt", "--model", "own:make"], "empty.pt is not a checkpoint of tensors alone"),
        (["measure", "own:make", "--rho", "1e200"], "--rho must be a number > 0 and < 1e+18"),
        (["landscape", "own:nan"], "own:nan: the loss at the weights is nan"),
        (
            ["measure", "own:reentrant"],
            "the loss has no gradient of parameters behind torch.utils.checkpoint with use_reentrant=True",
        ),
        (["measure", "empty"], "empty is a folder without runs"),
        (["landscape", "m one.pt", "m-one.pt", "--model", "own:make"], "two targets are called m-one"),
        (["measure", "own:dropout"], "the loss is not deterministic"),
        (["measure", "own:make", "--normalize-logits"], "--normalize-logits is for runs"),
        (["measure", "own:make", "--rho", "-1"], "--rho must be a number > 0 and < 1e+18, got -1"),
        (["measure", "own:make", "--adaptive-rho", "nan"], "--adaptive-rho must be a number > 0 and < 1e+18, got nan"),
        (["measure", "own:make", "--eta", "-1"], "--eta must be a number >= 0 and < 1e+18, got -1"),
        (["measure", "own:make", "--samples", "3"], "--samples must be even, got 3"),
        (["measure", "own:make", "--seed", str(2**63)], f"seed must be at least 0 and less than 2**63, got {2**63}"),
        (["landscape", "own:make", "--seed", "-1"], "seed must be at least 0 and less than 2**63, got -1"),
        (["landscape", "own:make", "--points", "1002"], "Invalid value for '--points'"),
        (["measure", "own:make", "--steps", "0"], "Invalid value for '--steps'"),
        (["measure", "own:make", "--bias", "free"], "Invalid value for '--bias'"),
        (["landscape"], "Missing argument 'targets'"),
        (["landscape", "own:make", "own:make"], "two targets are called own-make"),
        (["landscape", "own:make", "--span", "inf"], "--span must be a number > 0 and < 1e+18, got inf"),
        (["landscape", "own:make", "--out", "own.py"], "own.py is a file: choose another --out"),
        (["landscape", "own:make", "--out", "own.py/slices"], "own.py is a file: choose another --out"),
        (["landscape", "own:dropout"], "the loss is not deterministic"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(asam, tmp_path, arguments, message):
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty").mkdir()
    for name in ("m one.pt", "m-one.pt"):
        torch.save(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict(), tmp_path / name)
    code, out, err = asam(*arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert message in last
    assert last.startswith("asam: ")
    assert out == ""
    assert not (tmp_path / "asam-landscape").exists()


def test_a_folder_of_runs_is_not_a_run(asam, runs):
    code, _, err = asam("measure", runs.parent)
    assert code == 2
    assert f"{runs.parent} is a folder: name one of its runs, such as {runs / 'asam-mlp'}" in err


@pytest.mark.parametrize("content", ["{", "{}", '{"run": {"method": "adam"}}', '{"run": {"speed": 1}}', "[]"])
def test_a_file_that_is_not_a_run(asam, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    code, _, err = asam("measure", "run.json")
    assert code == 2
    assert "run.json is not a run of asam compare or asam train" in err


@pytest.mark.parametrize("command", ["measure", "landscape"])
def test_help_fits_80_columns(asam, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = asam(command, "--help")
    assert code == 0
    assert "--examples" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, pytest.param(420, marks=pytest.mark.slow)])
def test_the_landscape_page_in_a_browser(asam, browser, runs, tmp_path, width):
    assert asam("landscape", runs / "sgd-mlp", runs / "asam-mlp", "--points", 5)[0] == 0
    page = browser(tmp_path / "asam-landscape" / "landscape.html", width)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    surfaces, lines = (
        page.execute_script(
            f"return [...document.querySelectorAll('.plot.{kind} {drawn}')].map(e => e.getBoundingClientRect().width)"
        )
        for kind, drawn in (("surface", "canvas"), ("lines", ".main-svg:first-child"))
    )
    assert (len(surfaces), len(lines)) == (2, 2)
    assert all(200 < drawn < width for drawn in [*surfaces, *lines])
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    # turning one surface turns the other
    page.execute_script(
        "Plotly.relayout(document.querySelector('.surface'), {'scene.camera': {eye: {x: 2, y: 1, z: 0.5}}})"
    )
    page.set_script_timeout(20)
    eye = page.execute_async_script(
        "const done = arguments[0]; const other = document.querySelectorAll('.surface')[1];"
        "(function look() { const eye = other.layout.scene.camera.eye;"
        "eye.x == 2 ? done(eye) : setTimeout(look, 50) })()"
    )
    assert (eye["x"], eye["y"], eye["z"]) == (2, 1, 0.5)
