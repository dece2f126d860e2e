"""The mean loss over data as a function of the weights: how examples are weighted, batches cut and vectors laid out."""

import math
from typing import NamedTuple

import pytest
import torch
from quadratics import Net, batches, cross_entropy, examples, net_objective
from torch import nn

from asam import Geometry
from asam.measure import Objective, average_sharpness, hessian, interpolate, loss_line, worst_case_sharpness

CUTS = {"one": (12,), "ragged": (5, 1, 4, 2), "single examples": (1,) * 12, "with an empty one": (7, 0, 5)}


def assert_near(actual, expected, rtol=1e-12):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=1e-15)


def plain_gradient(model, batch):
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(cross_entropy(model, batch), params), strict=True))


@pytest.mark.parametrize("cut", CUTS)
def test_every_example_counts_the_same(cut):
    model, data = Net(), examples()
    objective = Objective(model, cross_entropy, batches(data, *CUTS[cut]))
    assert objective.examples == 12
    assert objective.loss() == pytest.approx(cross_entropy(model, data).item(), rel=1e-14)
    assert_near(objective.gradient(), plain_gradient(model, data))


@pytest.mark.parametrize("cut", CUTS)
def test_no_measurement_depends_on_how_the_data_is_cut(cut):
    whole = net_objective()
    cut = Objective(Net(), cross_entropy, batches(examples(), *CUTS[cut]))
    vector = torch.linspace(-1, 1, whole.like.numel(), dtype=torch.float64)
    for geometry in (Geometry(), Geometry(p=math.inf)):
        for m in (None, 5):
            values = [worst_case_sharpness(o, 0.1, geometry=geometry, m=m).value for o in (whole, cut)]
            assert values[1] == pytest.approx(values[0], rel=1e-9)
    values = [average_sharpness(o, 0.1, geometry=Geometry(), samples=4).value for o in (whole, cut)]
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    torch.testing.assert_close(hessian(cut) @ vector, hessian(whole) @ vector, rtol=1e-12, atol=1e-14)
    for line in (lambda o: loss_line(o, vector, points=3), lambda o: interpolate(o, Net(seed=1), points=3)):
        torch.testing.assert_close(line(cut).values["loss"], line(whole).values["loss"], rtol=1e-13, atol=0)


def test_the_loss_at_moved_weights():
    model, data = Net(), examples()
    objective = Objective(model, cross_entropy, batches(data, 5, 7))
    vector = torch.linspace(-1, 1, objective.like.numel(), dtype=torch.float64)
    moved = Net()
    with torch.no_grad():
        for name, param in moved.named_parameters():
            param.add_(objective.named(vector)[name])
    for e in (vector, objective.named(vector)):
        assert objective.loss(e) == pytest.approx(cross_entropy(moved, data).item(), rel=1e-14)
        assert_near(objective.gradient(e), plain_gradient(moved, data))
    # the weights are those of the time of the measurement
    model.load_state_dict(moved.state_dict())
    assert objective.loss() == pytest.approx(cross_entropy(moved, data).item(), rel=1e-14)


def test_other_means_are_weighted_too():
    def loss_fn(model, batch):
        logits = model(batch[0])
        errors = (logits.argmax(1) != batch[1]).double()
        return nn.functional.cross_entropy(logits, batch[1]), {"error": errors.mean(), "size": float(len(errors))}

    data = examples()
    objective = Objective(Net(), loss_fn, batches(data, 5, 1, 6))
    means = objective.means()
    _, whole = loss_fn(Net(), data)
    assert list(means) == ["loss", "error", "size"]
    assert means["loss"] == objective.loss()
    assert means["error"] == pytest.approx(whole["error"].item(), rel=1e-14)
    assert means["size"] == (25 + 1 + 36) / 12


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


