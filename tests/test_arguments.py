"""Bad arguments and misuse: an error that names the argument, says what it takes and what it got."""

import math

import pytest
import torch
from slow_reference import assert_same, shapes_problem, weights
from torch import nn

from asam import (
    ASAM,
    SAM,
    Geometry,
    Gradient,
    Momentum,
    SharpnessAwareOptimizer,
    norm_parameters,
    weight_parameters,
)

NUMBERS = [("a string", TypeError, "str"), (None, TypeError, "NoneType"), (True, TypeError, "bool")]
RHO = [*NUMBERS, (torch.tensor(0.5), TypeError, "Tensor"), (-0.1, ValueError, "-0.1")]
RHO += [(math.nan, ValueError, "nan"), (math.inf, ValueError, "inf")]
GEOMETRY = [
    *(("eta", "a finite number >= 0", *case) for case in RHO),
    *(
        ("p", r"a number > 1 or math\.inf", *case)
        for case in [*NUMBERS, (1, ValueError, "1"), (0.5, ValueError, "0.5")]
    ),
    ("p", r"a number > 1 or math\.inf", math.nan, ValueError, "nan"),
    ("p", r"a number > 1 or math\.inf", -math.inf, ValueError, "-inf"),
    ("normalization", "one of 'elementwise', 'filterwise', 'layerwise', 'none' or", "rows", ValueError, "'rows'"),
    ("normalization", "a string or a callable", 3, TypeError, "int"),
    ("normalization", "a string or a callable", None, TypeError, "NoneType"),
    ("bias", "one of 'unscaled', 'scaled', 'fixed'", "none", ValueError, "'none'"),
    ("bias", "a string", False, TypeError, "bool"),
]
COMMON = [
    *(("rho", "a finite number >= 0", *case) for case in RHO),
    ("replay_rng", "a bool", 1, TypeError, "int"),
    ("sync_ascent", "a bool", None, TypeError, "NoneType"),
    ("params", "an iterable of names or parameters", "weight", TypeError, "str"),
    ("params", "an iterable of names or parameters", torch.zeros(2), TypeError, "Tensor"),
    ("params", "an iterable of names or parameters", 5, TypeError, "int"),
    ("params", "names or parameters", [5], TypeError, "int"),
]


def label(value):
    return str(value) if isinstance(value, str | int | float) else ""


@pytest.mark.parametrize(("name", "takes", "value", "error", "got"), GEOMETRY, ids=label)
def test_geometry_arguments(name, takes, value, error, got):
    for make in (Geometry, lambda **kwargs: ASAM(nn.Linear(2, 1), **kwargs)):
        with pytest.raises(error, match=rf"^{name} must .*{takes}.*, got {got}"):
            make(**{name: value})


@pytest.mark.parametrize("make", [ASAM, SAM])
@pytest.mark.parametrize(("name", "takes", "value", "error", "got"), COMMON, ids=label)
def test_minimizer_arguments(make, name, takes, value, error, got):
    with pytest.raises(error, match=rf"^{name} must .*{takes}.*, got .*{got}"):
        make(nn.Linear(2, 1), **{name: value})


@pytest.mark.parametrize("make", [ASAM, SAM, norm_parameters, weight_parameters])
def test_model_must_be_a_module(make):
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got list$"):
        make(list(nn.Linear(2, 1).parameters()))


@pytest.mark.parametrize(("value", "error", "got"), RHO, ids=label)
def test_rho_wherever_it_is_taken(value, error, got):
    asam, tensors = ASAM(nn.Linear(2, 1), rho=0.3), {"a": torch.ones(2)}
    message = rf"^rho must be a finite number >= 0, got {got}$"
    with pytest.raises(error, match=message):
        asam.rho = value
    with pytest.raises(error, match=message):
        asam.load_state_dict({"rho": value})
    with pytest.raises(error, match=message):
        Geometry().maximizer(tensors, tensors, value)
    with pytest.raises(error, match=message):
        Geometry().project(tensors, tensors, value)
    assert asam.rho == 0.3


@pytest.mark.parametrize(("state", "got"), [({}, r"\[\]"), ({"rho": 1.0, "eta": 0.1}, r"\['eta', 'rho'\]")])
def test_state_dict_keys(state, got):
    with pytest.raises(ValueError, match=f"^state_dict must have the keys \\['rho'\\], got {got}$"):
        ASAM(nn.Linear(2, 1)).load_state_dict(state)


@pytest.mark.parametrize(("state", "got"), [(None, "NoneType"), (0.5, "float"), (["rho"], "list")])
def test_state_dict_must_be_a_mapping(state, got):
    with pytest.raises(TypeError, match=f"^state_dict must be a mapping, got {got}$"):
        ASAM(nn.Linear(2, 1)).load_state_dict(state)


