"""The way between two models, what measuring leaves behind, and the files that landscapes are kept in."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from operators import cross_entropy, examples, mlp
from slow_reference import assert_same
from torch import nn

from asam.measure import (
    LossLine,
    LossPlane,
    Objective,
    between,
    interpolate,
    loss_line,
    loss_plane,
    random_direction,
)

LINE = LossLine(
    torch.tensor([-0.1, 0.0, 1 / 3], dtype=torch.float64),
    {"loss": torch.tensor([math.nan, 0.1, math.inf], dtype=torch.float64), "error": torch.tensor([1.0, 0.0, -0.0])},
)
PLANE = LossPlane(
    torch.tensor([-0.1, 0.0], dtype=torch.float64),
    LINE.positions,
    {"loss": torch.tensor([[1, 2, math.nan], [4, -math.inf, 1 / 3]], dtype=torch.float64)},
)


def batchnorm(seed):
    """A network in training mode whose running statistics are its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    model(torch.randn(20, 3, dtype=torch.float64) + seed)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def objective_of(model, loss_fn=cross_entropy, **arguments):
    inputs, targets = examples()
    return Objective(model, loss_fn, [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])], **arguments)


@pytest.mark.parametrize("given", ["model", "state dict"])
@pytest.mark.parametrize("batchnorm_mode", ["eval", "train"])
def test_interpolation_ends_at_the_two_models(given, batchnorm_mode):
    one, other = batchnorm(0), batchnorm(1)
    objective = objective_of(one, batchnorm=batchnorm_mode)
    line = interpolate(objective, other if given == "model" else other.state_dict(), points=7)
    assert torch.equal(line.positions, torch.linspace(0, 1, 7, dtype=torch.float64))
    for end, model in [(0, one), (-1, other)]:
        means = objective_of(model, batchnorm=batchnorm_mode).means()
        assert {name: values[end].item() for name, values in line.values.items()} == means
    middle = batchnorm(2)
    mixed = {name: (value + other.state_dict()[name]) / 2 for name, value in one.state_dict().items()}
    middle.load_state_dict(mixed)
    loss = objective_of(middle, batchnorm=batchnorm_mode).loss()
    assert line.values["loss"][3].item() == pytest.approx(loss, rel=1e-13)


def test_ends_are_the_two_models_to_the_bit():
    one, other, seen = batchnorm(0), batchnorm(1), []

    def loss_fn(model, batch):
        seen.append({name: value for name, value in state(model).items() if value.is_floating_point()})
        return cross_entropy(model, batch)

    objective = objective_of(one, loss_fn)
    seen.clear()
    interpolate(objective, other, points=3)
    for end, model in [(0, one), (-1, other)]:
        assert_same(seen[end], {name: value for name, value in state(model).items() if name in seen[end]})


class Masked(nn.Module):
    """Attention with masks of every kind, as buffers and as a parameter that is not trained."""

    def __init__(self, seed, allowed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 4)
        causal = torch.triu(torch.full((4, 4), -math.inf), 1)
        self.register_buffer("causal", causal)
        self.fixed = nn.Parameter(causal.clone(), requires_grad=False)
        self.register_buffer("allowed", torch.tensor(allowed))
        self.fails_at = math.inf

    def forward(self, x):
        self.fails_at -= 1
        if self.fails_at < 0:
            raise RuntimeError("no more")
        scores = self.layer(x)[:, None] + self.causal + self.fixed
        return (torch.softmax(scores, -1) * self.allowed).sum(-1)


def test_masks_on_the_way():
    model, other = Masked(0, [True, True, False, True]), Masked(1, [True, False, True, True])
    data = [torch.randn(6, 4, generator=torch.Generator().manual_seed(0))]
    objective, there = (Objective(m, lambda m, x: m(x).square().mean(), data) for m in (model, other))
    line = interpolate(objective, other, points=4).values["loss"]
    assert line.isfinite().all()
    assert (line[0], line[-1]) == (objective.loss(), there.loss())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fails_at = 2
    with pytest.raises(RuntimeError, match="no more"):
        interpolate(objective, other, points=4)
    assert_same(model.state_dict(), before)


