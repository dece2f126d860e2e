"""Which sharpness stays when a ReLU network is rescaled without changing its function, and which does not."""

import copy
import math

import pytest
import torch
from quadratics import Net, examples, net_objective
from torch import nn

from asam import Geometry
from asam.measure import Objective, average_sharpness, worst_case_sharpness

INVARIANT = Geometry(eta=0.0, bias="scaled")


def worst(objective, geometry, p=2, rho=0.1, **arguments):
    geometry = Geometry(geometry.normalization, p=p, eta=geometry.eta, bias=geometry.bias)
    return worst_case_sharpness(objective, rho, geometry=geometry, **arguments).value


def pair(per_neuron=True):
    """The objectives of a network and of the rescaled one."""
    net = Net()
    rescaled = copy.deepcopy(net).rescale(per_neuron)
    x, _ = examples()
    torch.testing.assert_close(rescaled(x), net(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rescaled.layers[0].weight, net.layers[0].weight, rtol=0.5)
    return net_objective(net), net_objective(rescaled)


@pytest.mark.parametrize("method", ["one_step", "auto_pgd"])
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("m", [None, 5])
def test_elementwise_without_eta_does_not_see_the_scale_of_a_neuron(p, m, method):
    before, after = pair()
    value = worst(before, INVARIANT, p, m=m, method=method)
    assert value > 0.01
    assert worst(after, INVARIANT, p, m=m, method=method) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_the_average_does_not_see_it_either(noise):
    values = [average_sharpness(o, 0.1, geometry=INVARIANT, noise=noise, samples=8).value for o in pair()]
    assert values[1] == pytest.approx(values[0], rel=1e-9)


@pytest.mark.parametrize(
    ("geometry", "drift"),
    [
        (Geometry(eta=0.01, bias="scaled"), 1e-3),
        (Geometry(eta=0.0, bias="unscaled"), 1e-3),
        (Geometry("layerwise", eta=0.0, bias="scaled"), 1e-3),
        (Geometry("none"), 0.5),
    ],
    ids=["eta", "unscaled biases", "layerwise", "none"],
)
@pytest.mark.parametrize("p", [2, math.inf])
def test_others_drift_with_the_scale_of_a_neuron(geometry, drift, p):
    before, after = (worst(objective, geometry, p) for objective in pair())
    assert abs(math.log(after / before)) > drift


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("normalization", ["filterwise", "layerwise"])
def test_layerwise_and_filterwise_do_not_see_the_scale_of_a_layer(normalization, p):
    geometry = Geometry(normalization, eta=0.0, bias="scaled")
    before, after = (worst(objective, geometry, p) for objective in pair(per_neuron=False))
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize(("normalization", "invariant"), [("filterwise", True), ("layerwise", False)])
def test_filterwise_does_not_see_the_scales_of_filters_followed_by_normalization(normalization, invariant):
    generator = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, eps=1e-14), nn.Tanh(), nn.Linear(6, 3)).double()
    rescaled = copy.deepcopy(net)
    with torch.no_grad():
        rescaled[0].weight.mul_(torch.exp(torch.randn(6, 1, generator=generator, dtype=torch.float64)))
    geometry = Geometry(normalization, eta=0.0)
    before, after = (worst(net_objective(model, batchnorm="train"), geometry) for model in (net, rescaled))
    if invariant:
        assert after == pytest.approx(before, rel=1e-9)
    else:
        assert abs(math.log(after / before)) > 0.01


@pytest.mark.parametrize("p", [2, math.inf])
def test_tied_weights_count_once(p):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1, bias=False).double()
            self.b = nn.Linear(1, 1, bias=False).double()
            self.b.weight = self.a.weight
            nn.init.constant_(self.a.weight, 2.0)

        def forward(self, x):
            return self.b(self.a(x))

    data = [torch.ones(1, 1, dtype=torch.float64)]
    objective = Objective(Tied(), lambda model, x: (model(x) - 4).square().mean() / 2, data)
    # one weight may grow by rho: (w (1 + rho))^2; two would each by rho / sqrt(2) for p = 2
    assert list(objective.params) == ["a.weight"]
    assert worst(objective, INVARIANT, p) == pytest.approx((4 * 1.1**2 - 4) ** 2 / 2, rel=1e-9)
