"""skorch: a net whose ``train_step_single`` takes the gradient at w + e; everything around it stays."""

import pickle

import numpy as np
import pytest
import torch
from slow_reference import assert_near, assert_same, maximizer, weights
from torch import nn

pytest.importorskip("skorch")
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, GradientNormClipping, LRScheduler
from skorch_net import ASAMClassifier  # the recipe, in examples/


def data(size=24):
    generator = np.random.default_rng(0)
    return generator.normal(size=(size, 5)), generator.integers(3, size=size)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x):
        return self.layers(x)


OPTIONS = {"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}
OPTIONS |= {"lr": 0.2, "batch_size": 8, "max_epochs": 3, "train_split": None, "verbose": 0}


def net(**options):
    return ASAMClassifier(Network, **OPTIONS, **options)


def by_hand(rho, max_norm=None, gamma=1.0, epochs=3):
    """The weights after the epochs, from the formulas, and the mean loss at w of each epoch."""
    model, (x, y) = Network(), map(torch.tensor, data())
    velocity = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    losses = []

    def pass_(part):
        value = nn.functional.cross_entropy(model(x[part]), y[part])
        return value.detach(), dict(zip(velocity, torch.autograd.grad(value, list(model.parameters())), strict=True))

    for epoch in range(epochs):
        total = 0.0
        for part in (slice(i, i + 8) for i in range(0, len(x), 8)):
            w = weights(model)
            value, g = pass_(part)
            e = maximizer(w, g, rho)
            model.load_state_dict({name: w[name] + e[name] for name in w})
            _, g = pass_(part)
            if max_norm is not None:
                norm = torch.stack([grad.norm() for grad in g.values()]).norm()
                g = {name: grad * min(1, max_norm / (norm + 1e-6)) for name, grad in g.items()}
            velocity = {name: 0.9 * velocity[name] + g[name] for name in w}
            model.load_state_dict({name: w[name] - 0.2 * gamma**epoch * velocity[name] for name in w})
            total += value.item() * 8 / len(x)
        losses.append(total)
    return weights(model), losses


def test_training_is_the_loop_written_by_hand():
    trained = net(rho=0.3).fit(*data())
    expected, losses = by_hand(0.3)
    assert_near(weights(trained.module_), expected)
    np.testing.assert_allclose(trained.history[:, "train_loss"], losses, rtol=1e-12)


def test_clipping_and_the_scheduler_are_callbacks():
    callbacks = [GradientNormClipping(0.3), LRScheduler(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)]
    trained = net(rho=0.3, callbacks=callbacks).fit(*data())
    expected, _ = by_hand(0.3, max_norm=0.3, gamma=0.5)
    assert_near(weights(trained.module_), expected)
    assert (expected["layers.0.weight"] - by_hand(0.3)[0]["layers.0.weight"]).norm() > 0.01


def test_a_checkpoint_goes_on_to_the_same_weights(tmp_path):
    whole = net(rho=0.3).fit(*data())
    checkpoint = Checkpoint(dirname=tmp_path, monitor=None, load_best=False)
    net(rho=0.3, callbacks=[checkpoint]).set_params(max_epochs=2).fit(*data())
    resumed = net(rho=0.3).initialize()
    resumed.load_params(checkpoint=checkpoint)
    resumed.set_params(max_epochs=1).partial_fit(*data())
    assert_same(weights(resumed.module_), weights(whole.module_))


def test_rho_is_searched_over():
    search = GridSearchCV(net(), {"rho": [0.0, 0.3, 1.0]}, cv=2, scoring="neg_log_loss").fit(*data())
    assert len(set(search.cv_results_["mean_test_score"])) == 3
    best = search.best_params_["rho"]
    assert_same(weights(search.best_estimator_.module_), weights(net(rho=best).fit(*data()).module_))
    changed = net(rho=0.1).fit(*data()).set_params(rho=0.3).fit(*data())
    assert_near(weights(changed.module_), by_hand(0.3)[0])


def test_rho_zero_is_the_plain_net():
    ours = net(rho=0.0).fit(*data())
    plain = NeuralNetClassifier(Network, **OPTIONS).fit(*data())
    assert_same(weights(ours.module_), weights(plain.module_))


def test_a_net_is_pickled():
    trained = net(rho=0.3).fit(*data())
    again = pickle.loads(pickle.dumps(trained))
    for one in (trained, again):
        one.set_params(max_epochs=1).partial_fit(*data())
    assert again.rho == 0.3
    assert_same(weights(again.module_), weights(trained.module_))
