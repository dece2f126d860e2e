"""The way to w + e and back on the CPU as three loops in C++ (native.cpp): what `compile=True` uses where it can.

That is for p = 2, T = |w| + eta or 1, and tensors of float32 without gaps. Small tensors need not be laid end to end,
nothing is computed twice, and w is saved while it is moved.
"""

import ctypes
import os
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .layout import common_order, put_back

SOURCE = Path(__file__).with_name("native.cpp")
PLAIN = (Tensor, torch.nn.Parameter)
CHUNK = 2**15  # elements that one thread takes at a time: they stay in a core's cache
FLAGS = (
    f"-DCHUNK={CHUNK}",
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
TENSORS: list[Any] = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]  # how many, their sizes, where they are
SCALE: list[Any] = [
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_int,
]  # gradients, how many have |w| + eta, threads


Place = tuple[int, torch.Size, tuple[int, ...]]  # pointer, shape, strides


@cache
def library() -> ctypes.CDLL | None:
    """The loops, compiled in a second for this process; None where no C++ compiler does that.

    Not by torch.utils.cpp_extension: that needs ninja, and waits for ever where a process was killed in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "native.so")
        command = [os.environ.get("CXX", "c++"), *FLAGS, str(SOURCE), "-o", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loops = ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError):
            return None
    loops.measure.argtypes = [*TENSORS, *SCALE, ctypes.c_void_p]
    loops.move.argtypes = [*TENSORS, *SCALE, ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p]
    loops.put_back.argtypes = [*TENSORS, ctypes.c_int, ctypes.c_void_p]
    return loops


def is_for(device: torch.device, dtype: torch.dtype, q: float) -> bool:
    """Whether tensors of this kind can go this way."""
    # someone who counts or fakes operations would see none
    usual = q == 2 and device.type == "cpu" and dtype == torch.float32 and _get_current_dispatch_mode() is None
    return usual and library() is not None


def is_plain(param: Tensor, grad: Tensor) -> bool:
    """Whether both are nothing but memory, filled in the same order without a gap."""
    if type(param) not in PLAIN or type(grad) is not Tensor:
        return False
    return (param.is_contiguous() and grad.is_contiguous()) or common_order(param, grad) is not None


class NativeBlock:
    """Many tensors as they lie in memory, those with T = |w| + eta first.

    Args:
        params, grads: for which :func:`is_plain` holds.
        adaptive: how many of them have T = |w| + eta.
        eta: the stabilizer.
        large: elements of a tensor that comes back where it was, even if the parameter is elsewhere by then.
    """

    q: float
    sign: int
    factors: tuple[Tensor, ...]

    def __init__(self, params: list[Tensor], grads: list[Tensor], adaptive: int, eta: float, large: int) -> None:
        self.targets = params
        self._grads, self._adaptive, self._eta = grads, adaptive, eta
        self._held = {i: param.detach() for i, param in enumerate(params) if param.numel() > large}
        self._sizes = array("q", [param.numel() for param in params])
        self._places = self._found()
        self._pointers = array("Q", [place[0] for place in self._places])
        self._saved: Tensor | None = None
        self._away = array("i", [0])

    def _found(self) -> list[Place]:
        return [(target.data_ptr(), target.shape, target.stride()) for target in self.targets]

    def _tensors(self) -> tuple[int, int, int]:
        return len(self._sizes), _address(self._sizes), _address(self._pointers)

    def _scaled(self) -> tuple[int, int, float, int]:
        self._gradients = array("Q", [grad.data_ptr() for grad in self._grads])
        return _address(self._gradients), self._adaptive, self._eta, torch.get_num_threads()

    def largest_and_norm(self, _q: float) -> tuple[Tensor, Tensor]:
        """A unit, and ``||T g||_2`` in it: two numbers that neither underflow nor overflow."""
        numbers = torch.empty(2)
        _loops().measure(*self._tensors(), *self._scaled(), numbers.data_ptr())
        unit, norm = numbers
        return unit, norm

    def keep(self) -> None:
        """Make room for what :meth:`move` saves."""
        self._saved = torch.empty(sum(self._sizes))

    def move(self) -> None:
        """Add the perturbation to the targets in place, each saved before."""
        assert self._saved is not None
        (factor,) = self.factors
        places = self._saved.data_ptr(), _address(self._away)
        _loops().move(*self._tensors(), *self._scaled(), factor.item(), self.sign, *places)
        increment_version(self.targets)

    def let_go(self) -> None:
        """Let go what :meth:`put_back` does not need."""
        self._grads = []

    def put_back(self) -> list[Tensor]:
        """Make the targets what they were again, and return those whose shape had to be put back first."""
        if self._saved is None or not self._away[0]:
            return []
        found = self._found()
        if found == self._places:
            end = self._saved.data_ptr() + self._saved.nbytes
            _loops().put_back(*self._tensors(), torch.get_num_threads(), end)
            increment_version(self.targets)
            return []
        return self._put_back_one_by_one(self._saved, found)

    def _put_back_one_by_one(self, saved: Tensor, found: Sequence[Place]) -> list[Tensor]:
        """The same where some are in other memory now, or have another shape."""
        resized = []
        parts = torch.split(saved, list(self._sizes))
        for i, target in reversed(list(enumerate(self.targets))):
            pointer, shape, stride = self._places[i]
            if found[i] == self._places[i] or i in self._held:
                ctypes.memmove(pointer, parts[i].data_ptr(), parts[i].nbytes)
            if found[i] != self._places[i]:
                resized += put_back([target], [parts[i].as_strided(shape, stride)])
        increment_version(self.targets)
        return resized


def _loops() -> ctypes.CDLL:
    loops = library()
    assert loops is not None
    return loops


def _address(numbers: "array[int]") -> int:
    return numbers.buffer_info()[0]
