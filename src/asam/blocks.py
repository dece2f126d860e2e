"""The maximizer of a geometry, computed in blocks.

A block is one large tensor, a slice of one that stays in the cache, or many small tensors laid end to end. The norm is
the product of a unit, such as the largest magnitude, and the norm in it, so it neither underflows nor overflows.
Nothing here reads a value back from an accelerator.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import (
    HALF,
    ROW,
    added,
    compiled,
    factors,
    is_traced,
    measured,
    measured_and_copied,
    move_,
    moved,
    rounded,
    scale_of,
    scaled_squares,
    squared,
    wide,
)
from .layout import common_order, flat, laid_out, put_back, storage, views
from .native import NativeBlock
from .norms import DualNorm, together

# Elements in a block: few enough to stay in the caches of each core that works on it, enough that starting operations
# takes little of the time; on an accelerator, what bounds the scratch memory.
CPU_BLOCK = 2**18
ACCELERATOR_BLOCK = 2**24
# Elements in a block that compiled code works on: it has no scratch memory, and a call of it costs as much as 2**16.
COMPILED_BLOCK = 2**20
# A tensor of more elements than this part of a block is one of its own: to lay it beside others would take longer than
# it saves. Compiled code has more work for those.
ALONE, COMPILED_ALONE = 16, 32
# Small tensors of one shape from which on they make blocks of their own, where all of them are one tensor with one more
# dimension: a view of each takes a third of the time then, and a block some ten operations more.
MANY = 64
# Blocks of fewer elements gain nothing from being compiled for.
COMPILED_FROM = 2**15
# Elements of several tensors, hardly all of them alike, up to which one dot product adds up their squares well enough;
# rows would take five operations more.
MIXED = 2**15
# A sum of squares between these has neither under- nor overflowed in float32, but for what is nothing beside the rest.
SMALL, LARGE = 1e-20, 1e20


class Pieces(NamedTuple):
    """Parameters or slices of them, with their gradients, targets and scales.

    A scale is None where it is |w| + eta, which ``elementwise`` tells, or 1.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    targets: Sequence[Tensor]
    scales: Sequence[Tensor | None]
    elementwise: Sequence[bool]

    def of(self, places: Sequence[int]) -> "Pieces":
        """Those at these places."""
        columns: list[Any] = [list(map(column.__getitem__, places)) for column in self]
        return Pieces(*columns)

    def apart_from(self, moving: set[int | None]) -> "Pieces":
        """With copies of gradients and scales in memory that moves, perhaps before this one."""
        grads = [grad.clone() if storage(grad) in moving else grad for grad in self.grads]
        scales = [scale.clone() if scale is not None and storage(scale) in moving else scale for scale in self.scales]
        return self._replace(grads=grads, scales=scales)

    def part(self, index: int | slice) -> "Pieces":
        """The row or the rows of that index, of the only parameter that is here."""
        ((param, grad, target, scale, elementwise),) = zip(*self, strict=True)
        rows = param[index]
        targets = rows if target is param else target[index]
        return Pieces([rows], [grad[index]], [targets], [None if scale is None else scale[index]], [elementwise])

    def cut(self, limit: int) -> "Iterator[Pieces]":
        """The only parameter that is here in slices along the first dimension, further in where a row is too large."""
        length, size = len(self.params[0]), self.params[0].numel()
        if size > limit * length:
            for row in range(length):
                yield from self.part(row).cut(limit)
        else:
            slices = -(-length // (limit * length // size))
            rows = -(-length // slices)
            for start in range(0, length, rows):
                yield self.part(slice(start, start + rows))


def packed(pieces: Pieces, places: Sequence[int], eta: float, execution: "Execution") -> "list[Block]":
    """Blocks of those at these places, of one device and dtype each, of no more elements than the limit.

    The places must be those with T = |w| + eta first, then those with scales of their own, then those with T = 1: a
    :class:`Block` has its parameters in this order.
    """
    blocks: list[Block] = []
    moving: set[int | None] = set()
    for members, limit in _together(pieces.params, places, execution.compile):
        whole = pieces.of(members)
        for part in whole.cut(limit) if whole.params[0].numel() > limit else [whole]:
            # what lies end to end is a copy in any case, but for scales
            if len(part.params) == 1 or part.scales.count(None) < len(part.scales):
                moving = moving or set(map(storage, pieces.targets))
                part = part.apart_from(moving)
            blocks.append(Block(part, eta, execution))
    return blocks


def _together(params: Sequence[Tensor], places: Sequence[int], compile: bool) -> Iterator[tuple[list[int], int]]:
    """The places of those that go into a block together, and its limit: large ones alone, many of one shape apart.

    Those without elements go into none.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place in places:
        param = params[place]
        groups.setdefault((param.device, param.dtype), []).append(place)
    for (device, _), group in groups.items():
        limit, alone = _limits(device, compile)
        if len(group) >= MANY:
            many = _many_alike(params, group, alone)
            for alike in many:
                most = limit // params[alike[0]].numel()
                yield from ((alike[start : start + most], limit) for start in range(0, len(alike), most))
            apart = set(chain(*many))
            group = [place for place in group if place not in apart]
        few, room = list[int](), limit
        for place in group:
            size = params[place].numel()
            if size > alone:
                yield [place], limit
            elif size:
                if size > room:
                    yield few, limit
                    few, room = [], limit
                few.append(place)
                room -= size
        if few:
            yield few, limit


def _many_alike(params: Sequence[Tensor], group: Sequence[int], alone: int) -> list[list[int]]:
    """The small ones of which there are many of one shape, by shape."""
    shapes: dict[torch.Size, list[int]] = {}
    for place in group:
        shapes.setdefault(params[place].shape, []).append(place)
    return [alike for shape, alike in shapes.items() if len(alike) >= MANY and 0 < shape.numel() <= alone]


def _limits(device: torch.device, compile: bool) -> tuple[int, int]:
    """Elements in a block, and those from which on a tensor is one of its own."""
    share = COMPILED_ALONE if compile else ALONE
    if device.type != "cpu":
        return ACCELERATOR_BLOCK, ACCELERATOR_BLOCK // share
    if compile:
        return COMPILED_BLOCK, COMPILED_BLOCK // share
    return CPU_BLOCK * torch.get_num_threads(), CPU_BLOCK // share


@dataclass(frozen=True)
class Execution:
    """How the arithmetic is done.

    Args:
        compile: by compiled code, that of native.cpp or what torch's compiler makes.
        stochastic: where w + e is in half precision, whether it is rounded by chance.
    """

    compile: bool = False
    stochastic: bool = False


AS_IT_STANDS = Execution()


class Block:
    """Tensors of one device and dtype: one as it is, or several laid end to end.

    Half precision is computed in float32: a float16 product of a weight and a gradient would underflow.
    """

    q: float
    sign: int
    factors: tuple[Any, ...] | float

    def __init__(self, pieces: Pieces, eta: float, execution: Execution) -> None:
        params, grads, targets, scales, elementwise = pieces
        self.targets = list(targets)
        shapes = {param.shape for param in params} if len(params) > 1 else ()
        self._shape = params[0].shape if len(shapes) == 1 else None  # that of several, if they have the same
        self._eta = eta
        self._elementwise = sum(map(Tensor.numel, compress(params, elementwise)))
        own = [scale for scale in scales if scale is not None]
        self._own = laid_out(own) if own else None
        self._param = laid_out(params, self._shape)
        self._grad = laid_out(grads, self._shape)
        in_place = all(map(is_, self.targets, params))
        self._target = self._param if in_place else laid_out(self.targets, self._shape)
        # computed in; what is in half precision in float32
        self._dtype = torch.float32 if self._param.dtype in HALF else self._param.dtype
        self._multiplied = False  # whether the gradient has become T g
        self._times: Tensor | None = None  # T, where it is kept until the move
        self._saved: list[Tensor] = []
        self._stochastic = execution.stochastic and self._param.dtype in HALF
        self._order = None
        if execution.compile and in_place and self._param.numel() > COMPILED_FROM:
            self._order = common_order(self._param, self._grad)
        if self._order is not None:
            self._param, self._grad = flat(self._param), flat(self._grad)
            self._target = self._param

    def _run(self, kernel: Callable[..., Any], *arguments: Any) -> Any:
        return kernel(*arguments) if self._order is None else compiled(kernel)(*arguments)

    def _scale(self) -> tuple[Tensor | None, float | None]:
        """What the kernels take for T: a tensor, to be written to, or eta for |w| + eta; neither for 1."""
        size = self._param.numel()
        if self._elementwise == size:
            return None, self._eta
        if self._own is None and self._elementwise == 0:
            return None, None
        if self._own is not None and self._own.numel() == size:
            if self._order is None:
                return wide(self._own).clone(), None
            return flat(wide(self._own).clone(memory_format=self._order)), None
        end = self._elementwise
        scale = wide(self._param).abs().add_(self._eta)
        if self._own is not None:
            end += self._own.numel()
            scale[self._elementwise : end].copy_(self._own.reshape(-1))
        scale[end:].fill_(1)
        return scale, None

    def squares(self) -> float | None:
        """The sum of (T g)^2, which may have under- or overflowed; None where it cannot be had at once."""
        if self._order is not None or not self._param.is_cpu:
            return None
        if self._grad.dtype == self._dtype == self._param.dtype:
            times = scale_of(self._param, *self._scale())
            if times is not None and len(self.targets) > 1:  # a copy, to be written to; T is small, and kept
                self._grad.mul_(times)
                self._times = times
            elif times is not None:  # a new tensor, and the gradient is let go: someone else may have it
                self._grad = times.mul_(self._grad)
            self._multiplied = times is not None
            total = squared(self._grad, ROW if len(self.targets) == 1 else MIXED)
        else:
            total = scaled_squares(self._param, self._grad, *self._scale())
        return total.item() if type(total) is Tensor else None  # a fake of a tracer has none

    def unit_and_norm(self, q: float) -> tuple[Tensor, Tensor]:
        """A unit, and ``||T g||_q`` in it: two numbers that neither underflow nor overflow."""
        kernel = measured if self._order is None or len(self.targets) > 1 else measured_and_copied
        scale = (None, None) if self._multiplied else self._scale()
        largest, norm, *copy = self._run(kernel, self._param, self._grad, *scale, q)
        self._saved = [same.as_strided(self.targets[0].shape, self.targets[0].stride()) for same in copy]
        return largest, norm

    def _factors(self) -> Sequence[Tensor] | float:
        if isinstance(self.factors, float):
            return self.factors
        return [factor.to(self._param.device, self._dtype, non_blocking=True) for factor in self.factors]

    def move(self) -> None:
        """Add the perturbation ``rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1)`` to the targets in place, rounding once."""
        alone = len(self.targets) == 1
        if self._multiplied:
            times, self._times = self._times, None
            times = scale_of(self._param, *self._scale()) if times is None else times
            assert times is not None
            values = added(self._target, self.sign, self._grad, times, self._factors(), in_place=alone)
        else:
            base = None if self._target is self._param else self._target
            arguments = (base, self.sign, self._param, self._grad, *self._scale(), self.q, self._factors())
            in_place = alone and not self._stochastic
            values = self._run(move_ if in_place else moved, *arguments)
            if self._stochastic:
                values = rounded(values, self._target.dtype)
                if alone:
                    self._target.copy_(values)
        if not alone:
            torch._foreach_copy_(self.targets, views(values, self.targets, self._shape))

    def keep(self) -> None:
        """Have the targets, which are the parameters, as they are now for :meth:`put_back`."""
        if len(self.targets) > 1:
            self._saved = views(self._target, self.targets, self._shape)
        elif not self._saved:
            self._saved = [self._target.clone()]

    def let_go(self) -> None:
        """Let go what :meth:`put_back` does not need."""
        del self._grad, self._own
        if len(self.targets) == 1:
            del self._param, self._target

    def put_back(self) -> list[Tensor]:
        """Make the targets what they were again, and return those whose shape had to be put back first."""
        return put_back(self.targets, self._saved)


def dual_norm(blocks: list[Block | NativeBlock], q: float) -> DualNorm:
    """``||T g||_q`` over all blocks, on the device of the first; zero if there are none."""
    if not blocks:
        return DualNorm(torch.zeros(()), torch.zeros(()))
    return together([block.unit_and_norm(q) for block in blocks], q)


def factors_of(blocks: list[Block | NativeBlock], q: float, rho: float) -> tuple[Tensor, ...] | float:
    """What each of these blocks takes to make its part of the perturbation of size ``rho`` >= 0.

    On the CPU that of q = 2 is a number, rho / ||T g||, which costs no operation of torch.
    """
    if q == 2 and not is_traced():
        squares = 0.0
        for block in reversed(blocks):  # those that have no number at once are the last
            more = block.squares()
            if more is None:
                break
            squares += more
        else:
            if SMALL < squares < LARGE:
                return float(rho) / math.sqrt(squares)
    norm = dual_norm(blocks, q)
    return factors(q, rho, norm.unit, norm.norm)
