"""Logits of a scale of their own taken away."""

import torch
from torch import Tensor

from ..kernels import wide


def normalized_logits(logits: Tensor) -> Tensor:
    """Logits (..., classes) centered and divided by their standard deviation over the classes, for each example.

    Multiplying the logits changes every sharpness and no prediction. To compare networks, put this between the network
    and the cross entropy. Source: Andriushchenko et al., arXiv:2302.07011.

    Example:
        >>> normalized_logits(torch.tensor([[3.0, 5.0]])), normalized_logits(torch.tensor([[30.0, 50.0]]))
        (tensor([[-1.,  1.]]), tensor([[-1.,  1.]]))
    """
    centered = wide(logits)
    centered = centered - centered.mean(dim=-1, keepdim=True)
    largest = centered.detach().abs().amax(dim=-1, keepdim=True)
    centered = centered / largest.where(largest > 0, 1)  # so that no square is 0 or inf
    variance = centered.square().mean(dim=-1, keepdim=True)
    # inside the root, which has no gradient at 0
    return (centered / variance.clamp(min=torch.finfo(centered.dtype).tiny).sqrt()).to(logits.dtype)
