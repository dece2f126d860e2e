"""A measurement leaves the model, its gradients and modes, the random state and torch's settings as they were."""

import copy
import dataclasses
import math
import operator
import random
import sys

import numpy as np
import pytest
import torch
from interrupted import interrupted
from quadratics import batches, cross_entropy, examples
from torch import nn

from asam import Geometry, perturbation
from asam.measure import (
    Objective,
    arithmetic,
    average_sharpness,
    evaluation,
    gibbs_certificate,
    hessian,
    interpolate,
    loss_line,
    loss_plane,
    random_direction,
    sharpness_profile,
    spectral_density,
    top_eigenvalues,
    trace,
    worst_case_sharpness,
)
from asam.measure.evaluation import Evaluation

GEOMETRY = Geometry(eta=0.0)
BOX = Geometry(p=math.inf)


class Rebinding(nn.Module):
    """A buffer that is replaced at every call, in evaluation mode too, and one that is written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("written", torch.zeros(3))

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.written.data.add_(x.detach().mean(0))
        return x


def make_model(dtype=torch.float64):
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Tanh(), nn.Dropout(0.3)), nn.Linear(5, 3), Rebinding()
    ).to(dtype)
    model(torch.randn(20, 4).to(dtype))  # statistics that are not those of a new layer
    model.train()
    model[1].eval()
    model[2].eval()
    model[2][1].train()
    cross_entropy(model, examples(dtype=dtype)).backward()
    model[3].bias.grad = None
    return model


def loss_fn(model, batch):
    torch.rand(())  # drawn, and of no effect on the loss
    logits = model(batch[0])
    error = (logits.argmax(1) != batch[1]).double().mean()
    return nn.functional.cross_entropy(logits, batch[1]), {"error": error}


def make(model, loss_fn=loss_fn, batchnorm="eval", dtype=torch.float64):
    return Objective(model, loss_fn, batches(examples(dtype=dtype), 4, 8), batchnorm=batchnorm)


def weights(objective):
    return {name: param.detach().clone() for name, param in objective.params.items()}


MEASUREMENTS = {
    "loss": lambda o: o.loss(),
    "loss at a perturbation": lambda o: o.loss(weights(o)),
    "means": lambda o: o.means(),
    "gradient": lambda o: o.gradient(),
    "gradient at a perturbation": lambda o: o.gradient(weights(o)),
    "worst case": lambda o: worst_case_sharpness(o, 0.1, geometry=GEOMETRY, restarts=2, steps=5),
    "worst case, box": lambda o: worst_case_sharpness(o, 0.1, geometry=BOX, steps=5),
    "one step": lambda o: worst_case_sharpness(o, 0.1, geometry=GEOMETRY, method="one_step"),
    "m-sharpness": lambda o: worst_case_sharpness(o, 0.1, geometry=GEOMETRY, m=6, steps=5),
    "profile": lambda o: sharpness_profile(o, [0.1, 0.2], geometry=GEOMETRY, steps=5),
    "average": lambda o: average_sharpness(o, 0.1, geometry=GEOMETRY, samples=4),
    "average, uniform": lambda o: average_sharpness(o, 0.1, geometry=GEOMETRY, samples=4, noise="uniform"),
    "hessian": lambda o: hessian(o) @ torch.ones(o.like.numel()),
    "adaptive hessian": lambda o: hessian(o, geometry=GEOMETRY) @ torch.ones(o.like.numel(), 2),
    "eigenvalues": lambda o: top_eigenvalues(hessian(o), 2, max_matvecs=8),
    "density": lambda o: spectral_density(hessian(o), matvecs=8),
    "trace": lambda o: trace(hessian(o), matvecs=6),
    "line": lambda o: loss_line(o, random_direction(o), points=3),
    "plane": lambda o: loss_plane(o, random_direction(o), random_direction(o, seed=1), points=3),
    "interpolation": lambda o: interpolate(
        o, {name: value * 2 for name, value in o.model.state_dict().items()}, points=3
    ),
    "certificate": lambda o: gibbs_certificate(o, 0.1, geometry=BOX, prior=weights(o), samples=3),
    "a new objective": lambda o: (
        Objective(o.model, o.loss_fn, [p.batch for p in o.pieces], batchnorm=o.batchnorm).examples
    ),
}


class State:
    """Everything a measurement must not change, as it is now."""

    def __init__(self, model):
        self.model = model
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.tensors = [(name, t, t.detach().clone(), t.data_ptr(), t._version) for name, t in tensors]
        self.grads = [(param, param.grad, copy.deepcopy(param.grad)) for param in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.random = torch.get_rng_state(), random.getstate()
        self.settings = self.current_settings()

    @staticmethod
    def current_settings():
        return {
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "matmul": torch.get_float32_matmul_precision(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "TF32": torch.backends.cudnn.allow_tf32,
            "attention": torch.nn.attention._cur_sdpa_kernel_backends(),
        }

    def assert_unchanged(self):
        now = [*self.model.named_parameters(), *self.model.named_buffers()]
        for (name, tensor, content, place, version), (name_now, tensor_now) in zip(self.tensors, now, strict=True):
            assert name_now == name
            assert tensor_now is tensor, name
            assert torch.equal(tensor, content), name
            assert tensor.data_ptr() == place, name
            # a counter of batches is counted up where the layer is made to train; no graph can need it
            assert tensor._version == version or name.endswith("num_batches_tracked"), name
        for param, grad, content in self.grads:
            assert param.grad is grad
            assert grad is None or torch.equal(grad, content)
        assert all(module.training is mode for module, mode in self.modes)
        assert torch.equal(torch.get_rng_state(), self.random[0])
        assert random.getstate() == self.random[1]
        assert self.current_settings() == self.settings


@pytest.fixture
def unusual_settings():
    precision, fastpath = torch.get_float32_matmul_precision(), torch.backends.mha.get_fastpath_enabled()
    torch.set_float32_matmul_precision("medium")
    torch.backends.mha.set_fastpath_enabled(not fastpath)
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.mha.set_fastpath_enabled(fastpath)


@pytest.mark.usefixtures("unusual_settings")
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_nothing_changes(measurement, batchnorm):
    model = make_model()
    torch.manual_seed(7)
    graph = cross_entropy(model, examples())  # the user's, needed again afterwards
    torch.manual_seed(7)
    expected = torch.autograd.grad(cross_entropy(model, examples()), list(model.parameters()))
    state = State(model)

    MEASUREMENTS[measurement](make(model, batchnorm=batchnorm))

    state.assert_unchanged()
    for grad, other in zip(torch.autograd.grad(graph, list(model.parameters())), expected, strict=True):
        assert torch.equal(grad, other)


class Failing:
    """A loss that fails at one call."""

    def __init__(self, error):
        self.error, self.calls, self.at = error, 0, None

    def __call__(self, model, batch):
        self.calls += 1
        loss = loss_fn(model, batch)  # the buffers have moved
        if self.calls == self.at:
            raise self.error
        return loss


@pytest.mark.usefixtures("unusual_settings")
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("boom")], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_nothing_changes_when_the_loss_fails(measurement, error):
    model, failing = make_model(), Failing(error)
    state = State(model)
    objective = make(model, failing, batchnorm="train")
    failing.calls = 0
    MEASUREMENTS[measurement](objective)
    calls = failing.calls
    assert calls >= 2
    for at in {1, 2, (calls + 1) // 2, calls}:
        failing.calls, failing.at = 0, at
        with pytest.raises(type(error), match="boom"):
            MEASUREMENTS[measurement](objective)
        state.assert_unchanged()


@pytest.mark.parametrize("at", range(1, 6))
def test_nothing_changes_when_an_objective_is_refused(at):
    model, failing = make_model(), Failing(ValueError("boom"))
    failing.at, state = at, State(model)
    with pytest.raises(ValueError, match="boom"):
        make(model, failing, batchnorm="train")
    state.assert_unchanged()


def numbers(result):
    """All the numbers in a result, as one list of tensors."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, int | float):
        return [torch.tensor(result, dtype=torch.float64)]
    if dataclasses.is_dataclass(result):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else ()
    return [tensor for value in values for tensor in numbers(value)]


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_the_context_does_not_count(measurement, context):
    objective = make(make_model(torch.float32), dtype=torch.float32)
    state, expected = State(objective.model), numbers(MEASUREMENTS[measurement](objective))
    with context():
        found = numbers(MEASUREMENTS[measurement](objective))
    assert len(found) == len(expected) > 0
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    state.assert_unchanged()