def test_params_that_are_not_the_models():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^params names 'weights', which is not a parameter of the model$"):
        ASAM(model, params=["weights"])
    with pytest.raises(ValueError, match=r"^params holds a tensor of shape \(3,\) that is not the model's"):
        ASAM(model, params=[torch.zeros(3)])
    with pytest.raises(ValueError, match=r"^params leaves nothing to perturb"):
        ASAM(model, params=[])
    with pytest.raises(ValueError, match=r"^params leaves nothing to perturb"):
        ASAM(model, params=["bias"], bias="fixed")
    with pytest.raises(ValueError, match=r"^params leaves nothing to perturb"):
        SAM(nn.ReLU())
    with pytest.raises(TypeError, match=r"^params must be real, got torch\.complex64 for 'weight'"):
        ASAM(nn.Linear(2, 1, dtype=torch.complex64))


def test_mappings_of_different_names():
    params, other = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}
    with pytest.raises(ValueError, match=r"^grads must have the names of params .*\['a', 'b'\], got \['a'\]$"):
        Geometry().maximizer(params, other, 0.1)
    for call in (lambda: Geometry().norm(params, other), lambda: Geometry().project(params, other, 0.1)):
        with pytest.raises(ValueError, match=r"^perturbations must have the names of params .*, got \['a'\]$"):
            call()


def test_a_scale_that_does_not_broadcast():
    with pytest.raises(ValueError, match=r"^normalization must .* 'a' of shape \(2, 3\) it returned shape \(2,\)$"):
        Geometry(lambda w: torch.ones(2)).scales({"a": torch.ones(2, 3)})


@pytest.mark.parametrize("returned", [None, [1.0, 2.0], "1"])
def test_a_scale_that_is_none(returned):
    with pytest.raises(TypeError, match=rf"^normalization must return .* 'a' it returned {type(returned).__name__}$"):
        Geometry(lambda w: returned).scales({"a": torch.ones(2)})


@pytest.mark.parametrize("name", ["closure", "ascent"])
@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (torch.ones(()), TypeError, "Tensor"),
        (3, TypeError, "int"),
        ([lambda: 0, 3], TypeError, "int"),
        ([], ValueError, "an empty sequence"),
        ((), ValueError, "an empty sequence"),
    ],
)
def test_closures_must_be_callable(name, value, error, got):
    model, closure = shapes_problem()
    arguments = {"closure": value} if name == "closure" else {"closure": closure, "ascent": value}
    with pytest.raises(error, match=rf"^{name} must be a callable .*, got {got}"):
        ASAM(model).backward(**arguments)


def test_backward_must_be_callable():
    model, closure = shapes_problem()
    with pytest.raises(TypeError, match=r"^backward must be a callable that takes the loss, got str$"):
        ASAM(model).backward(closure, backward="loss")


@pytest.mark.parametrize("rho", [0, 0.5])
@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        (lambda loss: None, TypeError, "closure must return the loss, a scalar tensor, got NoneType"),
        (lambda loss: loss.item(), TypeError, "closure must return the loss, a scalar tensor, got float"),
        (lambda loss: loss.expand(3), ValueError, r"closure must return a scalar tensor, got shape \(3,\): take"),
        (lambda loss: loss.detach(), RuntimeError, "the closure's loss has no graph"),
    ],
)
def test_what_a_closure_must_return(convert, error, message, rho):
    model, closure = shapes_problem()
    with pytest.raises(error, match=f"^{message}"):
        ASAM(model, rho=rho).backward(lambda: convert(closure()))


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("way", ["closure", "ascent", "rho zero", "momentum"])
def test_a_closure_that_calls_backward_itself(way, retain_graph):
    # that of torch.optim, which would fail in torch's words, or double the gradient
    model, closure = shapes_problem()
    asam = ASAM(model, rho=0 if way == "rho zero" else 0.5, direction=Momentum() if way == "momentum" else None)

    def with_backward():
        model.zero_grad()
        loss = closure()
        loss.backward(retain_graph=retain_graph)
        return loss

    closures = {"closure": closure, "ascent": with_backward} if way == "ascent" else {"closure": with_backward}
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"^the closure changes \.grad: it must compute the loss and return it, wi"
        ):
            asam.backward(**closures)
    model.zero_grad()
    asam.backward(closure)


OUTSIDE = [
    (lambda model, optimizer: ASAM(model), ""),
    (lambda model, optimizer: ASAM(model, direction=Gradient(mean=-1.0)), ""),
    (lambda model, optimizer: ASAM(model, direction=Momentum()), ", at w, or the closure changes it in place"),
    (lambda model, optimizer: ASAM(model, direction=Momentum(optimizer)), ", at w, or the closure changes it in place"),
]


