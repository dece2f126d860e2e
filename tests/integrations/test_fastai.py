"""fastai: a callback that takes the place of the backward pass; it needs no torchvision."""

import warnings

import pytest
import torch
from slow_reference import assert_near, assert_same, maximizer, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("fastai", reason="fastai is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own: torch.jit.script is deprecated
    pytest.importorskip("fastai.learner", exc_type=ImportError, reason="fastai does not find all that it needs")
    from fastai.callback.core import Callback
    from fastai.callback.schedule import Learner
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.optimizer import OptimWrapper
    from fastai_learner import SharpnessAware  # the recipe, in examples/

RHO = 0.3


def data(size=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss(outputs, targets):
    """In float32, as fastai's Recorder wants it; the gradient of the cast is 1, so that the others stay float64."""
    return nn.functional.cross_entropy(outputs, targets).float()


def learner(tmp_path, *callbacks):
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    learn = Learner(
        DataLoaders(loader, loader),
        network(),
        loss_func=loss,
        opt_func=lambda params, **options: OptimWrapper(params, torch.optim.SGD, momentum=0.9, **options),
        lr=0.2,
        path=tmp_path,
        cbs=callbacks,
    )
    learn.train_bn = False
    return learn


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)
    return weights(learn.model)


def by_hand(epochs=2, accumulate=1, max_norm=None):
    model, (x, y) = network(), data()
    velocity = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}

    def gradient(part):
        value = nn.functional.cross_entropy(model(x[part]), y[part])
        return dict(zip(total, torch.autograd.grad(value, list(model.parameters())), strict=True))

    for i in range(4 * epochs):
        part, w = slice(8 * (i % 4), 8 * (i % 4) + 8), weights(model)
        e = maximizer(w, gradient(part), RHO)
        model.load_state_dict({name: w[name] + e[name] for name in w})
        g = gradient(part)
        model.load_state_dict(w)
        total = {name: total[name] + g[name] / accumulate for name in w}
        if (i + 1) % accumulate == 0:
            norm = torch.stack([grad.norm() for grad in total.values()]).norm()
            factor = 1 if max_norm is None else min(1, max_norm / (norm + 1e-6))
            velocity = {name: 0.9 * velocity[name] + factor * total[name] for name in w}
            total = {name: torch.zeros_like(grad) for name, grad in total.items()}
            model.load_state_dict({name: w[name] - 0.2 * velocity[name] for name in w})
    return weights(model)


def test_training_is_the_loop_written_by_hand(tmp_path):
    assert_near(fit(learner(tmp_path, SharpnessAware(RHO))), by_hand())


def test_accumulation_and_clipping_are_callbacks(tmp_path):
    learn = learner(tmp_path, SharpnessAware(RHO), GradientAccumulation(16), GradientClip(0.2))
    assert_near(fit(learn), by_hand(accumulate=2, max_norm=0.2))


def test_rho_zero_is_the_plain_learner(tmp_path):
    assert_same(fit(learner(tmp_path, SharpnessAware(0.0))), fit(learner(tmp_path)))


def test_each_step_has_two_forward_passes_and_the_loss_at_w(tmp_path):
    learn, losses, calls = learner(tmp_path, SharpnessAware(RHO)), [], []
    learn.model.register_forward_hook(lambda module, *_: calls.append(module.training))
    learn.add_cb(Callback(after_batch=lambda self: losses.append(self.learn.loss.item()) if self.training else None))
    with torch.no_grad():
        x, y = data()
        expected = nn.functional.cross_entropy(network()(x[:8]), y[:8]).item()
    fit(learn, 1)
    assert calls == [True] * 8 + [False] * 4
    assert losses[0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")  # fastai's load uses it
def test_a_saved_learner_goes_on_to_the_same_weights(tmp_path):
    whole = learner(tmp_path, SharpnessAware(RHO))
    fit(whole)
    whole.save("half", with_opt=True)
    expected = fit(whole)
    resumed = learner(tmp_path, SharpnessAware(RHO))
    resumed.create_opt()
    resumed.load("half", with_opt=True)
    assert_same(fit(resumed), expected)


def test_one_cycle(tmp_path):
    learn = learner(tmp_path, SharpnessAware(RHO))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(8, 0.3)
    x, y = data()
    with torch.no_grad():
        assert nn.functional.cross_entropy(learn.model(x), y) < 0.8 * nn.functional.cross_entropy(network()(x), y)
