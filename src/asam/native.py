"""The way to w + e and back on the CPU as three loops in C++ (native.cpp): what `compile=True` uses where it can.

That is for p = 2, T = |w| + eta or 1, and tensors of float32 without gaps. Small tensors need not be laid end to end,
nothing is written in between, and w is saved while it is moved.
"""

import ctypes
import math
import os
import shlex
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .layout import common_order, put_back

SOURCE = Path(__file__).with_name("native.cpp")
CHUNK = 2**15  # elements that one thread takes at a time: they stay in a core's cache
FLAGS = (f"-DCHUNK={CHUNK}", "-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
PLAIN = (Tensor, torch.nn.Parameter)
SHAPE, DTYPE = attrgetter("shape"), attrgetter("dtype")
TENSORS: list[Any] = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]  # how many, their sizes, where they are
# gradients, how many tensors have T = |w| + eta, eta, threads
SCALE: list[Any] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int]


@cache
def library() -> ctypes.CDLL | None:
    """The loops, compiled in a second for this process; None where that does not work.

    Not by torch.utils.cpp_extension: that needs ninja, and waits for ever where a process was killed in it.
    """
    if sys.platform != "linux":  # a second OpenMP beside torch's may end the process there
        return None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, "native.so")
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            command = [*compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(path)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loops = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    loops.overlap.argtypes = TENSORS
    loops.measure.argtypes = [*TENSORS, *SCALE, ctypes.c_void_p]
    loops.move.argtypes = [*TENSORS, *SCALE, ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p]
    loops.put_back.argtypes = [*TENSORS, ctypes.c_int, ctypes.c_void_p]
    return loops


def is_for(q: float) -> bool:
    """Whether any tensors may go this way."""
    return q == 2 and _get_current_dispatch_mode() is None  # someone who counts or fakes operations would see none


def block_of(
    adaptive: Sequence[bool | None], params: Sequence[Tensor], grads: Sequence[Tensor], eta: float
) -> "tuple[NativeBlock | None, Sequence[int]]":
    """One block of all tensors that can go this way, if there are any, and the places of the others.

    Args:
        adaptive: whether each has T = |w| + eta or 1; None for neither.
        params: the tensors that move.
        grads: their gradients.
        eta: the stabilizer.
    """
    fits = [kind is not None and is_plain(p, g) for kind, p, g in zip(adaptive, params, grads, strict=True)]
    chosen = [i for i, fit in enumerate(fits) if fit and adaptive[i]]
    count = len(chosen)
    chosen += [i for i, fit in enumerate(fits) if fit and not adaptive[i]]
    loops = library() if chosen else None
    if loops is None:
        return None, range(len(fits))
    block = NativeBlock(loops, [params[i] for i in chosen], [grads[i] for i in chosen], count, eta)
    if block.overlap():
        return None, range(len(fits))
    return block, [] if len(chosen) == len(fits) else [i for i, fit in enumerate(fits) if not fit]


def is_plain(param: Tensor, grad: Tensor) -> bool:
    """Whether both are nothing but memory of float32, some of it, filled in the same order without a gap."""
    return (
        type(param) in PLAIN
        and type(grad) is Tensor
        and param.numel() > 0
        and param.dtype == grad.dtype == torch.float32
        and param.is_cpu
        and grad.is_cpu
        and grad.shape == param.shape
        and not (grad.is_neg() or param.is_neg() or grad._is_zerotensor())
        and ((param.is_contiguous() and grad.is_contiguous()) or common_order(param, grad) is not None)
    )


class NativeBlock:
    """Many tensors as they lie in memory, those with T = |w| + eta first.

    Args:
        loops: the :func:`library`.
        params, grads: for which :func:`is_plain` holds.
        adaptive: how many of them have T = |w| + eta.
        eta: the stabilizer.
    """

    q: float
    sign: int
    factors: tuple[Any, ...]

    def __init__(self, loops: ctypes.CDLL, params: list[Tensor], grads: list[Tensor], adaptive: int, eta: float):
        self.targets = params
        self._loops, self._grads, self._adaptive, self._eta = loops, grads, adaptive, eta
        self._sizes = array("q", map(Tensor.numel, params))
        self._places = _places(params)
        self._pointers = array("Q", self._places[0])
        self._gradients = array("Q", map(Tensor.data_ptr, grads))
        self._saved: Tensor | None = None
        self._away = array("i", [0])

    def _tensors(self) -> tuple[int, int, int]:
        return len(self._sizes), _address(self._sizes), _address(self._pointers)

    def _scaled(self) -> tuple[int, int, float, int]:
        return _address(self._gradients), self._adaptive, self._eta, torch.get_num_threads()

    def overlap(self) -> bool:
        """Whether any two tensors share memory: then each would be saved when the other had moved."""
        return bool(self._loops.overlap(*self._tensors()))

    def unit_and_norm(self, _q: float) -> tuple[Tensor, Tensor]:
        """A unit, and ``||T g||_2`` in it: two numbers that neither underflow nor overflow."""
        unit, norm = torch.tensor(self._measured(), dtype=torch.float32, device="cpu")
        return unit, norm

    def factor(self, rho: float) -> float:
        """What :func:`asam.kernels.factors` makes of these two numbers, without an operation of torch."""
        unit, norm = self._measured()
        return math.sqrt(rho / max(norm, 0.5)) / math.sqrt(unit)

    def _measured(self) -> "array[float]":
        numbers = array("f", [0, 0])
        self._loops.measure(*self._tensors(), *self._scaled(), _address(numbers))
        return numbers

    def keep(self) -> None:
        """Make room for what :meth:`move` saves."""
        self._saved = self.targets[0].new_empty(sum(self._sizes))

    def move(self) -> None:
        """Add the perturbation to the targets in place, each saved before."""
        assert self._saved is not None
        (factor,) = self.factors
        places = self._saved.data_ptr(), _address(self._away)
        self._loops.move(*self._tensors(), *self._scaled(), float(factor), self.sign, *places)
        increment_version(self.targets)

    def let_go(self) -> None:
        """Let go what :meth:`put_back` does not need."""
        self._grads = []

    def put_back(self) -> list[Tensor]:
        """Make the targets what they were again, and return those whose shape had to be put back first."""
        if self._saved is None or not self._away[0]:
            return []
        if _places(self.targets) == self._places:
            self._loops.put_back(*self._tensors(), torch.get_num_threads(), self._saved.data_ptr())
            increment_version(self.targets)
            return []
        # some are in other memory now, or have another shape or dtype
        parts = torch.split(self._saved, list(self._sizes))
        _, shapes, strides, _ = self._places
        return put_back(self.targets, list(map(Tensor.as_strided, parts, shapes, strides)))


def _places(tensors: list[Tensor]) -> tuple[list[int], list[torch.Size], list[tuple[int, ...]], list[torch.dtype]]:
    """Where each lies, and how it is read."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(SHAPE, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(DTYPE, tensors)),
    )


def _address(numbers: "array[Any]") -> int:
    return numbers.buffer_info()[0]