@pytest.mark.usefixtures("unusual_settings")
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_inside(measurement, batchnorm):
    seen, modes = [], []

    def watched(model, batch):
        seen.append(State.current_settings())
        modes.append([type(module) for module in model.modules() if module.training])
        return loss_fn(model, batch)

    objective = make(make_model(), watched, batchnorm)
    with torch.inference_mode(), torch.autocast("cpu"):
        MEASUREMENTS[measurement](objective)
    for settings in seen:
        assert not settings["inference"]
        assert not settings["autocast"]
        assert settings["matmul"] == "highest"
        assert not settings["fast path"]
    assert all(mode == ([nn.BatchNorm1d] if batchnorm == "train" else []) for mode in modes)


PRECISIONS = [
    ("", "tf32"),
    ("mkldnn", "bf16"),
    ("mkldnn.matmul", "bf16"),
    ("mkldnn.conv", "tf32"),
    ("cuda.matmul", "tf32"),
    ("cudnn.rnn", "ieee"),
]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no such settings")
@pytest.mark.parametrize(("place", "precision"), PRECISIONS)
def test_precision_of_single_operations(place, precision):
    def all_precisions():
        return {name: operator.attrgetter(name)(torch.backends).fp32_precision for name in operations}

    operations = ["cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
    seen = []

    def watched(model, batch):
        seen.append(all_precisions())
        return cross_entropy(model, batch)

    where = operator.attrgetter(place)(torch.backends) if place else torch.backends
    before, of_all = where.fp32_precision, all_precisions()
    try:
        where.fp32_precision = precision
        set_so = all_precisions()
        make(make_model(), watched).loss()
        assert all_precisions() == set_so
    finally:
        where.fp32_precision = before
    assert all_precisions() == of_all
    assert set(seen[-1].values()) == {"ieee"}


@pytest.mark.parametrize("moment", ["move", "_bring_back"])
def test_ctrl_c_while_everything_is_brought_back(moment, monkeypatch):
    model = make_model()
    objective, before = make(model), State(model)
    original, calls = getattr(Evaluation, moment), []

    def interrupted(self, *arguments):
        done = original(self, *arguments)
        if sys._getframe(1).f_code.co_name in ("_bring_back", "_opened"):
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Evaluation, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        worst_case_sharpness(objective, 0.3, geometry=GEOMETRY, steps=2)
    before.assert_unchanged()
    assert len(calls) == 2


FILES = [evaluation.__file__, arithmetic.__file__, perturbation.__file__]
FILES += [torch.autograd.grad_mode.__file__, torch.nn.attention.__file__]
INTERRUPTED = ["gradient", "hessian", "interpolation", "certificate", "a new objective"]


@pytest.mark.usefixtures("unusual_settings")
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 13])
@pytest.mark.parametrize("measurement", INTERRUPTED)
def test_nothing_changes_wherever_ctrl_c_comes(measurement, every):
    model = make_model()
    objective, state = make(model, batchnorm="train"), State(model)
    MEASUREMENTS[measurement](objective)  # what is made once is made, and Python 3.13 traces from the second call on
    with interrupted(FILES, 0) as passed:
        MEASUREMENTS[measurement](objective)
    assert passed[0] > 100
    seen, places = 0, range(1, passed[0] + 1, every)
    for place in places:
        try:
            with interrupted(FILES, place) as reached:
                MEASUREMENTS[measurement](objective)
            assert reached[0] < place
        except KeyboardInterrupt:
            seen += 1
        state.assert_unchanged()
    assert seen >= (len(places) if sys.version_info < (3, 13) else len(places) / 2)


