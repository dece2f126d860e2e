"""Lines and planes of the loss: exact at the weights, and each point on its own."""

import math

import pytest
import torch
from operators import cross_entropy, dense_hessian, examples, loss_only, mlp
from torch import nn

from asam.measure import Objective, hessian, loss_line, loss_plane, random_direction, top_eigenvalues


def objective_of(model=None, **arguments):
    inputs, targets = examples()
    data = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    return Objective(mlp() if model is None else model, cross_entropy, data, **arguments)


def convolutional():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2)).double()


def test_random_direction_has_the_norms_of_the_filters():
    model = convolutional()
    objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.ones(2, 1, 3, 3).double()])
    direction = random_direction(objective, seed=5)
    assert {name: d.shape for name, d in direction.items()} == {name: p.shape for name, p in model.named_parameters()}
    for name, param in model.named_parameters():
        if param.ndim < 2:
            assert not direction[name].any()
        for ours, theirs in zip(direction[name], param.detach(), strict=True):
            if param.ndim >= 2:
                assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-14)
                assert (ours - theirs).norm() > 0.1 * theirs.norm()
    again, other = random_direction(objective, seed=5), random_direction(objective, seed=6)
    for name in ("0.weight", "3.weight"):
        assert torch.equal(direction[name], again[name])
        assert not torch.equal(direction[name], other[name])


def test_random_direction_of_a_filter_of_zeros_is_zero():
    model = mlp()
    with torch.no_grad():
        model[0].weight[1] = 0
    direction = random_direction(objective_of(model))["0.weight"]
    assert not direction[1].any()
    assert direction[0].any()


def test_random_direction_of_a_bias_of_several_dimensions():
    model = nn.Module()
    model.register_parameter("bias", nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]])))
    objective = Objective(model, lambda model, batch: (model.bias * batch).mean(), [torch.ones(1, 1)])
    assert random_direction(objective)["bias"].norm(dim=1).tolist() == pytest.approx([5, 1])


def test_random_directions_are_the_same_in_every_precision():
    inputs, targets = examples(torch.float32)
    single = random_direction(Objective(mlp(dtype=torch.float32), cross_entropy, [(inputs, targets)]))
    double = random_direction(objective_of())
    assert single["0.weight"].dtype == torch.float32
    torch.testing.assert_close(single["0.weight"].double(), double["0.weight"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("span", "points", "expected"),
    [
        ((-1.0, 1.0), 5, [-1, -0.5, 0, 0.5, 1]),
        ((-1, 1), 2, [-1, 0, 1]),
        ((0, 3), 4, [0, 1, 2, 3]),
        ((-2, 0), 3, [-2, -1, 0]),
        ((-0.5, 1), 3, [-0.5, 0, 0.25, 1]),
    ],
)
def test_grid(span, points, expected):
    objective = objective_of()
    line = loss_line(objective, random_direction(objective), span=span, points=points)
    assert line.positions.tolist() == expected
    assert list(line.values) == ["loss", "error"]
    assert {len(values) for values in line.values.values()} == {len(expected)}


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-0.3, 0.7), (-0.1, 0.2), (-1e-9, 2e-9), (-1e6, 3e6)])
@pytest.mark.parametrize("points", [2, 11, 25, 50, 51])
def test_every_grid_holds_the_weights_themselves(low, high, points):
    objective = objective_of()
    line = loss_line(objective, random_direction(objective), span=(low, high), points=points)
    assert (line.positions == 0).sum() == 1
    assert line.positions[0] == low
    assert line.positions[-1] == high
    assert len(line.positions) in (points, points + 1)
    assert line.positions.diff().min() > 1e-9 * (high - low)
    means = objective.means()
    at = (line.positions == 0).nonzero().item()
    assert {name: values[at].item() for name, values in line.values.items()} == means


@pytest.mark.parametrize("kind", ["random", "gradient", "eigenvector", "some"])
def test_each_point_of_a_line_is_on_its_own(kind):
    objective = objective_of()
    direction = {
        "random": lambda: random_direction(objective),
        "gradient": objective.gradient,
        "eigenvector": lambda: top_eigenvalues(hessian(objective)).vectors[0],
        "some": lambda: {"2.bias": torch.tensor([1.0, -2.0, 0.5])},
    }[kind]()
    line = loss_line(objective, direction, span=(-2, 3), points=12)
    for i, position in enumerate(line.positions.tolist()):
        means = objective.means(position * objective.flat(direction))
        assert {name: values[i].item() for name, values in line.values.items()} == means
    moved = mlp()
    if kind == "some":
        with torch.no_grad():
            moved[2].bias += 3 * direction["2.bias"]
        assert line.values["loss"][-1].item() == pytest.approx(objective_of(moved).loss(), rel=1e-14)


