"""Tuning and confirming, with outcomes that are made up."""

import math

import pytest

from asam.experiments.run import Run
from asam.experiments.studies.tuned import FIRST_TUNING_SEED, Method, Tuning
from asam.experiments.study import CONTRADICTED, REPRODUCES

RHOS = (0.5, 1.0, 2.0)
SGD = Method("SGD")
FIXED = Method("SAM", {"method": "sam"}, "rho", (0.05,))
TUNED = Method("ASAM", {"method": "asam"}, "rho", RHOS)
GROUPS = {"clean": Run("sgd"), "noisy": Run("sgd", noise=0.4)}


def tuning(**changes):
    return Tuning(**{"groups": GROUPS, "methods": [SGD, FIXED, TUNED], "seeds": 3, "tuning_seeds": 2, **changes})


def outcomes(runs, metric):
    """An outcome for every run; ``metric`` gives the validation error, and the test error is its opposite."""
    return {
        name: {"validation_error": metric(name, run), "test_error": 100 - metric(name, run)}
        for name, run in runs.items()
    }


def split(runs):
    """Tuning and confirming runs."""
    return ({name: run for name, run in runs.items() if ("/tuning" in name) is kind} for kind in (True, False))


def everything(study, metric):
    """Plan and perform until all is done: the runs and their outcomes."""
    done = {}
    while not (runs := study.plan(done)).keys() <= done.keys():
        done |= outcomes({name: run for name, run in runs.items() if name not in done}, metric)
    return runs, done


def test_what_needs_tuning_is_confirmed_when_its_tuning_is_complete():
    study = tuning()
    first = study.plan({})
    searched, confirmed = split(first)
    assert len(searched) == len(GROUPS) * len(RHOS) * 2
    assert {(run.method, run.rho) for run in searched.values()} == {("asam", rho) for rho in RHOS}
    assert {run.method for run in confirmed.values()} == {"sgd", "sam"}
    assert list(first)[: len(searched)] == list(searched)  # tuning comes first: others wait for it
    done = outcomes({name: run for name, run in searched.items() if name.startswith("clean/")}, lambda *_: 1.0)
    last = done.popitem()
    assert study.plan(done) == first
    second = study.plan(done | dict([last]))
    assert sorted(second.keys() - first.keys()) == [f"clean/ASAM/seed{seed}" for seed in range(3)]
    assert first.items() <= second.items()


def test_names_and_seeds():
    runs, _ = everything(tuning(), lambda name, run: run.rho)
    searched, confirmed = split(runs)
    assert {run.seed for run in searched.values()} == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    assert {run.seed for run in confirmed.values()} == {0, 1, 2}
    assert len(runs) == len(GROUPS) * (len(RHOS) * 2 + 3 * 3)
    assert len(set(runs.values())) == len(runs)  # no name stands for the run of another
    for name, run in runs.items():
        assert run.noise == (0.4 if name.startswith("noisy/") else 0.0)
        assert name.endswith(f"seed{run.seed}") or name.endswith(
            f"rho={run.rho:g}/tuning{run.seed - FIRST_TUNING_SEED}"
        )
        run.check()


def test_seeds_do_not_overlap_however_many_are_asked_for():
    searched, confirmed = split(tuning(seeds=FIRST_TUNING_SEED).plan({}))
    assert not {run.seed for run in searched.values()} & {run.seed for run in confirmed.values()}


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, {"clean": 2.0, "noisy": 0.5}), (False, {"clean": 0.5})])
def test_the_choice_is_the_best_mean_of_the_validation_metric(lower_is_better, best):
    by_group = {"clean": (7.0, 6.0, 5.0), "noisy": (4.0, 6.0, 5.0)}

    def metric(name, run):
        if run.method != "asam":
            return 50.0
        # the two seeds are far apart, and the best single one (seed 0 of rho = 1) is not of the best mean
        spread = (-3.0 if run.rho == 1.0 else -1.0) * (1 if run.seed % 2 == 0 else -1)
        return by_group[name.split("/")[0]][RHOS.index(run.rho)] + spread

    study = tuning(lower_is_better=lower_is_better)
    runs, done = everything(study, metric)
    for group, rho in best.items():
        assert study.choice(group, TUNED, done) == rho
        assert {run.rho for name, run in runs.items() if name.startswith(f"{group}/ASAM/seed")} == {rho}


