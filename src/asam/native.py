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
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .kernels import is_traced
from .layout import put_back, storage

SOURCE = Path(__file__).with_name("native.cpp")
CHUNK = 2**15  # elements that one thread takes at a time: they stay in a core's cache
DIMENSIONS = 6  # of a tensor at most
FLAGS = ("-O3", "-DNDEBUG", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
PLACE = 2 + 2 * DIMENSIONS  # numbers in a Place of native.cpp
TINY = torch.finfo(torch.float32).tiny
KINDS = {Tensor, torch.nn.Parameter}
IMPL = attrgetter("_cdata")  # where torch holds what it knows of a tensor
TENSORS: list[Any] = [ctypes.c_int64, ctypes.c_void_p]  # how many, and where what torch holds of them is
# gradients, whether each has T = |w| + eta, eta, threads
SCALED: list[Any] = [*TENSORS, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int]


@cache
def library() -> ctypes.CDLL | None:
    """The loops, compiled in two seconds for this process; None where that does not work.

    Not by torch.utils.cpp_extension: that needs ninja, and waits for ever where a process was killed in it.
    """
    if sys.platform != "linux":  # a second OpenMP beside torch's may end the process there
        return None
    installed = Path(torch.__file__).parent
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, "native.so")
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            constants = (f"-DCHUNK={CHUNK}", f"-DDIMENSIONS={DIMENSIONS}")
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"
            against = (f"-isystem{installed / 'include'}", f"-L{installed / 'lib'}", "-lc10")
            command = [*compiler, *FLAGS, *constants, abi, str(SOURCE), "-o", str(path), *against]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loops = ctypes.CDLL(str(path))
        loops.fit.argtypes = [*TENSORS, ctypes.c_void_p, ctypes.c_void_p]
        loops.note.argtypes = [*TENSORS, ctypes.c_void_p, ctypes.c_void_p]
        loops.note.restype = ctypes.c_int64
        loops.measure.argtypes = SCALED
        loops.measure.restype = ctypes.c_double
        loops.move.argtypes = [*SCALED, ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p]
        loops.put_back.argtypes = [*TENSORS, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None
    return loops


def is_for(q: float) -> bool:
    """Whether any tensors may go this way."""
    # someone who counts or fakes operations would see none
    return q == 2 and _get_current_dispatch_mode() is None and not is_traced()


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
    every = range(len(params))
    # another kind of tensor may be more than its memory
    if not (KINDS.issuperset(map(type, params)) and {Tensor}.issuperset(map(type, grads))):
        return None, every
    loops = library() if any(kind is not None for kind in adaptive) else None
    if loops is None:
        return None, every
    w, g, fits = _impls(params), _impls(grads), array("b", [kind is not None for kind in adaptive])
    loops.fit(len(params), _address(w), _address(g), _address(fits))
    columns: list[Any] = [params, grads, w, g, adaptive]
    others = [i for i in every if not fits[i]] if 0 in fits else []
    if others:
        columns = [list(compress(column, fits)) for column in columns]
        memory = {storage(tensor) for tensor in (*columns[0], *columns[1])}
        if any(storage(params[i]) in memory for i in others):
            return None, every
    block = NativeBlock(loops, eta, *columns)
    return (block, others) if block.elements else (None, every)


class NativeBlock:
    """Many tensors as they lie in memory; ``elements`` is 0 if there are none, or one lies in another.

    Args:
        loops: the :func:`library`.
        eta: the stabilizer.
        params, grads, impls, gradients: those that fit, and where what torch holds of them is.
        adaptive: whether each has T = |w| + eta, or 1.
    """

    q: float
    sign: int
    factors: tuple[Any, ...] | float

    def __init__(
        self,
        loops: ctypes.CDLL,
        eta: float,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        impls: Sequence[int],
        gradients: Sequence[int],
        adaptive: Sequence[bool],
    ) -> None:
        self.targets, self._grads = list(params), list(grads)
        self._loops, self._eta = loops, eta
        self._impls, self._gradients, self._adaptive = array("Q", impls), array("Q", gradients), array("b", adaptive)
        self._places = array("q", [0]) * (PLACE * len(params))  # noted for put_back
        self.elements: int = loops.note(*self._pairs(), _address(self._places))
        self._saved: Tensor | None = None
        self._away = array("b", [False])

    def _pairs(self) -> tuple[int, int, int]:
        return len(self.targets), _address(self._impls), _address(self._gradients)

    def _scaled(self) -> tuple[int, int, int, int, float, int]:
        return *self._pairs(), _address(self._adaptive), self._eta, torch.get_num_threads()

    def unit_and_norm(self, _q: float) -> tuple[Tensor, Tensor]:
        """A unit, and ``||T g||_2`` in it: two numbers that neither underflow nor overflow."""
        norm = math.sqrt(self.squares())
        unit = max(norm / math.sqrt(self.elements), TINY)  # nan, which is first, stays nan
        numbers = torch.tensor([unit, norm / unit], dtype=torch.float32, device="cpu")
        return numbers[0], numbers[1]

    def squares(self) -> float:
        """The sum of (T g)^2, which has neither under- nor overflowed."""
        total: float = self._loops.measure(*self._scaled())
        return total

    def _end(self) -> int:
        """The address behind what is saved."""
        assert self._saved is not None
        return self._saved.data_ptr() + 4 * self.elements

    def keep(self) -> None:
        """Make room for what :meth:`move` saves."""
        self._saved = self.targets[0].new_empty(self.elements)

    def move(self) -> None:
        """Add the perturbation to the targets in place, each saved before."""
        factor = math.sqrt(self.factors) if isinstance(self.factors, float) else float(self.factors[0])
        self._loops.move(*self._scaled(), factor, self.sign, self._end(), _address(self._away))

    def let_go(self) -> None:
        """Let go what :meth:`put_back` does not need."""
        self._grads = []

    def put_back(self) -> list[Tensor]:
        """Make the targets what they were again, and return those whose shape had to be put back first."""
        if self._saved is None or not self._away[0]:
            return []
        impls, threads = _impls(self.targets), torch.get_num_threads()
        if self._loops.put_back(len(impls), _address(impls), _address(self._places), threads, self._end()):
            return []
        # some are in other memory now, or have another shape or dtype
        rows = [self._places[i : i + PLACE].tolist() for i in range(0, len(self._places), PLACE)]
        shapes = [row[2 : 2 + row[1]] for row in rows]
        strides = [row[2 + DIMENSIONS : 2 + DIMENSIONS + row[1]] for row in rows]
        parts = torch.split(self._saved, list(map(math.prod, shapes)))
        return put_back(self.targets, list(map(Tensor.as_strided, parts, shapes, strides)))


def _impls(tensors: Sequence[Tensor]) -> "array[int]":
    impls = array("Q")
    with torch._C.DisableTorchFunction():  # nothing is returned from here: Ctrl-C might come before its end
        impls.extend(map(IMPL, tensors))
    return impls


def _address(numbers: "array[Any]") -> int:
    return numbers.buffer_info()[0]
