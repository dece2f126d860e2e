"""What an objective refuses, and why."""

import random

import pytest
import torch
from quadratics import Net, cross_entropy, examples, net_objective
from torch import nn
from torch.utils.checkpoint import checkpoint

from asam import Geometry
from asam.measure import (
    Objective,
    average_sharpness,
    between,
    gibbs_certificate,
    hessian,
    interpolate,
    loss_line,
    loss_plane,
    random_direction,
    worst_case_sharpness,
)


def make(model=None, loss_fn=cross_entropy, data=None, **arguments):
    return Objective(Net() if model is None else model, loss_fn, [examples()] if data is None else data, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module, got function"),
        ({"loss_fn": "cross_entropy"}, TypeError, "loss_fn must be a function of a model and a batch, got str"),
        ({"data": torch.ones(3, 4)}, TypeError, "data must be an iterable of batches, .*got Tensor"),
        ({"data": {"x": torch.ones(3)}}, TypeError, "data must be an iterable of batches, .*got dict"),
        ({"data": "digits"}, TypeError, "data must be an iterable of batches, .*got str"),
        ({"data": 3}, TypeError, "data must be an iterable of batches, .*got int"),
        ({"data": []}, ValueError, "data holds no examples"),
        ({"data": iter(())}, ValueError, "data holds no examples"),
        ({"data": [(torch.ones(0, 4), torch.ones(0))]}, ValueError, "data holds no examples"),
        ({"batchnorm": "frozen"}, ValueError, "batchnorm must be one of 'eval', 'train', got 'frozen'"),
        ({"params": "layers.0.weight"}, TypeError, "params must be an iterable of names or parameters"),
        ({"params": ["head"]}, ValueError, "params names 'head', which is not a parameter of the model"),
        ({"params": []}, ValueError, "params is empty: there is nothing to perturb"),
        ({"model": Net().requires_grad_(False)}, ValueError, "no parameter of the model requires a gradient"),
        ({"model": nn.Identity()}, ValueError, "no parameter of the model requires a gradient"),
        (
            {"model": nn.Linear(1, 1, dtype=torch.complex64)},
            TypeError,
            "parameter 'weight' has dtype torch.complex64: only real floating point is supported",
        ),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_a_frozen_parameter_by_name():
    model = Net()
    model.layers[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"params holds 'layers.0.weight', which does not require a gradient"):
        make(model, params=["layers.0.weight"])


class Leaf(nn.Module):
    def forward(self, x):
        return x.clone().requires_grad_(True)


class Reentrant(nn.Module):
    def forward(self, x):
        return checkpoint(torch.tanh, x, use_reentrant=True)


def test_a_loss_whose_backward_pass_fails():
    def fail(grad):
        raise RuntimeError("there is no derivative of it")

    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        loss.register_hook(fail)
        return loss

    with pytest.raises(ValueError, match=r"^the loss has no gradient: there is no derivative of it$"):
        make(Net(), loss_fn)


@pytest.mark.parametrize("detached", [False, True])
def test_parameters_behind_a_reentrant_checkpoint(detached):
    # where nothing that is measured lies before it, torch itself leaves out what lies behind
    model = nn.Sequential(Leaf() if detached else nn.Linear(4, 4), Reentrant(), nn.Linear(4, 3)).double()
    with pytest.raises(
        ValueError, match=r"^the loss has no gradient of parameters behind torch\.utils\.checkpoint with us"
    ):
        make(model)


@pytest.mark.parametrize("change", ["assign", "one of two", "parametrized"])
def test_parameters_that_are_not_the_models_any_more(change):
    objective = make(model := Net())
    if change == "assign":
        model.load_state_dict(Net().state_dict(), assign=True)
    elif change == "one of two":
        model.layers[0].bias = nn.Parameter(model.layers[0].bias.detach().clone())
    else:
        nn.utils.parametrizations.weight_norm(model.layers[0])
    for measure in (
        objective.loss,
        objective.gradient,
        lambda: hessian(objective) @ torch.ones(objective.like.numel()),
    ):
        with pytest.raises(
            ValueError, match=r"^the model has another parameter than 'layers\.0\.\w+' when the Objective w"
        ):
            measure()


def test_parameters_without_elements():
    model = nn.ParameterList([torch.zeros(0)])
    with pytest.raises(ValueError, match=r"^the parameters have no elements: there is nothing to perturb$"):
        Objective(model, lambda model, batch: model[0].sum(), [torch.ones(2, 1)])


def counter():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) + len(calls)

    return loss_fn


def every_second():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) + len(calls) % 2

    return loss_fn


def dropout(model, batch):
    return cross_entropy(model, (nn.functional.dropout(batch[0], 0.5, training=True), batch[1]))


def noise(model, batch):
    return cross_entropy(model, batch) * (1 + 1e-6 * random.random())


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (4, 4, 4)])
@pytest.mark.parametrize("loss_fn", [counter(), every_second(), dropout, noise])
def test_a_loss_that_is_not_deterministic(loss_fn, sizes):
    data = list(zip(*(tensor.split(sizes) for tensor in examples()), strict=True))
    with pytest.raises(ValueError, match=r"the loss is not deterministic: the same batch gave .*, then .*; switch off"):
        make(loss_fn=loss_fn, data=data)


def test_dropout_and_buffers_that_evaluation_switches_off_are_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)).double().train()
    for batchnorm in ("eval", "train"):
        assert make(model, batchnorm=batchnorm).loss() == make(model, batchnorm=batchnorm).loss()