def test_confirming_runs_and_test_errors_have_no_part_in_the_choice():
    study = tuning()
    runs, done = everything(study, lambda name, run: run.rho)
    before = {group: study.choice(group, TUNED, done) for group in GROUPS}
    assert before == {"clean": 0.5, "noisy": 0.5}
    for name in runs:
        done[name]["test_error"] = 0.0 if "rho=2" in name else 99.0
        if "/seed" in name:
            done[name]["validation_error"] = 0.0 if "ASAM" in name else 99.0
    assert {group: study.choice(group, TUNED, done) for group in GROUPS} == before


def test_another_metric():
    study = tuning(metric="validation_loss")
    searched, _ = split(study.plan({}))
    done = {name: {"validation_loss": abs(run.rho - 1), "validation_error": run.rho} for name, run in searched.items()}
    assert study.choice("clean", TUNED, done) == 1.0


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_value_that_diverged_is_not_chosen(lower_is_better):
    study = tuning(lower_is_better=lower_is_better)
    searched, _ = split(study.plan({}))
    done = outcomes(searched, lambda name, run: math.nan if run.rho == 0.5 and run.seed % 2 else 1.0 + (run.rho == 2))
    assert study.choice("clean", TUNED, done) == (1.0 if lower_is_better else 2.0)


def test_tuned_in_one_group_for_all():
    study = tuning(tune_in="noisy")
    runs, done = everything(study, lambda name, run: -run.rho)
    searched, confirmed = split(runs)
    assert {name.split("/")[0] for name in searched} == {"noisy"}
    assert {name.split("/")[0] for name in confirmed} == {"clean", "noisy"}
    assert {run.rho for run in confirmed.values() if run.method == "asam"} == {2.0}
    assert {run.noise for name, run in confirmed.items() if name.startswith("clean/ASAM")} == {0.0}
    assert study.choice("clean", TUNED, done) == study.choice("noisy", TUNED, done) == 2.0


def test_a_single_value_is_taken_and_nothing_is_tuned_without_values():
    runs = tuning(methods=[SGD, FIXED], tuning_seeds=0).plan({})
    assert not [name for name in runs if "tuning" in name]
    assert {(run.method, run.rho) for run in runs.values()} == {("sgd", 0.0), ("sam", 0.05)}
    assert tuning().choice("clean", SGD, {}) is None
    assert tuning().choice("clean", FIXED, {}) == 0.05


def test_what_is_reported_is_of_the_confirming_runs():
    study = tuning()
    _, done = everything(study, lambda name, run: 50.0 - run.rho if "tuning" in name else 20.0 + run.seed + run.rho)
    assert study.values("clean", "ASAM", done) == [78.0, 77.0, 76.0]
    assert study.values("clean", "ASAM", done, "validation_error") == [22.0, 23.0, 24.0]
    better, worse = (study.finding("clean", *pair, done, " here") for pair in (("ASAM", "SGD"), ("SGD", "ASAM")))
    assert (better.verdict, worse.verdict) == (REPRODUCES, CONTRADICTED)
    assert better.claim == "ASAM has a lower test error than SGD here"
    assert (better.estimate, better.n) == (-2.0, 3)
    assert better.quantity == "difference in points, better on 3 of 3 seeds"
    assert study.headings() == ("method", "clean: test error %", "chosen", "noisy: test error %", "chosen")
    assert study.rows(done) == [
        ("SGD", *(("79.0 ± 1.0", "") * 2)),
        ("SAM", *(("79.0 ± 1.0", "0.05") * 2)),
        ("ASAM", *(("77.0 ± 1.0", "2 (edge)") * 2)),
    ]
