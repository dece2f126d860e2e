"""The networks: how large, on which images, and what is refused."""

import math
import sys

import pytest
import torch
from torch import nn

from asam.experiments import InputError
from asam.experiments.models import MODELS, NAMES, build, rescale_

# million parameters with 10 classes (resnet50: 1000), as the papers or the usual implementations have them
MILLIONS = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet56": 0.85,
    "vgg19-bn": 20.0,
    "densenet121": 7.0,
    "resnext29-32x4d": 4.8,
    "wrn28-2": 1.5,
    "wrn28-10": 36.5,
    "pyramidnet272": 26.0,
    "resnet50": 25.6,
}


def test_all_networks_of_the_paper_are_counted():
    assert set(NAMES) == {*MODELS, "vit", *MILLIONS}


@pytest.mark.parametrize("model", MILLIONS)
def test_number_of_parameters(model):
    pytest.importorskip("pytorchcv")
    with torch.device("meta"):
        network = build(model, (3, 32, 32), 1000 if model == "resnet50" else 10)
    found = sum(param.numel() for param in network.parameters()) / 1e6
    assert found == pytest.approx(MILLIONS[model], rel=0.025)


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 16, 16)])
def test_shape_of_the_logits(model, shape):
    pytest.importorskip("pytorchcv")
    with torch.device("meta"):
        network = build(model, shape, 36)
        assert network(torch.empty(2, *shape)).shape == (2, 36)


@pytest.mark.parametrize("model", ["resnet20", "wrn28-2", "vgg19-bn", "vit"])
def test_they_compute_and_every_parameter_gets_a_gradient(model):
    pytest.importorskip("pytorchcv")
    network = build(model, (1, 28, 28), 10)
    network(torch.randn(4, 1, 28, 28)).logsumexp(1).sum().backward()
    assert all(param.grad.isfinite().all() and param.grad.any() for param in network.parameters())


def test_pooling_over_the_whole_image_is_what_pytorchcv_does_at_32():
    resnet_cifar = pytest.importorskip("pytorchcv.models.resnet_cifar")
    theirs, ours = resnet_cifar.resnet20_cifar10(), build("resnet20", (3, 32, 32), 10)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(inputs), theirs.eval()(inputs))


def test_dropout_follows_the_hidden_layers_of_the_mlp():
    plain, dropped = build("mlp", (1, 8, 8), 10), build("mlp", (1, 8, 8), 10, dropout=0.3)
    kinds = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in plain] == kinds
    assert [type(layer) for layer in dropped] == [*kinds[:3], nn.Dropout, *kinds[3:5], nn.Dropout, kinds[5]]
    assert {layer.p for layer in dropped if isinstance(layer, nn.Dropout)} == {0.3}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_rescaling_keeps_the_function_and_changes_the_weights(model, factor):
    torch.manual_seed(0)
    network = build(model, (1, 8, 8), 10).double()
    for param in network.parameters():
        if param.ndim == 1:  # batch norm starts with biases of 0
            torch.nn.init.uniform_(param, 0.5, 1.5)
    inputs = torch.randn(16, 1, 8, 8, dtype=torch.float64)
    before, weights = network(inputs), [p.clone() for p in network.parameters()]
    rescale_(network, factor)
    torch.testing.assert_close(network(inputs), before, rtol=1e-9, atol=1e-9)
    assert sum(not torch.equal(p, q) for p, q in zip(network.parameters(), weights, strict=True)) == 3


def test_rescaling_an_mlp_with_dropout_passes_it_by():
    network = build("mlp", (1, 2, 2), 3, dropout=0.5).double().eval()
    inputs = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    before = network(inputs)
    rescale_(network, 2.0)
    torch.testing.assert_close(network(inputs), before)


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"no network 'lenet'; there are mlp, cnn, vit, resnet20, .*resnet50$"):
        build("lenet", (1, 28, 28), 10)
    with pytest.raises(InputError, match="only the mlp has dropout, not cnn"):
        build("cnn", (1, 28, 28), 10, dropout=0.1)
    with pytest.raises(InputError, match="vgg19-bn needs images of 16x16 or more, got 8x8"):
        build("vgg19-bn", (1, 8, 8), 10)
    with pytest.raises(InputError, match="vit needs images of 2x2 or more, got 1x1"):
        build("vit", (3, 1, 1), 10)
    with pytest.raises(InputError, match="only mlp and cnn can be rescaled, not Vgg19"):
        rescale_(build("vgg19-bn", (1, 28, 28), 10), 2.0)
    monkeypatch.setitem(sys.modules, "pytorchcv.models.wrn_cifar", None)
    with pytest.raises(InputError, match=r"the network wrn28-2 comes from pytorchcv: pip install --no-deps pytorchcv$"):
        build("wrn28-2", (1, 28, 28), 10)


def test_initial_weights_come_from_the_default_generator():
    pytest.importorskip("pytorchcv")
    norms = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        norms.append(math.fsum(param.norm().item() for param in build("resnet20", (1, 28, 28), 10).parameters()))
    assert norms[0] == norms[1] != norms[2]
