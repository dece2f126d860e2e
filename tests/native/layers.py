"""Networks whose parameters lie in memory in several ways, and a look at them where they have moved."""

import torch
from slow_reference import assert_same, weights
from torch import nn

from asam.blocks import CPU_BLOCK
from asam.native import CHUNK

LARGE = 600  # a square of it is more than a block of the CPU, and several chunks
assert max(CPU_BLOCK, CHUNK) < LARGE**2


def network(width=40):
    """Weights and biases, small and of several chunks, in either order of memory."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(width, width), nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.Linear(3, 1)])
    layers[1].to(memory_format=torch.channels_last)
    return layers


def with_gradients(model, magnitude=1.0):
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.grad = torch.empty_like(param).copy_(magnitude * torch.randn(param.shape, generator=generator))
    return model


def there(model, asam):
    """The weights at w + e, after a look that they come back."""
    before, grads = weights(model), {name: param.grad for name, param in model.named_parameters()}
    with asam.perturbed():
        moved = weights(model)
    assert_same(weights(model), before)
    return before, grads, moved


class Shy(nn.Parameter):
    """One that does not tell where what torch holds of it is."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function == Shy._cdata.__get__:
            raise TypeError("not this")
        return super().__torch_function__(function, types, arguments, options or {})