def test_between_is_the_way_to_the_other_model():
    one, other = mlp(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    direction = between(objective_of(one), other)
    for name, param in one.named_parameters():
        assert torch.equal(direction[name], other.get_parameter(name) - param)
    for end in (other, other.state_dict()):
        assert torch.equal(between(objective_of(one), end)["0.bias"], direction["0.bias"])
    line = loss_line(objective_of(one), direction, span=(0, 1), points=2)
    assert line.values["loss"][1].item() == pytest.approx(objective_of(other).loss(), rel=1e-14)


REFUSED = {
    "shape": ({"0.bias": torch.zeros(5)}, r"'0\.bias' has shape \(4,\), in the other model \(5,\)"),
    "missing": ({"0.bias": None}, r"the other model has no '0\.bias'"),
}
REFUSED_INTERPOLATED = REFUSED | {
    "buffer": ({"1.running_var": None}, r"the other model has no '1\.running_var'"),
    "unmeasured": (
        {"3.weight": torch.zeros(3, 4)},
        r"the models differ in '3\.weight', which is not one of the parameters that are measured",
    ),
    "unmeasured-missing": ({"3.weight": None}, r"the other model has no '3\.weight'"),
}


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [(between, *case) for case in REFUSED.values()] + [(interpolate, *case) for case in REFUSED_INTERPOLATED.values()],
)
def test_refuses_another_architecture(function, changes, message):
    other = {name: value for name, value in (state(batchnorm(0)) | changes).items() if value is not None}
    objective = objective_of(batchnorm(0), params=["0.weight", "0.bias", "1.weight"])
    before = state(objective.model)
    with pytest.raises(ValueError, match=message):
        function(objective, other)
    assert_same(state(objective.model), before)


def test_interpolates_the_measured_parameters_only():
    one, other = batchnorm(0), batchnorm(0)
    with torch.no_grad():
        other[0].weight.mul_(2)
    line = interpolate(objective_of(one, params=["0.weight"]), other, points=3)
    assert line.values["loss"][2] == objective_of(other).loss()


class Tied(nn.Module):
    def __init__(self, tied, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.embedding(words))


@pytest.mark.parametrize("function", [interpolate, between])
def test_two_parameters_in_the_place_of_a_shared_one_are_refused(function):
    words = torch.arange(3)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch), batch)

    tied, other, untied = Tied(True, 0), Tied(True, 1), Tied(False, 2)
    objective = Objective(tied, loss, [words])
    told = r"^'embedding\.weight' and 'head\.weight' are one parameter of the model, and two in the other model$"
    for given in (untied, untied.state_dict()):
        with pytest.raises(ValueError, match=told):
            function(objective, given)
    untied.load_state_dict(other.state_dict())  # two of the same values are no others
    for given in (other, untied, {"embedding.weight": other.embedding.weight}):
        if function is between:
            expected = other.embedding.weight - tied.embedding.weight
            assert torch.equal(between(objective, given)["embedding.weight"], expected)
        elif not isinstance(given, dict):
            assert interpolate(objective, given, points=2).values["loss"][1] == Objective(other, loss, [words]).loss()
    way = interpolate(Objective(untied, loss, [words]), tied, points=2)
    assert way.values["loss"][1] == objective.loss()


def test_refuses_a_single_point():
    with pytest.raises(ValueError, match="points must be an integer >= 2, got 1"):
        interpolate(objective_of(mlp()), mlp(), points=1)


@pytest.mark.parametrize(
    ("kind", "failing"),
    [*itertools.product(["line", "plane", "interpolation"], [False, True]), ("direction", False)],
)
def test_leaves_no_trace(kind, failing):
    """Also where the loss fails in the middle of a grid."""
    model, other = batchnorm(0), batchnorm(1)
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, theirs, random = state(model), state(other), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    calls, limit = [], math.inf

    def loss_fn(model, batch):
        calls.append(batch)
        if len(calls) > limit:
            raise KeyError("the loss failed")
        torch.randn(1)
        return cross_entropy(model, batch)

    objective = objective_of(model, loss_fn, batchnorm="train")
    d = random_direction(objective)
    function = {
        "line": lambda: loss_line(objective, d, points=5),
        "plane": lambda: loss_plane(objective, d, d, points=3),
        "interpolation": lambda: interpolate(objective, other, points=5),
        "direction": lambda: between(objective, other),
    }[kind]
    if failing:
        limit = len(calls) + 4
        with pytest.raises(KeyError, match="the loss failed"):
            function()
    else:
        function()
    assert_same(state(model), before)
    assert_same(state(other), theirs)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("landscape", [LINE, PLANE], ids=["line", "plane"])
