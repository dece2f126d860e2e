"""Two small ReLU networks, and how to rescale one without changing its function."""

import math

import torch
from torch import Tensor, nn

from . import InputError

MODELS = ("mlp", "cnn")


def build(model: str, input_shape: tuple[int, ...], classes: int, dropout: float = 0.0) -> nn.Sequential:
    """``"mlp"``: two hidden layers of 128. ``"cnn"``: three convolutions (16, 32, 32) with batch norm.

    ``dropout`` follows the hidden layers of the mlp.

    Raises:
        InputError: there is no such network, or it has no dropout.
    """
    if dropout and model != "mlp":
        raise InputError(f"only the mlp has dropout, not {model}")
    if model == "mlp":
        layers: list[nn.Module] = [nn.Flatten()]
        for features, out in ((math.prod(input_shape), 128), (128, 128)):
            layers += [nn.Linear(features, out), nn.ReLU()] + [nn.Dropout(dropout)] * (dropout > 0)
        return nn.Sequential(*layers, nn.Linear(128, classes))
    layers = []
    for channels, out, stride in ((input_shape[0], 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def rescale_(network: nn.Sequential, factor: float) -> None:
    """Multiply what feeds the first ReLU by ``factor`` and divide the next layer's weights by it.

    relu(a x) = a relu(x) for a > 0, so the network computes the same function.
    """
    layers = list(network.children())
    relu = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU))
    following = next(layer for layer in layers[relu:] if isinstance(layer, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        for param in layers[relu - 1].parameters():
            param.mul_(factor)
        weight: Tensor = following.weight
        weight.div_(factor)
