import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from asam import ASAM, SAM
from asam.experiments import reproduce
from asam.experiments.studies import toy, toy_report
from asam.experiments.studies.toy import STUDY
from asam.experiments.studies.toy_descent import (
    STARTS,
    TARGET,
    Descent,
    Settings,
    at_flat_end,
    gradient,
    gradient_at_worst,
    loss,
    perform,
    starts,
)
from asam.measure import Geometry


class Weights(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.weight = nn.Parameter(w.clone())

    def loss(self):
        return (self.weight[0] * torch.relu(self.weight[1]) - TARGET).abs()


def test_in_miniature_it_writes_everything(tmp_path):
    settings = reproduce.configured(STUDY, "quick")
    folder = tmp_path / "out"
    reproduce.claim(STUDY, "quick", settings, folder, None, force=False)
    reproduce.reproduce(STUDY, "quick", settings, folder, None, 1, lambda done, planned: None)
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "results.jsonl", "summary.json", "table.md", "report.html", "paths.svg", "map.svg")
    }
    assert json.loads((folder / "summary.json").read_text())["runs"] == 1 + 2 * len(settings.rhos)


@pytest.mark.parametrize(("method", "rho"), [("SAM", 0.05), ("SAM", 0.2), ("ASAM", 0.5), ("ASAM", 1.5)])
def test_all_starts_at_once_are_the_library_one_start_at_a_time(method, rho):
    w = starts(4, 0.4)
    geometry = Geometry(eta=0.01) if method == "ASAM" else Geometry("none")
    models = [Weights(row) for row in w]
    minimizers = [SAM(model, rho=rho) if method == "SAM" else ASAM(model, rho=rho, eta=0.01) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in models]
    for _ in range(30):
        w = w - 0.02 * gradient_at_worst(w, geometry, rho)
        for model, minimizer, optimizer in zip(models, minimizers, optimizers, strict=True):
            minimizer.backward(model.loss)
            optimizer.step()
            optimizer.zero_grad()
        one_by_one = torch.stack([model.weight.detach() for model in models])
        torch.testing.assert_close(w, one_by_one, rtol=0, atol=1e-12)


def test_the_gradient_is_autograd_s():
    w = torch.cat([starts(5, 0.4), torch.tensor([[0.3, -0.1], [0.3, 0.0], [-0.2, 0.1], [0.5, 0.08]])]).double()
    w.requires_grad_()
    assert torch.equal(gradient(w.detach()), torch.autograd.grad(loss(w).sum(), w)[0])


def test_without_rho_it_is_gradient_descent():
    w = starts(4, 0.4)
    assert torch.equal(gradient_at_worst(w, Geometry("none"), 0.0), gradient(w))


def test_sam_freezes_where_its_step_makes_the_output_of_relu_zero():
    outcome = perform(Descent("SAM", 0.05, 50, 0.02, 0.01, side=12, widest=0.4, keep=0))
    w = starts(12, 0.4)
    below = w.prod(dim=1) < TARGET
    through_zero = w[:, 1] < 0.05 * w[:, 0] / torch.linalg.vector_norm(w, dim=1)
    at_once = (torch.tensor(outcome["end"], dtype=torch.float64) == w).all(dim=1)
    assert torch.equal(at_once, below & through_zero)
    assert at_once[1]  # the paper's second start
    assert np.array(outcome["stuck"])[at_once.numpy()].all()
    assert not any(perform(Descent("ASAM", 0.5, 50, 0.02, 0.01, side=12, widest=0.4, keep=0))["stuck"])


def test_paths_begin_at_the_starts_of_the_paper_and_go_where_the_run_goes():
    outcome = perform(Descent("ASAM", 0.5, 20, 0.02, 0.01, side=1, widest=0.4, keep=20))
    assert [tuple(path[0]) for path in outcome["paths"]] == list(STARTS)
    assert [len(path) for path in outcome["paths"]] == [20, 20]
    after = perform(Descent("ASAM", 0.5, 19, 0.02, 0.01, side=1, widest=0.4, keep=0))["end"]
    np.testing.assert_allclose([path[-1] for path in outcome["paths"]], after[:2], atol=1e-5)


def test_the_flat_end_is_on_the_valley_where_the_weights_are_alike():
    w = torch.tensor([[0.2, 0.2], [0.22, 0.04 / 0.22], [0.4, 0.1], [0.3, 0.3], [0.2, -0.2]])
    assert at_flat_end(w).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("columns", [2, 3, 4, 5, 10])
def test_the_legend_of_the_map_is_not_cut_off(columns, monkeypatch):
    shown = []
    monkeypatch.setattr(toy_report.plots, "svg", lambda draw, size, **grid: shown.append((draw, size, grid)))
    settings = replace(STUDY.settings["quick"], rhos=tuple(0.1 * i for i in range(1, 2 * columns)), shown=(0.1, 0.1))
    outcomes = {name: STUDY.perform(run) for name, run in STUDY.plan(settings, {}).items()}
    toy_report.figures(settings, outcomes)
    draw, size, grid = shown[-1]
    assert grid == {"columns": columns, "rows": 2}
    figure = Figure(figsize=size, layout="constrained")
    draw(*np.ravel(figure.subplots(2, columns)))
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1


def test_verdicts_follow_the_outcomes():
    """SAM is made to work at every rho and ASAM at none, and all claims fail."""
    settings = Settings(side=3, rhos=(0.01, 0.1, 1.0), shown=(0.1, 1.0))
    n = len(STARTS) + 9

    def outcome(works, step):
        return {
            **{"end": [[0.2, 0.2]] * n, "arrived": [step if works else 0] * n, "low": [works] * n, "flat": [works] * n},
            **{"stuck": [not works] * n, "paths": [[], []]},
        }

    outcomes = {
        name: outcome(run.method != "ASAM" or run.rho == 0.01, {"SGD": 100, "SAM": 10, "ASAM": 90}[run.method])
        for name, run in STUDY.plan(settings, {}).items()
    }
    found = toy.STUDY.report(settings, outcomes).findings
    assert {item.verdict for item in found} == {"does not reproduce at this scale"}
    np.testing.assert_allclose([item.estimate for item in found], [1, *[-np.log2(100)] * 2, np.log2(9)])
