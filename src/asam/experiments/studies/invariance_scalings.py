"""Other weights of the same function: the scalings under which theorem 1 says that adaptive sharpness is the same."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

WIDEST = 4.0  # factors are between 1/4 and this, uniform in the logarithm
KINDS = {"channels": "a factor a channel", "filters": "a factor a filter", "layers": "a factor a layer"}
MODELS = {"mlp": ("channels", "layers"), "cnn": ("channels", "filters", "layers")}


def rescaled_copy(network: nn.Sequential, kind: str, generator: torch.Generator) -> nn.Sequential:
    """A copy that computes the same function, with random factors of a kind.

    ``"channels"``: for every ReLU, a factor for each of its channels, on what feeds it and, inverse, on what reads it.
    ``"layers"``: the same with one factor for all channels. ``"filters"``: for every filter before batch norm, whose
    statistics follow.
    """
    network = copy.deepcopy(network)
    layers: list[Any] = list(network)

    def factors(count: int) -> Tensor:
        draws = torch.rand(1 if kind == "layers" else count, generator=generator, dtype=torch.float64)
        return (WIDEST ** (2 * draws - 1)).expand(count)

    with torch.no_grad():
        for i, layer in enumerate(layers):
            if kind == "filters" and isinstance(layer, nn.Conv2d):
                norm = layers[i + 1]
                a = factors(layer.out_channels)
                layer.weight *= a[:, None, None, None]
                norm.running_mean *= a
                norm.running_var.copy_((norm.running_var + norm.eps) * a**2 - norm.eps)
            elif kind != "filters" and isinstance(layer, nn.ReLU):
                before = layers[i - 1]
                after = next(layer for layer in layers[i:] if isinstance(layer, nn.Linear | nn.Conv2d))
                a = factors(len(before.bias))
                before.weight *= a.view(-1, *[1] * (before.weight.ndim - 1))
                before.bias *= a
                after.weight /= a.view(1, -1, *[1] * (after.weight.ndim - 2))
    return network
