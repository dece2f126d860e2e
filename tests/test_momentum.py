"""Against the momentum: one pass a step, statistics of batch normalization at w, and the optimizers it works with."""

import copy

import pytest
import torch
from slow_reference import applied, assert_near, assert_same, gradient, weights
from torch import nn
from torch.optim.swa_utils import update_bn
from trainings import Training, add_

from asam import ASAM, EconomicalASAM, Momentum, weight_parameters

LINEAR = nn.Linear(3, 1)
OWN = {"own": lambda optimizer, **more: Momentum(decay=0.5, **more), "optimizer": Momentum}


class Counter(nn.Module):
    """A buffer of another kind."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x


class Normalized:
    """A network with batch norm; each pass notes whether it had a gradient, the weights and the loss."""

    def __init__(self, kind="own", every=3, momentum=0.1, rho=0.5):
        self.model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), Counter(), nn.Tanh(), nn.Linear(6, 1)
        ).double()
        self.inputs = torch.randn(20, 8, 4, dtype=torch.float64) + 1
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.asam = ASAM(self.model, rho=rho, direction=OWN[kind](self.optimizer, statistics_every=every))
        self.passes = []

    def step(self, step):
        self.passes = []

        def closure():
            loss = self.model(self.inputs[step]).square().mean()
            self.passes.append((torch.is_grad_enabled(), weights(self.model), loss.detach()))
            return loss

        loss = self.asam.backward(closure)
        at_w = weights(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, at_w

    def statistics(self):
        return copy.deepcopy({n: b for n, b in self.model.named_buffers() if not n.endswith("seen")})


@pytest.mark.parametrize("kind", OWN)
def test_one_pass_a_step(kind):
    training = Training()
    training.asam = ASAM(training.model, direction=OWN[kind](training.optimizer))
    calls = []
    for step in range(12):
        training.asam.backward(lambda step=step: (calls.append(step), training.loss(step))[1])
        training.optimizer.step()
        training.optimizer.zero_grad()
    assert calls == list(range(12))


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("every", [1, 3, 10])
def test_with_running_statistics_a_look_at_w_now_and_then(kind, every):
    training = Normalized(kind, every)
    looked = []
    for step in range(14):
        loss, at_w = training.step(step)
        *looks, (with_gradient, there, value) = training.passes
        assert with_gradient
        assert len(looks) <= 1
        assert training.asam.loss_at == ("w" if looks or step == 0 else "w + e")
        if looks:
            looked.append(step)
            assert not looks[0][0]
            assert_same(looks[0][1], at_w)
            value = looks[0][2]
        assert torch.equal(loss, value)
        assert torch.equal(there["0.weight"], at_w["0.weight"]) == (step == 0)
    assert looked == list(range(1, 14, every))


@pytest.mark.parametrize("layers", ["evaluation", "untracked"])
def test_layers_that_collect_nothing_need_no_look(layers):
    training = Normalized(every=1)
    if layers == "evaluation":
        training.model[1].eval()
    else:
        training.model[1].running_mean = training.model[1].running_var = None
        training.model[1].track_running_stats = False
    before = training.statistics()
    for step in range(4):
        training.step(step)
        assert len(training.passes) == 1
    assert_same(training.statistics(), before)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_statistics_are_those_at_w_and_other_buffers_move_once(momentum, kind):
    training = Normalized(kind, momentum=momentum)
    for step in range(9):
        plain = copy.deepcopy(training.model)
        training.step(step)
        if step == 0 or len(training.passes) == 2:
            plain(training.inputs[step])
        assert_same(training.statistics(), {n: b for n, b in plain.named_buffers() if not n.endswith("seen")})
        assert training.model[2].seen == step + 1
    assert training.model[1].num_batches_tracked == 4


@pytest.mark.parametrize("kind", OWN)
def test_a_resumed_training_looks_when_it_would_have(kind):
    training, resumed = Normalized(kind), Normalized(kind)
    for step in range(3):
        training.step(step)
    resumed.inputs = training.inputs
    for part in ("model", "optimizer", "asam"):
        getattr(resumed, part).load_state_dict(copy.deepcopy(getattr(training, part).state_dict()))
    looked = []
    for step in range(3, 9):
        for each in (training, resumed):
            each.step(step)
            looked.append(len(each.passes) == 2)
        assert_same(resumed.statistics(), training.statistics())
    assert looked[::2] == looked[1::2] == [False, True, False, False, True, False]


@pytest.mark.parametrize("looking", [True, False])
def test_weights_and_statistics_come_back_after_an_exception(looking):
    training = Normalized(every=1 if looking else 100)
    for step in range(3):
        training.step(step)
    before, buffers = weights(training.model), training.statistics()
    calls = []

    def closure():
        calls.append(None)
        loss = training.model(training.inputs[3]).square().mean()
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        training.asam.backward(closure)
    assert len(calls) == 1 + looking
    assert_same(weights(training.model), before)
    if not looking:
        assert_same(training.statistics(), buffers)


def test_evaluation_is_as_with_estimated_statistics_and_far_off_with_those_at_w_plus_e():
    torch.manual_seed(3)
    targets = torch.arange(600) % 4
    inputs = torch.randn(4, 10)[targets] + torch.randn(600, 10)
    layers = [nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    asam = ASAM(model, rho=30.0, direction=Momentum(decay=0.9), params=weight_parameters(model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    # one that collects its statistics in the same passes, wherever they are
    elsewhere = copy.deepcopy(model)

    def follow():
        with torch.no_grad():
            for param, other in zip(elsewhere.parameters(), model.parameters(), strict=True):
                param.copy_(other)

    for _ in range(400):
        batch = torch.randperm(600)[:50]

        def closure(batch=batch):
            if torch.is_grad_enabled():
                follow()
                elsewhere(inputs[batch])
            return nn.functional.cross_entropy(model(inputs[batch]), targets[batch])

        asam.backward(closure)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    follow()
    estimated = copy.deepcopy(model)
    update_bn(inputs.split(100), estimated)

    def error(network):
        return (network.eval()(inputs).argmax(1) != targets).float().mean().item()

    assert error(estimated) < 0.25
    assert abs(error(model) - error(estimated)) < 0.03
    assert error(elsewhere) > error(estimated) + 0.3


BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 or newer
    BASES["Muon"] = lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.02)


@pytest.mark.parametrize("base", BASES)
def test_against_the_momentum_of_an_optimizer(base):
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    inputs, targets = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    optimizer = BASES[base](model.parameters())
    asam = ASAM(model, rho=0.3, direction=Momentum(optimizer))
    key = "exp_avg" if base.startswith("Adam") else "momentum_buffer"

    def closure():
        return nn.functional.cross_entropy(model(inputs), targets)

    for step in range(5):
        w = weights(model)
        momenta = {name: -optimizer.state[p][key] for name, p in model.named_parameters() if step}
        momenta = copy.deepcopy(momenta)
        e = asam.geometry.maximizer(w, momenta, 0.3) if step else {}
        (there,) = applied(asam, model, closure)
        # Muon keeps it in bfloat16 in some releases
        assert_near(there, {name: w[name] + e.get(name, 0) for name in w}, rtol=1e-12, atol=1e-12)
        assert_same(weights(model), w)
        moved = copy.deepcopy(model)
        add_(moved, e)
        expected = gradient(moved, lambda moved=moved: nn.functional.cross_entropy(moved(inputs), targets))
        assert_near({name: p.grad for name, p in model.named_parameters()}, expected, rtol=1e-10, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()


def test_a_group_that_is_added_later_is_climbed_once_it_has_momentum():
    training = Training()
    head = list(training.model.head.parameters())
    optimizer = torch.optim.SGD([p for n, p in training.model.named_parameters() if "head" not in n], 0.1, 0.9)
    training.optimizer, training.asam = optimizer, ASAM(training.model, rho=0.3, direction=Momentum(optimizer))
    message = r"^parameters stay at w, such as 'head\.weight' \(2 of 7\): SGD does not hold them, or holds them with mo"
    with pytest.warns(UserWarning, match=message):
        training.step(0)
    moved = []
    for step in range(1, 4):
        if step == 2:
            optimizer.add_param_group({"params": head})
        training.model.zero_grad()
        (there,) = applied(training.asam, training.model, lambda step=step: training.loss(step))
        moved.append(not torch.equal(there["head.weight"], training.model.head.weight))
        assert not torch.equal(there["conv.weight"], training.model.conv.weight)
        optimizer.step()
    assert moved == [False, False, True]


class Around(torch.optim.Optimizer):
    """An optimizer that leaves the state to the one that it wraps."""

    def __init__(self, params, **options):
        self.base = torch.optim.SGD(params, momentum=0.9, **options)
        super().__init__(self.base.param_groups, self.base.defaults)

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("base", [torch.optim.Adagrad, torch.optim.Adafactor])
def test_an_optimizer_without_momentum(base):
    training = Training("the optimizer's momentum", base=base)
    if base is torch.optim.Adafactor:  # it shows only once it has taken a step
        training.step(0)
    before = weights(training.model)
    with pytest.raises(RuntimeError, match=rf"^{base.__name__} keeps no momentum to climb against: give it one"):
        training.step(1)
    assert_same(weights(training.model), before)
    training.asam.rho = 0.0
    training.step(2)
    assert not torch.equal(training.model.head.weight, before["head.weight"])


@pytest.mark.parametrize("held", [False, True])
def test_parameters_that_the_optimizer_has_no_momentum_for_are_told_of_once(held):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters()}]
    groups += [{"params": model[1].parameters(), "momentum": 0.0}] if held else []
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    asam = EconomicalASAM(model, steps=9, optimizer=optimizer)
    told = (
        r"^parameters stay at w, such as '1\.weight' \(2 of 4\): SGD does not hold them, or holds them with momentum=0$"
    )
    with pytest.warns(UserWarning, match=told) as warned:
        asam.backward(lambda: model(torch.ones(2, 3)).square().mean())
    assert [warning.filename for warning in warned] == [__file__]
    optimizer.step()
    asam.backward(lambda: model(torch.ones(2, 3)).square().mean())  # another warning would be an error


def test_frozen_parameters_that_the_optimizer_does_not_hold_are_no_news():
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01, momentum=0.9)
    asam = ASAM(model, direction=Momentum(optimizer))  # a warning would be an error
    asam.backward(lambda: model(torch.ones(2, 3)).square().mean())
    optimizer.step()
    assert asam.loss_at == "w"


def test_a_loss_that_depends_on_no_parameter_is_refused():
    training = Training("the optimizer's momentum")
    training.step(0)
    other = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^no perturbed parameter has a gradient"):
        training.asam.backward(lambda: other * 2)


@pytest.mark.parametrize("direction", ["own momentum", "the optimizer's momentum"])
def test_another_parameter_in_the_place_of_one_is_refused(direction):
    training = Training(direction)
    training.step(0)
    training.model.head = nn.Linear(training.model.head.in_features, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^the model has another parameter 'head\.weight' than when"):
        training.step(1)


def test_an_optimizer_that_leaves_its_state_to_another_is_told_of_once():
    training = Training("the optimizer's momentum", base=Around)
    for step in range(10):
        training.step(step)
    told = r"^in 10 steps nothing was perturbed: Around keeps no momentum to climb against"
    with pytest.warns(UserWarning, match=told) as warned:
        training.asam.backward(lambda: training.loss(10))
    assert warned[0].filename == __file__
    for step in range(11, 30):
        training.step(step)


def test_a_momentum_that_comes_late_is_no_missing_one():
    # what is perturbed is frozen at first, and the steps of the others leave no momentum
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "momentum": 0.0}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    asam = ASAM(model, direction=Momentum(optimizer), params=["1.weight"])
    at = []
    for step in range(30):
        model[1].requires_grad_(step >= 20)
        asam.backward(lambda: model(torch.ones(2, 3)).square().mean())
        at.append(asam.loss_at)
        optimizer.step()
        optimizer.zero_grad()
    assert at == ["w"] * 21 + ["w + e"] * 9


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("make", [Momentum, lambda optimizer: EconomicalASAM(LINEAR, steps=9, optimizer=optimizer)])
def test_an_optimizer_whose_momentum_is_0_is_refused_at_once(make, base):
    with pytest.raises(ValueError, match=rf"^{base.__name__} keeps no momentum to climb against: give it one"):
        make(base(LINEAR.parameters(), lr=0.1))


def test_an_ascent_of_its_own_is_of_no_account():
    training = Training("own momentum")
    training.step(0)
    calls = []
    loss = training.asam.backward(lambda: training.loss(1), ascent=lambda: calls.append(1))
    assert calls == []
    assert loss.isfinite()


def test_an_optimizer_that_trains_another_model_is_refused():
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    asam = ASAM(model, direction=Momentum(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)))
    with pytest.raises(RuntimeError, match=r"^SGD has no momentum for any of the parameters that are perturbed"):
        asam.backward(lambda: model(torch.ones(2, 3)).sum())


@pytest.mark.parametrize("momentum", [torch.ones(4, 1), torch.ones(4, 3).to_sparse()], ids=["low rank", "sparse"])
def test_a_momentum_of_another_shape_is_refused(momentum):
    model = nn.Linear(3, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = momentum
    with pytest.raises(RuntimeError, match=r"^SGD keeps a momentum of shape .* for 'weight' of shape \(4, 3\)"):
        ASAM(model, direction=Momentum(optimizer)).backward(lambda: model(torch.ones(2, 3)).sum())


def test_a_closure_that_takes_gradients_itself_does_so_under_enable_grad():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inputs = torch.randn(8, 2, requires_grad=True)

    def closure():
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            return slope.square().mean()

    asam = ASAM(model, direction=Momentum())
    for _ in range(3):
        assert asam.backward(closure).isfinite()
    assert model[1].num_batches_tracked == 2  # at w in the first call, before there is a momentum, and in the second