@pytest.mark.parametrize("as_string", [False, True])
def test_files_keep_everything(landscape, as_string, tmp_path):
    path = tmp_path / "landscape.npz"
    path.write_bytes(b"what was there before")
    landscape.save(str(path) if as_string else path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = type(landscape).load(path)
    for axis in ("positions",) if landscape is LINE else ("x", "y"):
        assert torch.equal(getattr(loaded, axis), getattr(landscape, axis))
    assert list(loaded.values) == list(landscape.values)
    for name, values in landscape.values.items():
        assert loaded.values[name].dtype == values.dtype
        assert np.array_equal(loaded.values[name].numpy(), values.numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("landscape", "name"),
    [(LINE, "positions"), (PLANE, "x"), (PLANE, "y"), (LINE, "file"), (PLANE, "allow_pickle")],
)
def test_refuses_names_that_a_file_cannot_hold(landscape, name, tmp_path):
    landscape = type(landscape)(*list(vars(landscape).values())[:-1], {name: LINE.positions})
    with pytest.raises(ValueError, match=f"a mean may not be called '{name}'"):
        landscape.save(tmp_path / "landscape.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04", b"\x93NUMPY"])
def test_refuses_to_load_what_is_no_archive(content, tmp_path):
    path = tmp_path / "landscape.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"landscape\.npz is not an npz file"):
        LossLine.load(path)


@pytest.mark.parametrize(("landscape", "other", "axis"), [(LINE, LossPlane, "x"), (PLANE, LossLine, "positions")])
def test_refuses_to_load_something_else(landscape, other, axis, tmp_path):
    landscape.save(tmp_path / "landscape.npz")
    with pytest.raises(ValueError, match=rf"landscape\.npz has no array '{axis}'"):
        other.load(tmp_path / "landscape.npz")


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Identity()])
def test_other_layers_of_the_same_shapes_are_refused(layer):
    model, other = mlp(), mlp()
    at = next(i for i, module in enumerate(other) if isinstance(module, nn.Tanh))
    other[at] = layer
    with pytest.raises(
        ValueError, match=f"^the models differ in '{at}': Tanh in the one, {type(layer).__name__} in the"
    ):
        interpolate(objective_of(model), other)


def test_dropout_is_no_layer_in_evaluation():
    model, other = mlp(), mlp()
    for net in (model, other):
        net.append(nn.Identity())
    other[-1] = nn.Dropout(0.5)
    assert interpolate(objective_of(model), other, points=2).values["loss"][1] == objective_of(other).loss()


def test_parametrized_layers_are_the_same():
    model, other = (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))).double() for _ in range(2))
    line = interpolate(objective_of(model), other, points=2)
    assert line.values["loss"][1] == objective_of(other).loss()


class Scaled(nn.Module):
    """A layer with a buffer that is not in the state dict."""

    def __init__(self, scale):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.scale


def test_buffers_that_are_not_in_the_state_dict():
    one, other = Scaled(1.0), Scaled(3.0)
    data = [(torch.randn(6, 5), torch.randint(3, (6,)))]
    objective = Objective(one, cross_entropy, data)
    assert interpolate(objective, other, points=2).values["loss"][1] == Objective(other, cross_entropy, data).loss()
    assert one.scale == 1
    there = copy.deepcopy(one)
    there.load_state_dict(other.state_dict())
    line = interpolate(objective, other.state_dict(), points=2)
    assert line.values["loss"][1] == Objective(there, cross_entropy, data).loss()


def test_interpolation_sees_no_cached_weights():
    models = [nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), nn.Tanh()) for _ in range(2)]
    inputs = torch.randn(6, 5)
    objective = Objective(models[0], cross_entropy, [(inputs, torch.randint(3, (6,)))])
    expected = interpolate(objective, models[1], points=3).values["loss"]
    with nn.utils.parametrize.cached():
        models[0](inputs)
        assert torch.equal(interpolate(objective, models[1], points=3).values["loss"], expected)


def test_refuses_to_load_a_broken_or_a_wordy_archive(tmp_path):
    path = tmp_path / "landscape.npz"
    LINE.save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 100] ^= 0xFF  # in the first array
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"landscape\.npz is not an npz file"):
        LossLine.load(path)
    np.savez(path, positions=np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"landscape\.npz holds something else than numbers"):
        LossLine.load(path)