STRUCTURES = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "namedtuple": Pair,
    "nested": lambda x, y: {"scale": torch.tensor(1.0), "name": "a", "inputs": [{"x": x}], "y": (y, None)},
}
READERS = {
    "dict": lambda batch: (batch["x"], batch["y"]),
    "namedtuple": lambda batch: (batch.x, batch.y),
    "nested": lambda batch: (batch["inputs"][0]["x"] * batch["scale"], batch["y"][0]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_any_structure(structure):
    seen = []

    def loss_fn(model, batch):
        pair = READERS.get(structure, tuple)(batch)
        seen.append(len(pair[0]))
        return cross_entropy(model, pair)

    data = [STRUCTURES[structure](*batch) for batch in batches(examples(), 5, 7)]
    objective, plain = Objective(Net(), loss_fn, data), net_objective()
    assert objective.examples == 12
    assert objective.loss() == pytest.approx(plain.loss(), rel=1e-14)
    seen.clear()
    value = worst_case_sharpness(objective, 0.1, geometry=Geometry(), m=8, method="one_step").value
    # 8 examples from both batches, then the 4 that are left
    assert seen == [5, 3, 5, 3, 4, 4]
    expected = worst_case_sharpness(plain, 0.1, geometry=Geometry(), m=8, method="one_step").value
    assert value == pytest.approx(expected, rel=1e-10)


def test_data_is_read_once():
    reads = []

    def data():
        for batch in batches(examples(), 5, 7):
            reads.append(1)
            yield batch

    objective = Objective(Net(), cross_entropy, data())
    assert objective.loss() == objective.loss() == pytest.approx(net_objective().loss(), rel=1e-14)
    assert len(reads) == 2


def test_a_batch_without_tensors_is_one_example():
    objective = Objective(nn.Linear(1, 1), lambda model, batch: model.weight.square().sum() * batch, [1.0, 3.0])
    assert objective.examples == 2
    assert objective.loss() == pytest.approx(2 * objective.model.weight.item() ** 2)


@pytest.mark.parametrize(
    "params", [["layers.1.weight", "layers.0.bias"], lambda model: [model.layers[0].bias, model.layers[1].weight]]
)
def test_only_the_chosen_parameters_are_measured(params):
    model = Net()
    objective = net_objective(model, params=params(model) if callable(params) else params)
    chosen = ["layers.0.bias", "layers.1.weight"]
    full = plain_gradient(model, examples())
    assert list(objective.params) == chosen
    assert_near(objective.gradient(), {name: full[name] for name in chosen})
    assert list(worst_case_sharpness(objective, 0.1, geometry=Geometry()).perturbation) == chosen


def test_frozen_parameters_are_left_out():
    model = Net()
    model.layers[0].requires_grad_(False)
    objective = net_objective(model)
    assert list(objective.params) == [f"layers.{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]


def test_tied_weights_are_one_parameter():
    model = Net(sizes=(4, 4, 4, 3))
    model.layers[1].weight = model.layers[0].weight
    objective = net_objective(model)
    assert "layers.1.weight" not in objective.params
    assert_near(objective.gradient(), plain_gradient(model, examples()))
    assert list(net_objective(model, params=["layers.1.weight"]).params) == ["layers.0.weight"]


def test_unused_parameters_have_a_gradient_of_zero():
    model = Net()
    model.unused = nn.Linear(3, 2).double()
    for cut in (batches(examples(), 12), batches(examples(), 5, 7)):
        objective = Objective(model, cross_entropy, cut)
        gradient = objective.gradient()
        assert torch.equal(gradient["unused.weight"], torch.zeros(2, 3, dtype=torch.float64))
        product = objective.named(hessian(objective) @ torch.ones_like(objective.like))
        assert torch.equal(product["unused.bias"], torch.zeros(2, dtype=torch.float64))
        perturbation = worst_case_sharpness(objective, 0.1, geometry=Geometry(), method="one_step").perturbation
        assert torch.equal(perturbation["unused.weight"], torch.zeros(2, 3, dtype=torch.float64))


def test_vectors_and_names():
    objective = net_objective(Net(dtype=torch.float32), examples(dtype=torch.float32))
    vector = torch.arange(float(objective.like.numel()))
    named = objective.named(vector)
    assert {name: tensor.shape for name, tensor in named.items()} == {
        name: param.shape for name, param in objective.params.items()
    }
    assert torch.equal(objective.flat(named), vector)
    assert torch.equal(objective.flat(vector), vector)
    # a part of them: the others are 0
    bias = objective.flat({"layers.0.bias": torch.ones(6, dtype=torch.float64)})
    assert bias.dtype == torch.float32
    assert bias.sum() == 6
    assert torch.equal(objective.named(bias)["layers.0.bias"], torch.ones(6))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_vectors_have_the_highest_precision(dtypes, expected):
    model = nn.ModuleList(nn.Linear(2, 2).to(dtype) for dtype in dtypes)
    objective = Objective(model, lambda model, x: sum(layer.weight.float().sum() for layer in model), [torch.ones(1)])
    assert objective.like.dtype == objective.flat(objective.gradient()).dtype == expected


def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(7, 3, sparse=sparse).double()

        def forward(self, words):
            return self.embedding(words).square().sum(1).mean()

    words = torch.tensor([0, 2, 2, 5])
    sparse, dense = (
        Objective(Words(sparse), lambda model, batch: model(batch), [words[:3], words[3:]]) for sparse in (True, False)
    )
    assert_near(sparse.gradient(), dense.gradient())
    values = [worst_case_sharpness(o, 0.1, geometry=Geometry()).value for o in (sparse, dense)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_batch_norm(batchnorm):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double().train()
    model(examples()[0] * 2 + 1)
    data = batches(examples(), 5, 7)
    objective = Objective(model, cross_entropy, data, batchnorm=batchnorm)
    with torch.no_grad():
        losses = []
        for x, y in data:
            hidden = model[0](x)
            mean, variance = (
                (model[1].running_mean, model[1].running_var)
                if batchnorm == "eval"
                else (hidden.mean(0), hidden.var(0, unbiased=False))
            )
            logits = (hidden - mean) / (variance + model[1].eps).sqrt()
            losses.append(nn.functional.cross_entropy(logits, y).item() * len(y))
    assert objective.loss() == pytest.approx(sum(losses) / 12, rel=1e-12)


def test_a_loss_that_takes_gradients_itself():
    """A penalty on the slope along the inputs, as of a network that solves a differential equation."""
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    calls = []

    def loss_fn(model, inputs):
        calls.append(torch.is_grad_enabled())
        inputs = inputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return (slope - 1).square().mean()

    data = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)]
    objective = Objective(model, loss_fn, data)
    expected = sum(loss_fn(model, batch) * len(batch) for batch in data) / 7
    assert objective.loss() == pytest.approx(expected.item(), rel=1e-12)
    calls.clear()
    result = worst_case_sharpness(objective, 0.1, geometry=Geometry(eta=0.0), steps=3)
    assert result.value == pytest.approx(objective.loss(result.perturbation) - objective.loss(), rel=1e-9)
    e = {name: value.flatten() for name, value in result.perturbation.items()}
    assert (hessian(objective) @ torch.cat(list(e.values()))).isfinite().all()


def test_another_error_of_the_loss_without_a_graph_is_told():
    def loss_fn(model, inputs):
        if not torch.is_grad_enabled():
            raise RuntimeError("boom")
        return model(inputs).square().mean()

    with pytest.raises(RuntimeError, match="boom"):
        Objective(nn.Linear(2, 1), loss_fn, [torch.randn(3, 2)])
