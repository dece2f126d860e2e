"""The studies that train networks, in miniature: what they write, and that the verdicts are those of the outcomes."""

import json
import re
from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from asam.experiments import data, reproduce
from asam.experiments.studies import tuned
from asam.experiments.study import CONTRADICTED, REPRODUCES, UNDECIDED

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("images", "imagenet")]
NAMES = ["rescaling", "noise", "bias", "rho", "bound", "correlation", "cost", *LARGE]
FIELDS = ["claim", "quantity", "estimate", "low", "high", "n", "verdict"]


def not_json(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study at the quick scale: its settings, its folder, and the outcomes that results.jsonl holds."""
    found = {}

    def perform(name):
        if name == "images" and not data.FASHION_FOLDER.is_dir():
            pytest.skip("Fashion-MNIST is not installed")
        if name in ("images", "imagenet"):
            pytest.importorskip("pytorchcv")
        if name not in found:
            study = reproduce.find(name)
            settings = reproduce.configured(study, "quick")
            folder = tmp_path_factory.mktemp(name) / "out"
            reproduce.claim(study, "quick", settings, folder, None, force=False)
            progress = []
            findings = reproduce.reproduce(
                study, "quick", settings, folder, None, workers=1, progress=lambda *counts: progress.append(counts)
            )
            lines = (folder / "results.jsonl").read_text().splitlines()
            records = [json.loads(line, parse_constant=not_json) for line in lines]
            outcomes = {record["name"]: record["outcome"] for record in records}
            found[name] = SimpleNamespace(**locals())
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield perform


@pytest.mark.parametrize("name", NAMES)
def test_in_miniature_it_writes_everything(studied, name):
    done = studied(name)
    files = {file.name: file.read_text() for file in done.folder.iterdir()}
    summary = json.loads(files["summary.json"], parse_constant=not_json)
    plots = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", files["table.md"]))
    assert plots == set(summary["files"])
    assert len(plots) >= 1
    assert files.keys() == {"config.json", "results.jsonl", "summary.json", "table.md", "report.html"} | plots
    for plot in plots:
        assert ElementTree.fromstring(files[plot]).tag == "{http://www.w3.org/2000/svg}svg"
        assert files[plot] in files["report.html"]
        # matplotlib's own labels between powers of ten, such as 3 x 10^-1, run into each other
        assert r"\times" not in files[plot]

    planned = done.study.plan(done.settings, done.outcomes)
    assert [record["name"] for record in done.records] == sorted(planned)
    assert all(record["run"] == json.loads(json.dumps(asdict(planned[record["name"]]))) for record in done.records)
    assert done.progress[-1] == (len(planned), len(planned))
    assert summary["runs"] == len(planned)
    assert (summary["study"], summary["scale"], summary["source"]) == (name, "quick", done.study.source)
    assert summary["environment"].keys() == {"asam", "torch", "python", "scikit-learn", "hardware", "command"}
    assert all(list(item) == FIELDS for item in summary["findings"])
    for item in summary["findings"]:
        assert item["claim"] in files["table.md"]
    config = json.loads(files["config.json"], parse_constant=not_json)
    assert config["settings"] == json.loads(json.dumps(asdict(done.settings)))


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_is_what_results_jsonl_says(studied, name):
    done = studied(name)
    again = [asdict(item) for item in done.study.report(done.settings, done.outcomes).findings]
    assert again == json.loads((done.folder / "summary.json").read_text())["findings"]
    assert again == [asdict(item) for item in done.findings.findings]


@pytest.mark.parametrize("name", NAMES)
def test_every_verdict_is_that_of_the_rule(studied, monkeypatch, name):
    done = studied(name)
    asked = []

    def rule(claim, quantity, estimate, low, high, n, *, holds, limit=0.0):
        asked.append((claim, low, high, holds, limit))
        return real(claim, quantity, estimate, low, high, n, holds=holds, limit=limit)

    real = tuned.finding
    for module in (tuned, __import__(f"asam.experiments.studies.{name}", fromlist=["STUDY"])):
        if hasattr(module, "finding"):
            monkeypatch.setattr(module, "finding", rule)
    found = done.study.report(done.settings, done.outcomes).findings
    assert [item.claim for item in found] == [claim for claim, *_ in asked]
    for item, (_, low, high, holds, limit) in zip(found, asked, strict=True):
        assert (item.low, item.high) == (low, high)
        if low is None:
            expected = UNDECIDED
        else:
            assert low <= item.estimate <= high or name in ("rho", "correlation")  # those are bootstraps'
            on_the_side = [end < limit if holds == "below" else end > limit for end in (low, high)]
            expected = UNDECIDED if len(set(on_the_side)) == 2 else REPRODUCES if all(on_the_side) else CONTRADICTED
        assert item.verdict == expected, item.claim


def made_up(done, error, seeds=3):
    """Settings with more seeds, and an outcome for every run: a real one with the test error of (group, label)."""
    settings = replace(done.settings, seeds=seeds)
    outcomes = dict(done.outcomes)
    sample = next(iter(done.outcomes.values()))
    for name, run in done.study.plan(settings, outcomes).items():
        group, label, *_, last = name.split("/")
        if last.startswith("seed"):
            value = error(group, label) + 0.1 * run.seed + 0.01 * (len(label) * run.seed % 3)
            curves = {key: [value] * len(values) for key, values in sample["curves"].items()}
            outcomes[name] = {**deepcopy(sample), "test_error": value, "curves": curves}
    return settings, outcomes


def verdicts(done, settings, outcomes, claim):
    return [item.verdict for item in done.study.report(settings, outcomes).findings if item.claim.startswith(claim)]


@pytest.mark.parametrize(
    ("name", "changed", "claim", "count"),
    [
        ("rescaling", "ASAM", "At the worst scale ASAM", 1),
        ("noise", "ASAM", "ASAM has a lower test error than", 10),
        ("bias", "ASAM, weights only", "ASAM, weights only has a lower test error than", 3),
        pytest.param("images", "ASAM", "ASAM has a lower test error than", 4, marks=pytest.mark.slow),
        pytest.param("imagenet", "ASAM", "ASAM has a lower test error than", 2, marks=pytest.mark.slow),
    ],
)
def test_a_method_made_worse_turns_the_verdict(studied, name, changed, claim, count):
    done = studied(name)
    for shift, expected in ((-5.0, REPRODUCES), (5.0, CONTRADICTED), (0.0, UNDECIDED)):
        settings, outcomes = made_up(done, lambda group, label: 20.0 + shift * (label == changed))  # noqa: B023
        if shift == 0:  # neither is better on every seed
            for run, outcome in outcomes.items():
                if run.split("/")[1] == changed:
                    outcome["test_error"] += 1.0 if run.endswith("seed1") else -1.0 if run.endswith("seed2") else 0.0
        assert verdicts(done, settings, outcomes, claim) == [expected] * count
    settings, outcomes = made_up(done, lambda group, label: 20.0 - 5.0 * (label == changed), seeds=1)
    assert verdicts(done, settings, outcomes, claim) == [UNDECIDED] * count  # a single seed decides nothing


def test_what_is_lost_by_rescaling_is_what_decides(studied):
    done = studied("rescaling")
    loses = {label: f"{label} loses" for label in ("SAM", "ASAM")}
    fragile, robust = ((lambda group, label, m=m: 60.0 if label == m and group != "a=1" else 10.0) for m in loses)
    for error, sam, asam in ((fragile, REPRODUCES, REPRODUCES), (robust, CONTRADICTED, CONTRADICTED)):
        settings, outcomes = made_up(done, error)
        assert verdicts(done, settings, outcomes, loses["SAM"]) == [sam]
        assert verdicts(done, settings, outcomes, loses["ASAM"]) == [asam]
    settings, outcomes = made_up(done, fragile)
    found = done.study.report(settings, outcomes)
    lost = next(item for item in found.findings if item.claim.startswith("SAM loses"))
    assert lost.estimate == pytest.approx(50.0)
    by_label = {row[0]: row for row in found.tables[0].rows}
    assert [by_label[label][-1] for label in ("SGD", "SAM", "ASAM")] == ["0 of 9"] * 3
    settings, outcomes = made_up(done, lambda group, label: 90.0 if (group, label) == ("a=2", "SAM") else 10.0)
    assert {row[0]: row[-1] for row in done.study.report(settings, outcomes).tables[0].rows}["SAM"] == "3 of 9"


def test_noise_compares_with_early_stopping_at_the_epoch_of_the_least_validation_error(studied):
    done = studied("noise")
    settings, outcomes = made_up(done, lambda group, label: 20.0)
    for name, outcome in outcomes.items():
        if "/SGD/seed" in name:
            outcome["curves"] = {"validation_error": [5.0, 30.0], "test_error": [10.0 + int(name[-1]), 40.0]}
    claims = {item.claim: item for item in done.study.report(settings, outcomes).findings}
    early = claims["ASAM has a lower test error than SGD, early stopping at 40% noise"]
    assert early.verdict == CONTRADICTED
    assert early.estimate == pytest.approx(9.1, abs=0.1)


def test_a_wider_window_turns_the_verdict_on_rho(studied):
    done = studied("rho")
    chosen = "ASAM, elementwise, scaled"
    claim = f"{chosen}: the window"
    for flat, expected in ((True, REPRODUCES), (False, CONTRADICTED)):
        outcomes = deepcopy(done.outcomes)
        for name, outcome in outcomes.items():
            run = done.study.plan(done.settings, {})[name]
            steep = (name.split("/")[0] == chosen) is not flat
            outcome["test_error"] = 10.0 + 0.1 * run.seed + (200.0 * run.rho if steep else 0.0)
        assert verdicts(done, done.settings, outcomes, claim) == [expected]
    assert verdicts(done, replace(done.settings, seeds=1), outcomes, claim) == [UNDECIDED]


def test_bounds_are_judged_by_all_runs(studied):
    done = studied("bound")
    claims = [item.claim for item in done.findings.findings]
    real = [item.verdict for item in done.findings.findings]
    assert real[0] == CONTRADICTED
    outcomes = deepcopy(done.outcomes)
    for outcome in outcomes.values():
        outcome["asam"] = [0.5 for _ in outcome["asam"]]
        outcome["certificate"] = [0.8 for _ in outcome["certificate"]]
    assert [verdicts(done, done.settings, outcomes, claim) for claim in claims] == [[REPRODUCES], [REPRODUCES]]
    next(iter(outcomes.values()))["asam"] = [2.0, 3.0]
    assert verdicts(done, done.settings, outcomes, claims[0]) == [UNDECIDED]


@pytest.mark.parametrize(("sign", "expected"), [(1, REPRODUCES), (-1, CONTRADICTED)])
def test_a_measure_that_ranks_as_the_gap_does_turns_the_verdict_on_correlation(studied, sign, expected):
    done = studied("correlation")
    outcomes = deepcopy(done.outcomes)
    for i, outcome in enumerate(outcomes.values()):
        outcome["generalization_gap"] = outcome["loss_gap"] = float(i)
        for measure, values in outcome["measures"].items():
            direction = sign if measure.startswith("adaptive") else -sign
            outcome["measures"][measure] = [direction * i + 100.0] * len(values)
    found = done.study.report(done.settings, outcomes).findings
    assert {item.verdict for item in found} == {expected}
    assert sorted({item.estimate for item in found}) == sorted({1.0 * sign, 2.0 * sign})


def test_networks_that_do_not_fit_their_data_are_not_ranked(studied):
    done = studied("correlation")
    settings = replace(done.settings, largest_train_error=5.0)
    outcomes = deepcopy(done.outcomes)
    for name, outcome in outcomes.items():
        outcome["train_error"] = 5.1 if name == "reported/003" else 5.0
    found = done.study.report(settings, outcomes)
    assert {item.n for item in found.findings} == {7}
    assert found.notes[0].startswith("7 of 8 networks")
    without = {name: outcome for name, outcome in outcomes.items() if name != "reported/003"}
    assert [asdict(item) for item in done.study.report(settings, without).findings] == [
        asdict(item) for item in found.findings
    ]