@pytest.mark.parametrize(("make", "message"), OUTSIDE)
def test_outputs_that_were_computed_outside_the_closure(make, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    asam = make(model, optimizer)
    asam.backward(lambda: model(torch.ones(2, 3)).square().mean())
    optimizer.step()
    before = weights(model)
    outputs = model(torch.ones(2, 3))
    told = rf"^part of the loss's graph was made outside the closure{message}: compute the model's outputs in"
    with pytest.raises(RuntimeError, match=told):
        asam.backward(lambda: outputs.square().mean())
    assert_same(weights(model), before)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_closure_may_clear_the_gradients(set_to_none):
    model, closure = shapes_problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closure().backward()
    ASAM(model).backward(lambda: (optimizer.zero_grad(set_to_none=set_to_none), closure())[1])


def test_a_parameter_that_is_the_loss_collects_no_hooks():
    model = nn.Linear(1, 1)
    for _ in range(3):
        ASAM(model).backward(lambda: model.bias, backward=lambda loss: loss.backward())
    assert not model.bias._backward_hooks


def test_no_gradient_anywhere():
    model, closure = shapes_problem()
    stranger = torch.ones((), requires_grad=True)
    for backward in (None, lambda loss: loss.backward()):
        with pytest.raises(RuntimeError, match="no perturbed parameter has a gradient"):
            ASAM(model).backward(lambda: stranger * 2, backward=backward)
    with (
        # and no word of FSDP
        pytest.raises(RuntimeError, match=r"^no perturbed parameter .* needs loss\.backward\(\) before it$"),
        ASAM(model).perturbed(),
    ):
        raise AssertionError("the block must not run")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"has no graph: .* inference_mode\(\)"):
        ASAM(model).backward(closure)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="has no graph"):
        ASAM(model).backward(closure)
    with pytest.raises(RuntimeError, match="no perturbed parameter has a gradient"):
        ASAM(model).backward(lambda: stranger * 2)


@pytest.mark.parametrize("outer", ["backward", "perturbed"])
@pytest.mark.parametrize("inner", ["backward", "perturbed"])
@pytest.mark.parametrize("same", [True, False])
def test_nesting_is_refused(outer, inner, same):
    model, closure = shapes_problem()
    asam, before = ASAM(model), weights(model)
    within = asam if same else SAM(model)
    asam.backward(closure)  # what a closure may not do is looked at in the first call only
    within.backward(closure)

    def nested():
        if inner == "backward":
            within.backward(closure)
        else:
            with within.perturbed():
                pass
        return closure()

    closure().backward()

    def run():
        if outer == "backward":
            asam.backward(nested)
        else:
            with asam.perturbed():
                nested()

    with pytest.raises(RuntimeError, match=r"^the weights are perturbed already: leave"):
        run()
    assert_same(weights(model), before)
    asam.backward(closure)


def test_nesting_of_different_parameters():
    model, closure = nn.Linear(2, 1), lambda: model(torch.ones(1, 2)).square().sum()
    first, second = ASAM(model, params=["weight"], rho=0.1), SAM(model, params=["bias"], rho=0.2)
    before = weights(model)
    closure().backward()
    with first.perturbed():
        closure().backward()
        with second.perturbed():
            moved = {name: (value - before[name]).norm() for name, value in weights(model).items()}
    assert_same(weights(model), before)
    assert moved["weight"] > 0
    assert moved["bias"] == pytest.approx(0.2)


def test_replay_needs_backward():
    model, closure = shapes_problem()
    closure().backward()
    with (
        pytest.raises(RuntimeError, match=r"^replay_rng=True needs the whole step, which only backward\(closure\)"),
        ASAM(model, replay_rng=True).perturbed(),
    ):
        raise AssertionError("the block must not run")


def test_optimizer_arguments():
    model = nn.Linear(2, 1)
    asam, base = ASAM(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^asam must be an ASAM or SAM, got SGD$"):
        SharpnessAwareOptimizer(base, asam)
    with pytest.raises(TypeError, match=r"^base_optimizer must be a torch\.optim\.Optimizer, got type$"):
        SharpnessAwareOptimizer(asam, torch.optim.SGD)
    with pytest.raises(TypeError, match=r"^base_optimizer must take its step from the gradient, got LBFGS"):
        SharpnessAwareOptimizer(asam, torch.optim.LBFGS(model.parameters()))
    for more in ({"direction": Momentum()}, {"combine": lambda *products: (0, 1)}, {"replay_rng": True}):
        with pytest.raises(RuntimeError, match=rf"^{next(iter(more))}.* needs the whole step, which only backward"):
            SharpnessAwareOptimizer(ASAM(model, rho=0, **more), base)
    ours = SharpnessAwareOptimizer(asam, base)
    model.weight.grad = torch.ones(1, 2)
    with pytest.raises(TypeError, match=r"^step\(\) takes a closure, got Tensor: write step\(lambda: ...\)$"):
        ours.step(torch.ones(()))
    assert model.weight.grad is not None
    with pytest.raises(TypeError, match=r"^base_optimizer must .*, got SharpnessAwareOptimizer"):
        SharpnessAwareOptimizer(asam, ours)
    with pytest.raises(RuntimeError, match=r"^step\(\) needs a closure .*step the base optimizer instead$"):
        ours.step()