def test_curvature_along_an_eigenvector():
    objective, position = objective_of(), 1e-3
    value, vector = torch.linalg.eigh(dense_hessian(mlp(), loss_only, examples()))
    line = loss_line(objective, vector[:, -1].contiguous(), span=(-position, position), points=3)
    low, center, high = line.values["loss"].tolist()
    assert (low - 2 * center + high) / position**2 == pytest.approx(value[-1].item(), rel=1e-4)


def test_plane():
    objective = objective_of()
    x, y = random_direction(objective, seed=0), random_direction(objective, seed=1)
    plane = loss_plane(objective, x, y, x_span=(-1, 2), y_span=(0, 0.5), points=4)
    assert plane.x.tolist() == [-1, 0, 1, 2]
    torch.testing.assert_close(plane.y, torch.tensor([0, 0.5 / 3, 1 / 3, 0.5], dtype=torch.float64))
    assert list(plane.values) == ["loss", "error"]
    dx, dy = objective.flat(x), objective.flat(y)
    for i, a in enumerate(plane.x.tolist()):
        for j, b in enumerate(plane.y.tolist()):
            means = objective.means(a * dx + b * dy)
            assert {name: values[i, j].item() for name, values in plane.values.items()} == means
    assert plane.values["loss"][1, 0] == objective.loss()
    line = loss_line(objective, x, span=(-1, 2), points=4)
    assert torch.equal(plane.values["loss"][:, 0], line.values["loss"])
    assert loss_plane(objective, x, y, points=2).values["error"].shape == (3, 3)


def test_what_is_not_finite_stays():
    """log(w) at w = 1 - t: nan beyond 1, where it is -inf."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    objective = Objective(model, lambda model, x: model(x).log().mean(), [torch.ones(1, 1).double()])
    direction = {"weight": torch.tensor([[-1.0]]).double()}
    expected = torch.tensor([math.log(2), 0, -math.inf, math.nan], dtype=torch.float64)
    line = loss_line(objective, direction, span=(-1, 2), points=4)
    torch.testing.assert_close(line.values["loss"], expected, rtol=1e-15, atol=0, equal_nan=True)
    plane = loss_plane(objective, direction, {}, x_span=(-1, 2), y_span=(0, 1), points=4)
    torch.testing.assert_close(plane.values["loss"], expected[:, None].expand(4, 4), rtol=1e-15, atol=0, equal_nan=True)


def test_a_direction_may_share_the_memory_of_the_weights():
    model = nn.Linear(3, 3, bias=False).double()
    objective, vector = objective_of(model), model.weight.detach().view(-1)
    assert torch.equal(loss_line(objective, vector).values["loss"], loss_line(objective, vector.clone()).values["loss"])
    plane, copied = (loss_plane(objective, v, {}, points=3).values["loss"] for v in (vector, vector.clone()))
    assert torch.equal(plane, copied)


@pytest.mark.parametrize("function", [loss_line, lambda objective, d, **k: loss_plane(objective, d, d, **k)])
@pytest.mark.parametrize(
    ("direction", "arguments", "message"),
    [
        ({}, {"points": 1}, "points must be an integer >= 2, got 1"),
        ({"3.weight": torch.ones(1)}, {}, r"'3\.weight' is not one of the parameters that are measured"),
        ({"2.bias": torch.ones(2)}, {}, r"'2\.bias' must have shape \(3,\), got \(2,\)"),
        (torch.ones(30), {}, r"a vector over the parameters must have shape \(31,\), got \(30,\)"),
    ],
)
def test_refuses(function, direction, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(objective_of(), direction, **arguments)


@pytest.mark.parametrize("span", [(1, 2), (-2, -1), (1, -1), (0, 0), (-math.inf, 1), (0, math.nan)])
def test_refuses_a_span_without_the_weights(span):
    message = "must be two finite numbers with 0 between them, the smaller one first, got "
    with pytest.raises(ValueError, match="^span " + message):
        loss_line(objective_of(), {}, span=span)
    for name in ("x_span", "y_span"):
        with pytest.raises(ValueError, match=f"^{name} " + message):
            loss_plane(objective_of(), {}, {}, **{name: span})


@pytest.mark.parametrize("span", [1.0, (1,), (0, 1, 2), ("a", "b"), None])
def test_a_span_that_is_not_two_numbers(span):
    with pytest.raises(TypeError, match=r"^span must be two numbers, got "):
        loss_line(objective_of(), {}, span=span)
