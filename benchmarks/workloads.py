"""The networks whose steps are timed, and the parameter lists whose ascent is timed."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

CLASSES, WORDS = 10, 1000


@dataclass(frozen=True)
class Workload:
    """A model with one fixed batch, and how many steps in a row make one sample of the clock."""

    title: str
    model: nn.Module
    inputs: Tensor
    repeats: int

    def closure(self, size: int | None = None) -> Callable[[], Tensor]:
        """The loss of the batch, or of its first examples, forward only."""
        inputs = self.inputs[:size]
        targets = torch.arange(len(inputs)) % CLASSES
        return lambda: nn.functional.cross_entropy(self.model(inputs), targets)


def workloads() -> list[Workload]:
    """From the one where overhead is everything to the one where it is nothing."""
    return [
        Workload("MLP 64-128-128-10, batch 50", mlp(64, 128, 128), torch.randn(50, 64), 10),
        Workload("202 small tensors (100 residual layers of 32), batch 64", many(), torch.randn(64, 32), 1),
        Workload("MLP of 670k parameters (784-512-512-10), batch 128", mlp(784, 512, 512), torch.randn(128, 784), 1),
        # the usual batch of 128 takes seconds a step on one core; a smaller one makes overhead larger, not smaller
        Workload("ResNet-20, 32 x 32 images, batch 16", resnet20(), torch.randn(16, 3, 32, 32), 1),
        Workload(
            "transformer of 3.4M parameters (4 layers of 256), 8 sequences of 64", transformer(), tokens(8, 64), 1
        ),
    ]


def mlp(*widths: int) -> nn.Module:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


class Residual(nn.Module):
    """``x + layer(x)``, then a ReLU if the layer is a convolution; x is thinned and padded where the shape changes."""

    def __init__(self, layer: nn.Module, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.layer, self.stride, self.padding = layer, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x + self.layer(x)
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return nn.functional.relu(shortcut + self.layer(x))


def many() -> nn.Module:
    layers = [Residual(nn.Sequential(nn.Linear(32, 32), nn.Tanh())) for _ in range(100)]
    return nn.Sequential(*layers, nn.Linear(32, CLASSES))


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [*convolution(3, 16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(3):
            stride = width // channels
            block = nn.Sequential(*convolution(channels, width, stride), nn.ReLU(), *convolution(width, width))
            layers.append(Residual(block, stride, width - channels))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class Mean(nn.Module):
    """Over the positions of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer() -> nn.Module:
    d = 256
    layer = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(WORDS, d), encoder, Mean(), nn.Linear(d, CLASSES))


def tokens(*shape: int) -> Tensor:
    return torch.randint(WORDS, shape)


def convolution(channels: int, width: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)


@dataclass(frozen=True)
class Weights:
    """A model that is there for its parameters alone: it has no buffers and is never called."""

    title: str
    model: nn.Module


def weights() -> list[Callable[[], Weights]]:
    """What makes each list, the largest last."""
    return [
        lambda: small(32),
        lambda: small(64),
        lambda: Weights("ResNet-50", resnet50()),
        lambda: Weights("GPT-2 124M", gpt2()),
    ]


def small(size: int) -> Weights:
    layers = nn.ModuleList(nn.Linear(size, size) for _ in range(150))
    return Weights(f"300 small tensors (150 of {size} x {size}, 150 of {size})", layers)


def resnet50() -> nn.Module:
    """161 tensors, 25.6M elements."""
    layers: list[nn.Module] = []

    def add(channels: int, width: int, size: int) -> None:
        layers.append(nn.Conv2d(channels, width, size, bias=False))
        layers.append(nn.BatchNorm2d(width, track_running_stats=False))

    add(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            add(channels, width, 1)
            add(width, width, 3)
            add(width, 4 * width, 1)
            if block == 0:
                add(channels, 4 * width, 1)
            channels = 4 * width
    return nn.ModuleList([*layers, nn.Linear(2048, 1000)])


def gpt2() -> nn.Module:
    """148 tensors, 124M elements; the output layer is the embedding."""
    d = 768
    layers: list[nn.Module] = [nn.Embedding(50257, d), nn.Embedding(1024, d)]
    for _ in range(12):
        layers += [nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)]
        layers += [nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)]
    return nn.ModuleList([*layers, nn.LayerNorm(d)])
