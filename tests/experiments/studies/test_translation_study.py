"""The study of translation in miniature, and what it makes of given outcomes."""

from dataclasses import replace

import pytest
from sentence_pairs import write_pairs

from asam.experiments import InputError
from asam.experiments.reproduce import configured
from asam.experiments.studies.translation import STUDY
from asam.experiments.study import CONTRADICTED, REPRODUCES, UNDECIDED

GIVEN = {
    "Adam": ([20.0, 21.0, 22.0], 2.0),
    "Adam, twice the epochs": ([22.0, 23.0, 24.0], 1.8),
    "Adam + SAM": ([20.4, 20.6, 22.2], 1.9),
    "Adam + ASAM": ([20.5, 21.6, 22.5], 1.9),
}


@pytest.fixture
def settings(tmp_path):
    folder = write_pairs(tmp_path, 30, 6, 6)
    return replace(STUDY.settings["quick"], seeds=2, data_dir=str(folder), train_size=None, test_size=None)


def outcomes(settings, given):
    """Outcomes made up, for which the second rho of SAM and of ASAM is the better one."""
    rhos = {"Adam + SAM": settings.rho_sam, "Adam + ASAM": settings.rho_asam}
    found = {
        f"translation/{method}/rho={rho:g}/tuning0": {"validation_loss": 2.0 - (i == 1), "test_bleu": 50.0 - i}
        for method, values in rhos.items()
        for i, rho in enumerate(values)
    }
    for method, (bleus, loss) in given.items():
        for seed, bleu in enumerate(bleus):
            outcome = {"test_bleu": bleu, "validation_bleu": bleu - 1, "validation_loss": loss}
            found[f"translation/{method}/seed{seed}"] = outcome
    return found


def test_two_stages_from_plan_to_findings(settings):
    first = STUDY.plan(settings, {})
    assert sorted({run.method for name, run in first.items() if "tuning" not in name}) == ["sgd"]
    assert {run.epochs for run in first.values()} == {settings.epochs, 2 * settings.epochs}
    done = {name: STUDY.perform(run) for name, run in first.items()}
    second = STUDY.plan(settings, done)
    assert len(second) == 4 + 2 * 2 + 4  # Adam twice, the tuning, SAM and ASAM
    tuning, confirming = ({run.seed for n, run in second.items() if ("tuning" in n) == kind} for kind in (True, False))
    assert not tuning & confirming
    done |= {name: STUDY.perform(run) for name, run in second.items() if name not in done}
    found = STUDY.report(settings, done)
    assert [finding.n for finding in found.findings] == [2, 2, 2]
    assert [row[0] for row in found.tables[0].rows] == list(GIVEN)
    assert all(method in found.figures[0].svg for method in GIVEN)


def test_validation_data_of_other_seeds_chooses_rho(settings):
    planned = STUDY.plan(settings, outcomes(settings, {}))
    chosen = {(run.method, run.rho) for name, run in planned.items() if "tuning" not in name and run.method != "sgd"}
    assert chosen == {("sam", settings.rho_sam[1]), ("asam", settings.rho_asam[1])}


def test_verdicts_and_table(settings):
    settings = replace(settings, seeds=3)
    found = STUDY.report(settings, outcomes(settings, GIVEN))
    assert [finding.verdict for finding in found.findings] == [REPRODUCES, CONTRADICTED, UNDECIDED]
    adam, twice, sam = found.findings
    assert adam.estimate == pytest.approx(1.6 / 3)
    assert "better on 3 of 3 seeds" in adam.quantity
    assert "better on 0 of 3 seeds" in twice.quantity
    assert sam.low < 0 < sam.high
    assert found.tables[0].rows[0] == ("Adam", "21.00 ± 1.00", "20.00 ± 1.00", "2.000 ± 0.000", "")
    assert found.tables[0].rows[3][4] == f"{settings.rho_asam[1]:g}"


def test_the_scale_of_the_paper_needs_its_data(tmp_path):
    with pytest.raises(InputError, match=r"needs IWSLT'14 .* --data-dir"):
        configured(STUDY, "paper")
    with pytest.raises(InputError, match=r"train\.de cannot be read"):
        configured(STUDY, "paper", data_dir=str(tmp_path))
    settings = configured(STUDY, "paper", data_dir=str(write_pairs(tmp_path)))
    runs = STUDY.plan(settings, {}).values()
    assert {(run.method, run.rho) for run in runs} == {("sgd", 0.0), ("sam", 0.1), ("asam", 0.2)}
    for run in runs:
        run.check()
        assert (run.lr, run.beta2, run.dropout, run.weight_decay, run.label_smoothing) == (5e-4, 0.98, 0.3, 1e-4, 0.1)
        assert (run.optimizer, run.schedule, run.warmup, run.model) == (
            "adam",
            "inverse-sqrt",
            4000,
            "transformer-iwslt",
        )
