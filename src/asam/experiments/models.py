"""Small networks, how to rescale one without changing its function, and the networks of the paper.

Those come from pytorchcv, its own modules only: its front door needs torchvision. Their last pooling is over the whole
image, so that images of 28x28 fit too; for 32x32 that is what they had.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from . import InputError

MODELS = ("mlp", "cnn")  # those that can be rescaled
SMALL = (*MODELS, "vit")
NAMES = (
    *SMALL,
    *("resnet20", "resnet32", "resnet56", "vgg19-bn", "densenet121", "resnext29-32x4d", "wrn28-2", "wrn28-10"),
    *("pyramidnet272", "resnet50"),
)


def build(model: str, input_shape: tuple[int, ...], classes: int, dropout: float = 0.0) -> nn.Module:
    """The network of this name, for images of shape (channels, height, width).

    ``"mlp"``: two hidden layers of 128, each followed by ``dropout``. ``"cnn"``: three convolutions (16, 32, 32) with
    batch norm. ``"vit"``: a transformer of two layers of width 64 over 4x4 patches, 2x2 of images smaller than 16x16.
    ``"resnet50"`` is ImageNet's; the others are those for CIFAR.

    Raises:
        InputError: there is no such network, it has no dropout, the images are too small, or pytorchcv is missing.
    """
    if model not in NAMES:
        raise InputError(f"there is no network {model!r}; there are {', '.join(NAMES)}")
    if dropout and model != "mlp":
        raise InputError(f"only the mlp has dropout, not {model}")
    least = 16 if model not in SMALL else 2 if model == "vit" else 1
    if min(input_shape[1:]) < least:
        raise InputError(f"{model} needs images of {least}x{least} or more, got {input_shape[1]}x{input_shape[2]}")
    if model == "mlp":
        return _mlp(math.prod(input_shape), classes, dropout)
    if model == "cnn":
        return _cnn(input_shape[0], classes)
    if model == "vit":
        return VisionTransformer(input_shape, classes)
    if model == "vgg19-bn":
        return Vgg19(input_shape[0], classes)
    network: nn.Module = _from_pytorchcv(model, input_shape[0], classes)
    network.get_submodule("features").add_module("final_pool", nn.AdaptiveAvgPool2d(1))
    return network


def _mlp(features: int, classes: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (features, 128):
        layers += [nn.Linear(width, 128), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(128, classes))


def _cnn(channels: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, out, stride in ((channels, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


class VisionTransformer(nn.Module):
    """Two pre-norm encoder layers over the patches of an image, their mean, and a linear layer."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 64) -> None:
        super().__init__()
        channels, height, columns = input_shape
        side = 2 if min(height, columns) < 16 else 4
        self.patches = nn.Conv2d(channels, width, side, stride=side)
        self.positions = nn.Parameter(0.02 * torch.randn((height // side) * (columns // side), width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.output = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        tokens = self.patches(inputs).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.output(self.encoder(tokens).mean(dim=1))
        return logits


class Vgg19(nn.Module):
    """VGG-19 with batch norm as it is used for CIFAR: one linear layer after the convolutions (pytorchcv lacks it)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(depth):
                conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
                nn.init.kaiming_uniform_(conv.weight)  # as the networks of pytorchcv
                layers += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(2))
        # of 28x28 images one pixel is left before the last pooling
        self.features = nn.Sequential(*layers[:-1], nn.AdaptiveMaxPool2d(1))
        self.output = nn.Linear(channels, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        logits: Tensor = self.output(self.features(inputs).flatten(1))
        return logits


def _from_pytorchcv(model: str, channels: int, classes: int) -> Any:
    def constructor(module: str, name: str) -> Any:
        try:
            return getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)
        except ImportError:
            raise InputError(f"the network {model} comes from pytorchcv: pip install --no-deps pytorchcv") from None

    ends: dict[str, int] = {"in_channels": channels, "num_classes": classes}
    if model in ("resnet20", "resnet32", "resnet56"):
        depth = (int(model.removeprefix("resnet")) - 2) // 6
        return constructor("resnet_cifar", "CIFARResNet")(_stages((16, 32, 64), depth), 16, bottleneck=False, **ends)
    if model in ("wrn28-2", "wrn28-10"):
        width = int(model.removeprefix("wrn28-"))
        return constructor("wrn_cifar", "CIFARWRN")(_stages((16 * width, 32 * width, 64 * width), 4), 16, **ends)
    if model == "resnext29-32x4d":
        stages = _stages((256, 512, 1024), 3)
        return constructor("resnext_cifar", "CIFARResNeXt")(stages, 64, cardinality=32, bottleneck_width=4, **ends)
    if model == "pyramidnet272":  # alpha = 200
        depth = (272 - 2) // 9
        widths = [4 * round(16 + 200 * (i + 1) / (3 * depth)) for i in range(3 * depth)]
        stages = [widths[i : i + depth] for i in (0, depth, 2 * depth)]
        return constructor("pyramidnet_cifar", "CIFARPyramidNet")(stages, 16, bottleneck=True, **ends)
    if model == "densenet121":
        # growth 32 from 64 channels, halved between the stages; pytorchcv has the shallower ones of three stages
        stages, width = [], 128
        for depth in (6, 12, 24, 16):
            stages.append([width // 2 + 32 * (i + 1) for i in range(depth)])
            width = stages[-1][-1]
        return constructor("densenet_cifar", "CIFARDenseNet")(stages, 64, bottleneck=True, **ends)
    return constructor("resnet", "resnet50")(**ends)


def _stages(widths: tuple[int, ...], depth: int) -> list[list[int]]:
    return [[width] * depth for width in widths]


def rescale_(network: nn.Module, factor: float) -> None:
    """Multiply what feeds the first ReLU by ``factor`` and divide the next layer's weights by it.

    relu(a x) = a relu(x) for a > 0, so the network computes the same function.

    Raises:
        InputError: it is not one of the two small networks.
    """
    layers = list(network.children())
    relu = next((i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)), None)
    if not isinstance(network, nn.Sequential) or relu is None:
        raise InputError(f"only {' and '.join(MODELS)} can be rescaled, not {type(network).__name__}")
    following = next(layer for layer in layers[relu:] if isinstance(layer, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        for param in layers[relu - 1].parameters():
            param.mul_(factor)
        weight: Tensor = following.weight
        weight.div_(factor)
