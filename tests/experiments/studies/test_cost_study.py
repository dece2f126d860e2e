"""Error against cost: what is counted, and what of ASAM's gain is kept."""

from dataclasses import replace

import numpy as np
import pytest

from asam.experiments import InputError
from asam.experiments.studies import cost
from asam.experiments.study import CONTRADICTED, REPRODUCES

SETTINGS = cost.Settings((cost.Part("digits", "digits", "mlp", 0.4, 0.03, 8, (1.0, 2.0, 3.0), 0.1, seeds=6),), 1)


def outcomes_of(errors, seconds):
    """Made-up outcomes: the errors and times of a method by its label; the middle rho is the best."""
    outcomes = {}
    while True:
        planned = cost.STUDY.plan(SETTINGS, outcomes)
        if planned.keys() <= outcomes.keys():
            return outcomes
        for name, run in planned.items():
            if isinstance(run, cost.Timing):
                outcomes[name] = seconds
                continue
            label = name.split("/")[1]
            size = run.momentum_rho or run.rho
            outcomes.setdefault(
                name,
                {
                    "test_error": errors[label] + 0.01 * run.seed,
                    "validation_error": abs(size / 2 - 1),
                },
            )


def labels():
    return [method.label for method in cost._tuning(SETTINGS, SETTINGS.parts[0]).methods]


def test_gain_kept_and_its_verdicts():
    errors = dict.fromkeys(labels(), 12.0) | {"Plain": 30.0, "ASAM": 10.0, cost.ECONOMICAL[0.1]: 9.0}
    seconds = dict.fromkeys(labels(), 2.0) | {"Plain": 1.0, cost.ECONOMICAL[0.1]: 1.09}
    found = cost.STUDY.report(SETTINGS, outcomes_of(errors, seconds))
    by_claim = {item.claim: item for item in found.findings}
    kept = by_claim["Economical, 10 % exact keeps 98 % of ASAM's gain: digits"]
    assert kept.verdict == REPRODUCES
    assert kept.estimate == pytest.approx(105.0)
    assert "1.09 of plain training's time" in kept.quantity
    lost = by_claim["Economical, 25 % exact keeps 98 % of ASAM's gain: digits"]
    assert lost.verdict == CONTRADICTED
    assert lost.estimate == pytest.approx(90.0)


def test_without_a_gain_there_is_nothing_to_keep():
    found = cost.STUDY.report(SETTINGS, outcomes_of(dict.fromkeys(labels(), 9.0), dict.fromkeys(labels(), 1.0)))
    assert [item.verdict for item in found.findings] == [CONTRADICTED]


def test_gradients_and_time_are_those_of_the_whole_training():
    seconds = dict.fromkeys(labels(), 3.0) | {"Plain": 2.0}
    found = cost.STUDY.report(SETTINGS, outcomes_of(dict.fromkeys(labels(), 9.0), seconds))
    rows = {row[0]: row[1:3] for row in found.tables[0].rows}

    def shown(gradients, time):  # the made-up seconds are the same for all seeds
        return gradients, f"{time} [{time}, {time}]"

    assert rows["Plain"] == shown("1.00", "1.00")
    assert rows["Plain, 1.25 times the epochs"] == shown("1.25", "1.88")
    assert rows["Plain, twice the epochs"] == shown("2.00", "3.00")
    assert rows["SAM"] == rows["ASAM"] == shown("2.00", "1.50")
    assert rows["ASAM, every 5th step"] == shown("1.20", "1.50")
    assert rows["ASAM, every 5th step, quarter batch"] == shown("1.05", "1.50")
    assert rows["ASAM, every 10th step"] == shown("1.10", "1.50")
    assert rows["ASAM, quarter batch"] == shown("1.25", "1.50")
    assert rows[cost.AGAINST] == rows[cost.MOMENTUM] == shown("1.00", "1.50")
    assert [rows[label][0] for label in cost.ECONOMICAL.values()] == ["1.10", "1.25"]


def test_time_is_taken_of_whole_schedules_side_by_side(monkeypatch):
    part = SETTINGS.parts[0].but(train_size=150, epochs=12, warmup=8)
    timing = cost.STUDY.plan(cost.Settings((part,), 1), {})["digits/time/seed3"]
    assert list(timing.runs) == labels()
    assert {(run.seed, run.epochs, run.warmup) for run in timing.runs.values()} == {(3, 3, 2)}
    assert timing.runs["ASAM, every 10th step"].every == 10
    turns = []
    advance = cost.Training.advance

    def watched(training, epochs):
        before = training.step
        advance(training, epochs=epochs)
        turns.append((training.run, training.step - before))

    monkeypatch.setattr(cost.Training, "advance", watched)
    seconds = cost.STUDY.perform(timing)
    assert list(seconds) == labels()
    assert min(seconds.values()) > 0
    assert {steps for _, steps in turns} == {3}  # epochs of 150 examples in batches of 50
    rounds = [[run for run, _ in turns[start : start + len(seconds)]] for start in range(0, len(turns), len(seconds))]
    assert len(rounds) == 3
    for turn in rounds:
        assert sorted(map(str, turn)) == sorted(map(str, timing.runs.values()))
    assert rounds[0] != rounds[1]


def test_the_interval_of_the_gain_kept():
    rng = np.random.default_rng(1)
    sgd, form, asam = (list(mean + rng.normal(size=30)) for mean in (30, 12, 10))
    estimate, low, high = cost.kept(sgd, form, asam)
    assert estimate == pytest.approx(90, abs=2)
    assert low < 90 < high
    assert high - low < 10


def test_runs_of_the_forms_are_what_they_say():
    runs = cost.STUDY.plan(SETTINGS, outcomes_of(dict.fromkeys(labels(), 9.0), dict.fromkeys(labels(), 1.0)))
    for run in runs.values():
        for each in run.runs.values() if isinstance(run, cost.Timing) else [run]:
            each.check()
    own, theirs = (runs[f"digits/{label}/seed0"] for label in (cost.AGAINST, cost.MOMENTUM))
    assert (own.method, own.exact, own.memory, own.momentum_rho) == ("economical", 0.0, "own", 2.0)
    assert theirs == own.but(memory="optimizer")
    assert runs["digits/ASAM/seed0"].rho == 2.0


def test_the_folder_is_for_the_data_that_needs_one():
    laptop = replace(cost.STUDY.settings["laptop"], data_dir="data")
    runs = [run for run in cost.STUDY.plan(laptop, {}).values() if not isinstance(run, cost.Timing)]
    folders = {run.dataset: run.data_dir for run in runs}
    assert folders == {"digits": None, "fashion-mnist": "data", "glyphs": "data"}
    with pytest.raises(InputError, match="digits come with scikit-learn: leave --data-dir out"):
        cost.STUDY.check(replace(SETTINGS, data_dir="data"))