class Moving(Net):
    """A network whose output depends on a buffer that moves at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (4, 4, 4)])
def test_every_batch_sees_the_buffers_as_they_were(sizes):
    objective = make(Moving(), data=list(zip(*(tensor.split(sizes) for tensor in examples()), strict=True)))
    assert objective.loss() == pytest.approx(make().loss(), rel=1e-14)
    assert objective.model.calls == 0


OTHER = Net(seed=1)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]), r"must return the mean loss .*, got shape \(12, 3\)"),
        (lambda model, batch: cross_entropy(model, batch).item(), "must return the mean loss .*, got float"),
        (lambda model, batch: None, "must return the mean loss .*, got NoneType"),
        (lambda model, batch: model(batch[0]).argmax(), "must return the mean loss .*, got shape"),
        (
            lambda model, batch: cross_entropy(model, batch).detach(),
            "the loss has no gradient: loss_fn must not detach",
        ),
        (torch.no_grad()(cross_entropy), "the loss has no gradient: loss_fn must not detach it or run under"),
        (lambda model, batch: batch[0].sum(), "the loss has no gradient"),
        (lambda model, batch: cross_entropy(OTHER, batch), "depends on none of the parameters: loss_fn must use"),
        (lambda model, batch: (cross_entropy(model, batch), batch[0]), r"\(loss, dict of other means\), got a pair"),
        (lambda model, batch: (cross_entropy(model, batch), {"loss": 7.0}), "another mean called 'loss'"),
        (lambda model, batch: (cross_entropy(model, batch), {"x": batch[0]}), r"for the mean 'x', got shape \(12, 4\)"),
        (lambda model, batch: (cross_entropy(model, batch), {"x": "much"}), "for the mean 'x', got str"),
        (lambda model, batch: (cross_entropy(model, batch), {"x": torch.tensor(1j)}), "for the mean 'x', got"),
    ],
)
def test_losses(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        make(loss_fn=loss_fn)


def test_a_mean_that_not_every_batch_has():
    def loss_fn(model, batch):
        return cross_entropy(model, batch), {"large": 1.0} if len(batch[0]) > 5 else {}

    objective = make(loss_fn=loss_fn, data=list(zip(*(tensor.split((5, 7)) for tensor in examples()), strict=True)))
    with pytest.raises(ValueError, match=r"must return the same means for every batch, got .*'large'"):
        objective.means()


def test_a_nan_that_comes_and_goes():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) * (float("nan") if len(calls) == 3 else 1)

    with pytest.raises(ValueError, match="the loss is not deterministic"):
        make(loss_fn=loss_fn)


def test_a_loss_of_one_element_will_do():
    objective = make(loss_fn=lambda model, batch: cross_entropy(model, batch).reshape(1, 1))
    assert objective.loss() == make().loss()


@pytest.mark.parametrize(
    ("perturbation", "message"),
    [
        (torch.zeros(3), r"a vector over the parameters must have shape \(83,\), got \(3,\)"),
        ({"head": torch.zeros(3)}, "'head' is not one of the parameters that are measured"),
        ({"layers.0.bias": torch.zeros(5)}, r"'layers.0.bias' must have shape \(6,\), got \(5,\)"),
    ],
)
def test_perturbations(perturbation, message):
    objective = net_objective()
    for measure in (objective.loss, objective.means, objective.gradient, objective.flat):
        with pytest.raises(ValueError, match=message):
            measure(perturbation)


@pytest.mark.parametrize("perturbation", ["a", 3, {"layers.0.bias": 1.0}])
def test_what_is_no_perturbation(perturbation):
    with pytest.raises(TypeError, match="expected a vector over the parameters or a tensor for each, got"):
        net_objective().loss(perturbation)


@pytest.mark.parametrize("perturbation", [torch.ones(83) * 1j, {"layers.0.bias": torch.ones(6) * 1j}])
def test_a_complex_perturbation(perturbation):
    with pytest.raises(TypeError, match=r"^a vector over the parameters must be real, got torch\.complex64$"):
        net_objective().loss(perturbation)


def test_scales_that_are_not_finite():
    geometry = Geometry(lambda weight: weight.abs() / 0)
    with pytest.raises(ValueError, match=r"^normalization must return finite scales$"):
        worst_case_sharpness(net_objective(), 0.1, geometry=geometry)


GEOMETRY = Geometry()


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: worst_case_sharpness(model, 0.1, geometry=GEOMETRY),
        lambda model: average_sharpness(model, 0.1, geometry=GEOMETRY),
        lambda model: gibbs_certificate(model, 0.1, geometry=GEOMETRY, prior={}),
        hessian,
        random_direction,
        lambda model: between(model, model),
        lambda model: interpolate(model, model),
        lambda model: loss_line(model, {}),
        lambda model: loss_plane(model, {}, {}),
    ],
)
def test_a_model_is_no_objective(measure):
    with pytest.raises(TypeError, match=r"objective must be an Objective\(model, loss_fn, data\), got Net"):
        measure(Net())


@pytest.mark.parametrize("measure", [between, interpolate])
def test_what_is_no_other_model(measure):
    with pytest.raises(TypeError, match="the other must be a module or its state dict, got int"):
        measure(net_objective(), 3)


def test_a_nan_is_neither_an_error_nor_hidden():
    objective = make(loss_fn=lambda model, batch: cross_entropy(model, batch) * float("nan"))
    assert objective.loss() != objective.loss()
