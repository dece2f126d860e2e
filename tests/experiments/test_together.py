"""Runs trained as one: each goes the way that it goes alone, and each is done once."""

import pytest
import torch

from asam import Geometry
from asam.experiments import runs as runs_module
from asam.experiments.database import file_url
from asam.experiments.run import Run
from asam.experiments.runs import Runs, Together
from asam.experiments.together import alike, maximizers, train_together
from asam.experiments.training import train

BASE = Run("asam", epochs=2, train_size=200)
SCALES = [("elementwise", "unscaled"), ("elementwise", "fixed"), ("filterwise", "scaled"), ("layerwise", "unscaled")]


@pytest.mark.parametrize(("normalization", "bias"), SCALES)
def test_each_ascends_in_its_own_ball(normalization, bias):
    geometry = Geometry(normalization, eta=0.01, bias=bias)
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (3, 5, 4), "0.bias": (3, 5), "1.weight": (3, 2, 5)}
    weights = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    grads = [torch.randn(shape, generator=generator).double() for shape in shapes.values()]
    rhos = torch.tensor([0.1, 3.0, 0.5], dtype=torch.float64)

    found = maximizers(geometry, weights, grads, rhos)

    for i, rho in enumerate(rhos.tolist()):
        one = geometry.maximizer(
            {name: weight[i] for name, weight in weights.items()},
            {name: grad[i] for name, grad in zip(weights, grads, strict=True)},
            rho,
        )
        for name, e in zip(weights, found, strict=True):
            torch.testing.assert_close(e[i], one[name], rtol=1e-12, atol=1e-14)


def test_without_a_slope_nothing_is_perturbed():
    grads = [torch.tensor([[0.0, 0.0], [3.0, 4.0]])]
    found = maximizers(Geometry("none"), {"weight": torch.ones(2, 2)}, grads, torch.ones(2))
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize(
    "base",
    [
        BASE.but(method="sgd"),
        BASE.but(method="sam", rho=0.1),
        BASE.but(rho=1.0),
        BASE.but(rho=0.5, normalization="filterwise", bias="scaled", label_smoothing=0.1, schedule="constant"),
    ],
    ids=lambda run: f"{run.method}-{run.normalization}",
)
def test_each_is_trained_as_it_is_alone(base):
    several = [base, base.but(seed=1, rho=2 * base.rho), base.but(seed=2, noise=0.4), base.but(seed=1, scale=3.0)]
    for run, found in zip(several, train_together(several), strict=True):
        alone = train(run)[0]
        assert set(found) == set(alone)
        assert found["seconds_per_step"] > 0
        assert found["test_error"] == pytest.approx(alone["test_error"], abs=0.2)  # two of 1000 examples
        assert found["loss_gap"] == pytest.approx(alone["loss_gap"], rel=1e-3, abs=1e-5)
        assert found["curves"].keys() == alone["curves"].keys()
        for name, curve in alone["curves"].items():
            assert found["curves"][name] == pytest.approx(curve, abs=1.0)  # two of 200


def test_what_is_evaluated_seldom():
    run = BASE.but(rho=1.0, evaluate_every=2, epochs=3)
    found = train_together([run, run.but(seed=1)])
    assert [len(outcome["curves"]["test_error"]) for outcome in found] == [2, 2]  # after epochs 2 and 3


def test_a_run_that_diverges_takes_no_other_along():
    several = [BASE.but(rho=1e30), BASE.but(rho=1.0)]
    wild, tame = train_together(several)
    assert wild["loss_gap"] != wild["loss_gap"]
    assert tame["loss_gap"] == pytest.approx(train(several[1])[0]["loss_gap"], rel=1e-3, abs=1e-5)


def test_what_may_be_trained_as_one():
    run = BASE.but(rho=1.0)
    for own in ({"seed": 3}, {"rho": 2.0}, {"noise": 0.2}, {"scale": 2.0}):
        assert alike(run) == alike(run.but(**own)) is not None
    for other in ({"method": "sam"}, {"lr": 0.1}, {"epochs": 3}, {"weight_decay": 0.0}, {"bias": "fixed"}):
        assert alike(run.but(**other)) not in (None, alike(run))
    for alone in (
        {"model": "cnn"}, {"dropout": 0.1}, {"optimizer": "adamw"}, {"p": 3.0}, {"clip": 1.0}, {"every": 2},
        {"ascent_share": 0.5}, {"perturb": "weights"}, {"device": "cuda"}, {"method": "economical"},
    ):  # fmt: skip
        assert alike(run.but(**alone)) is None


@pytest.fixture
def storage(tmp_path):
    return Runs(file_url(tmp_path / "runs.sqlite3"), "study")


def doing(performed):
    """Runs of one learning rate are alike, those of 1.0 are not; what was performed at once."""

    def perform(several):
        performed.append([run.seed for run in several])
        return [{"seed": run.seed} for run in several]

    return Together(lambda run: None if run.lr == 1.0 else run.lr, perform)


def alone(run):
    return {"seed": run.seed}


def test_of_runs_that_are_alike_ten_at_most_are_performed_at_once(storage, monkeypatch):
    monkeypatch.setattr(runs_module.random, "Random", lambda: type("First", (), {"randrange": lambda self, n: 0})())
    rates = [0.1] * 12 + [0.2] * 3 + [1.0] * 2
    planned = {f"run-{seed}": Run(seed=seed, lr=lr) for seed, lr in enumerate(rates)}
    performed, done = [], []
    storage.work(planned, alone, lambda: done.append(1), doing(performed))
    assert performed == [list(range(10)), [10, 11], [12, 13, 14]]
    assert len(done) == 17
    assert storage.outcomes() == {name: alone(run) for name, run in planned.items()}
    assert {record["name"]: record["together"] for record in storage.records()} == {
        f"run-{seed}": 10 if seed < 10 else 2 if seed < 12 else 3 if seed < 15 else 1 for seed in range(17)
    }


def test_what_another_worker_claims_is_left_to_it(storage, monkeypatch):
    planned = {f"run-{seed}": Run(seed=seed) for seed in range(6)}
    claim, performed, theirs = storage._claim, [], []

    def late(trial):
        if trial == storage._live()["run-3"]._trial_id and not theirs:
            theirs.append(trial)
            other = Runs(storage._url, "study")
            assert other._claim(trial)
            other._perform({"run-3": trial}, lambda names: [{"seed": 33}], lambda: None)
        return claim(trial)

    monkeypatch.setattr(storage, "_claim", late)
    storage.work(planned, alone, together=doing(performed))
    assert 3 not in [seed for group in performed for seed in group]
    assert storage.outcomes() == {name: {"seed": 33 if name == "run-3" else run.seed} for name, run in planned.items()}


def test_a_failure_gives_all_of_them_back(storage):
    planned = {f"run-{seed}": Run(seed=seed) for seed in range(3)}

    def fail(several):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        storage.work(planned, alone, together=Together(lambda run: run.lr, fail))
    assert storage.outcomes() == {}
    storage.work(planned, alone, together=doing([]))
    assert storage.outcomes() == {name: alone(run) for name, run in planned.items()}
