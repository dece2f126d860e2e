"""Random draws that do not depend on how many of them are taken."""

import hashlib
import random
import sys
from numbers import Integral

import torch
from torch import Tensor

from ..perturbation import RandomState


class RandomStates:
    """Those of torch, of NumPy if it is in use, and of Python, to be drawn from again."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._torch, self._python = RandomState(devices), random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy = None if numpy is None else numpy.get_state(legacy=False)

    def restore(self) -> None:
        """Let the generators draw again what they drew from here on."""
        self._torch.restore()
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)


def generator_of(seed: int, *index: int) -> torch.Generator:
    """A generator for one sample of a seed."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    digest = hashlib.blake2b(repr((int(seed), *index)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(like: Tensor, seed: int, index: int, noise: str) -> Tensor:
    """Noise of the shape, dtype and device of ``like``: "normal", "uniform" on [-1, 1], or "signs".

    The numbers are the same in every dtype, up to rounding.
    """
    generator = generator_of(seed, index)
    if noise == "normal":
        z = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    elif noise == "uniform":
        z = torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
    else:
        z = torch.randint(0, 2, like.shape, generator=generator, device="cpu") * 2.0 - 1
    return z.to(like)
