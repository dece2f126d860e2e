"""Two small ReLU networks, and how to rescale one without changing its function."""

import torch
from torch import Tensor, nn

MODELS = ("mlp", "cnn")


def build(model: str, input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """``"mlp"``: two hidden layers of 128. ``"cnn"``: three convolutions (16, 32, 32) with batch norm."""
    if model == "mlp":
        features = input_shape[0] * input_shape[1] * input_shape[2]
        return nn.Sequential(
            nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
        )
    layers: list[nn.Module] = []
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
