"""`asam measure` as a user meets it: on runs, on a model of their own, with wrong arguments (`asam landscape` too)."""

import json
import math
import shutil
import sys

import pytest
import torch
from torch import nn

from asam.measure import Geometry, Objective, hessian, worst_case_sharpness

QUICK = ["--samples", "2", "--steps", "3", "--eigenvalues", "1"]


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