class Remembering(nn.Module):
    """Keeps what it computed, counts its calls, and has weight norm, which keeps the weight that it computed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.weight_norm(nn.Linear(4, 3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = self.layer(x)
        return self.last


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_layers_keep_for_themselves():
    model = Remembering().double()
    model.layer(torch.ones(1, 4).double())
    kept = model.layer.weight
    worst_case_sharpness(make(model), 0.3, geometry=GEOMETRY, steps=2)
    assert model.layer.weight is kept
    assert model.calls == 0
    assert not hasattr(model, "last")


@pytest.mark.parametrize("fails", [False, True])
def test_reading_a_shuffled_loader(fails):
    dataset = torch.utils.data.TensorDataset(*examples())
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=_failing if fails else None)
    model = make_model()
    state = State(model)
    try:
        assert Objective(model, cross_entropy, loader).examples == 12
    except KeyError:
        assert fails
    state.assert_unchanged()


def _failing(examples):
    raise KeyError


class Drawing(torch.utils.data.Dataset):
    """Its examples, and with them the loss, draw from every global generator."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(4).double() + random.random() + np.random.random()


def test_the_random_states_of_numpy_and_python():
    def loss_fn(model, batch):
        random.random(), np.random.random()
        return model(batch).square().mean()

    before = random.getstate(), np.random.get_state()[1].tolist()
    objective = Objective(nn.Linear(4, 1).double(), loss_fn, torch.utils.data.DataLoader(Drawing(), batch_size=2))
    worst_case_sharpness(objective, 0.1, geometry=GEOMETRY, steps=2)
    hessian(objective) @ torch.ones(5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_hooks_of_a_training_have_no_part_in_a_measurement():
    model, plain = make_model(), make_model()
    calls = []

    def clamp(grad):
        calls.append(1)
        return grad.clamp(-1e-3, 1e-3)

    handles = [param.register_hook(clamp) for param in model.parameters()]
    ours, expected = (Objective(each, cross_entropy, [examples()]) for each in (model, plain))
    for name, gradient in expected.gradient().items():
        assert torch.equal(ours.gradient()[name], gradient)
    vector = torch.ones(expected.like.numel(), dtype=torch.float64)
    assert torch.equal(hessian(ours) @ vector, hessian(expected) @ vector)
    assert not calls
    model.zero_grad()
    cross_entropy(model, examples()).backward()
    assert len(calls) == len(handles)
    assert all(param.grad.abs().max() <= 1e-3 for param in model.parameters())
    handles[0].remove()
    assert not next(iter(model.parameters()))._backward_hooks
