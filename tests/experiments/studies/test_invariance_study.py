import json

import pytest
import torch

from asam.experiments import reproduce
from asam.experiments.models import build
from asam.experiments.studies.invariance import GEOMETRIES, STUDY, Network, Settings, perform
from asam.experiments.studies.invariance_scalings import KINDS, MODELS, WIDEST, rescaled_copy
from asam.measure import Geometry

RHO = {"none": 0.1, "elementwise": 0.5, "filterwise": 0.2, "layerwise": 0.02}


def network(model):
    """Batch norm with statistics and weights that are not those of its beginning."""
    built = build(model, (1, 8, 8), 10).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(0.1 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return built.eval()


@pytest.mark.parametrize(("model", "kind"), [(model, kind) for model, kinds in MODELS.items() for kind in kinds])
def test_the_function_stays_and_the_weights_do_not(model, kind):
    one = network(model)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other = rescaled_copy(one, kind, torch.Generator().manual_seed(0))
    inputs = torch.randn(20, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(other(inputs), one(inputs), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())
    ratios = torch.cat([(q / p).flatten() for p, q in zip(one.parameters(), other.parameters(), strict=True)])
    assert ratios.min() >= WIDEST**-2
    assert ratios.max() <= WIDEST**2
    assert ratios.log().abs().max() > 0.5


@pytest.mark.parametrize(
    ("model", "kind", "normalization", "keeps"),
    [
        ("cnn", "channels", "elementwise", True),
        ("cnn", "filters", "filterwise", True),
        ("cnn", "layers", "layerwise", True),
        ("cnn", "channels", "filterwise", False),
        ("cnn", "filters", "layerwise", False),
        ("mlp", "channels", "layerwise", False),
    ],
)
def test_scales_follow_the_weights_where_the_theorem_asks_for_it(model, kind, normalization, keeps):
    """T_{Aw}^-1 A = T_w^-1: each weight and its scale grow by the same factor."""
    geometry = Geometry(normalization, eta=0, bias="scaled")
    one = network(model)
    params = [dict(net.named_parameters()) for net in (one, rescaled_copy(one, kind, torch.Generator().manual_seed(0)))]
    before, after = (geometry.scales(each) for each in params)
    ratio = torch.cat(
        [((params[1][n] / params[0][n]).abs() / (after[n] / before[n])).flatten() for n in before]
    ).detach()
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-10) is keeps


def test_measured_sharpness_obeys_the_theorem_and_nothing_else_does():
    outcome = perform(Network("mlp", 0, epochs=1, draws=1, examples=8, steps=2, rho=RHO))
    assert outcome["loss"]["float64"] < 1e-12
    for kind in MODELS["mlp"]:
        by = outcome["changes"]["float64"][kind]
        assert set(by) == set(GEOMETRIES)
        invariant = {"elementwise"} if kind == "channels" else {"elementwise", "filterwise", "layerwise"}
        for label, change in by.items():
            exact = label.split(",")[0] in invariant and "eta = 0," in label and "unscaled" not in label
            assert (change < 1e-10) is exact, (kind, label, change)
        assert by["none, any eta, bias unscaled"] > 0.01


def test_in_miniature_it_writes_everything(tmp_path):
    settings = reproduce.configured(STUDY, "quick")
    folder = tmp_path / "out"
    reproduce.claim(STUDY, "quick", settings, folder, None, force=False)
    reproduce.reproduce(STUDY, "quick", settings, folder, None, 1, lambda done, planned: None)
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "results.jsonl", "summary.json", "table.md", "report.html", "invariance.svg")
    }
    assert json.loads((folder / "summary.json").read_text())["runs"] == len(MODELS)


def test_one_network_that_breaks_it_decides():
    settings = Settings(seeds=2)
    outcomes = {
        name: {
            "changes": {
                dtype: {kind: dict.fromkeys(GEOMETRIES, 1e-15) for kind in MODELS[run.model]}
                for dtype in ("float64", "float32")
            },
            "loss": {"float64": 0.0, "float32": 0.0},
        }
        for name, run in STUDY.plan(settings, {}).items()
    }
    verdicts = [item.verdict for item in STUDY.report(settings, outcomes).findings]
    assert verdicts.count("reproduces at this scale") == 5
    assert verdicts.count("does not reproduce at this scale") == 5
    outcomes["cnn/seed1"]["changes"]["float64"]["filters"]["elementwise, eta = 0, bias scaled"] = 0.5
    theorem = next(item for item in STUDY.report(settings, outcomes).findings if "theorem" in item.claim)
    assert (theorem.verdict, theorem.high, theorem.n) == ("not decided at this scale", 0.5, 4)
    assert set(KINDS) == {kind for kinds in MODELS.values() for kind in kinds}
