"""The maximizer of a geometry, computed in blocks of tensors.

Many small tensors go through one list call together; a large one goes in slices that stay in the cache. The norm is the
product of the largest magnitude and the norm in units of it, so it neither underflows nor overflows. Nothing here reads
a value back from the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements in a block: what stays in a core's cache on the CPU; what bounds the scratch memory on an accelerator.
CPU_BLOCK = 2**17
ACCELERATOR_BLOCK = 2**24
HALF = (torch.float16, torch.bfloat16)


@dataclass(slots=True)  # not frozen: that costs a microsecond for each of many small tensors
class Piece:
    """A parameter or a slice of one, with its gradient, its target and its scale (None where it is |w| + eta or 1)."""

    param: Tensor
    grad: Tensor
    target: Tensor
    scale: Tensor | None
    elementwise: bool

    def __getitem__(self, index: int | slice) -> "Piece":
        scale = None if self.scale is None else self.scale[index]
        return Piece(self.param[index], self.grad[index], self.target[index], scale, self.elementwise)

    def cut(self, limit: int) -> "Iterator[Piece]":
        """Slices along the first dimension, further in where a single row is larger than the limit."""
        if self.param.numel() <= limit:
            yield self
            return
        length = self.param.shape[0]
        rows = limit * length // self.param.numel()
        if rows == 0:
            for row in range(length):
                yield from self[row].cut(limit)
        else:
            for start in range(0, length, rows):
                yield self[start : start + rows]


def packed(pieces: list[Piece], eta: float) -> "list[Block]":
    """Blocks of one device and dtype each, of no more elements than the limit: slices and whole tensors together."""
    groups: dict[tuple[torch.device, torch.dtype], list[list[Piece]]] = {}
    room: dict[tuple[torch.device, torch.dtype], int] = {}
    for whole in pieces:
        key = (whole.param.device, whole.param.dtype)
        limit = CPU_BLOCK if whole.param.device.type == "cpu" else ACCELERATOR_BLOCK
        parts = groups.setdefault(key, [])
        for piece in whole.cut(limit):
            size = piece.param.numel()
            if not parts or size > room[key]:
                parts.append([])
                room[key] = limit
            parts[-1].append(piece)
            room[key] -= size
    return [Block(part, eta) for parts in groups.values() for part in parts]


class Block:
    """Tensors of one device and dtype that go through every list call together.

    Half precision is computed in float32: a float16 product of a weight and a gradient would underflow.
    """

    rho: float
    q: float
    dual_norm: "DualNorm"

    def __init__(self, pieces: list[Piece], eta: float) -> None:
        # those with T = |w| + eta first, then those with a scale of their own, then those with T = 1
        pieces = sorted(pieces, key=lambda piece: (not piece.elementwise, piece.scale is None))
        self._elementwise = sum(piece.elementwise for piece in pieces)
        self._params = [piece.param for piece in pieces]
        self._grads = [piece.grad for piece in pieces]
        self._scales = [piece.scale for piece in pieces if piece.scale is not None]
        self._eta = eta
        self.targets = [piece.target for piece in pieces]
        self.half = self._params[0].dtype in HALF

    def _scales_and_grads(self) -> tuple[list[Tensor], list[Tensor]]:
        """T, without the trailing ones that are 1, and g. The elementwise T, which come first, are fresh."""
        n = self._elementwise
        params, grads, scales = self._params[:n], self._grads, self._scales
        if self.half:
            params, grads, scales = ([t.float() for t in tensors] for tensors in (params, grads, scales))
        magnitudes: list[Tensor] = []
        if n:
            magnitudes = list(torch._foreach_abs(params))
            if self._eta:
                torch._foreach_add_(magnitudes, self._eta)
        return magnitudes + scales, grads

    def largest_and_norm(self, q: float) -> tuple[Tensor, Tensor]:
        """The largest ``|T g|`` and ``||T g / max |T g| ||_q``: two numbers that neither underflow nor overflow."""
        scales, grads = self._scales_and_grads()
        n, m = self._elementwise, len(scales)
        scaled = scales[:n]
        if n:
            torch._foreach_mul_(scaled, grads[:n])
        if n < m:
            scaled += torch._foreach_mul(grads[n:m], scales[n:])
        # max and abs, not the norm of order inf, which takes 10 times as long on the CPU
        scaled = list(torch._foreach_abs(scaled + grads[m:]))
        largest = nonzero(torch.stack(torch._foreach_max(scaled)).max())
        torch._foreach_div_(scaled, largest)
        return largest, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled, q)), q)

    def move(self) -> None:
        """Add the perturbation ``rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1)`` to the targets in place, rounding once."""
        scales, grads = self._scales_and_grads()
        m = len(scales)
        e: list[Tensor] = []
        if m:
            e += torch._foreach_mul(grads[:m], scales)
        if m < len(grads):
            e += torch._foreach_mul(grads[m:], 1.0)
        largest, norm = self.dual_norm.on(e[0])
        if self.q == 1:
            # sign(nan) is 0; norm is nan where any gradient is not finite, and passes that on
            e = list(torch._foreach_sign(e))
            torch._foreach_mul_(e, self.rho * (norm * 0 + 1))
        else:
            torch._foreach_div_(e, largest)
            if self.q == 2:
                torch._foreach_mul_(e, self.rho / norm)
            else:
                torch._foreach_div_(e, norm)
                signs = torch._foreach_sign(e)
                torch._foreach_abs_(e)
                torch._foreach_pow_(e, self.q - 1)
                torch._foreach_mul_(e, signs)
                torch._foreach_mul_(e, self.rho)
        targets = [target.float() for target in self.targets] if self.half else self.targets
        if m:
            torch._foreach_addcmul_(targets[:m], e[:m], scales)
        if m < len(e):
            torch._foreach_add_(targets[m:], e[m:])
        if self.half:
            torch._foreach_copy_(self.targets, targets)


@dataclass(frozen=True)
class DualNorm:
    """``||T g||_q`` as the product of the largest magnitude and the norm in units of it."""

    largest: Tensor
    norm: Tensor

    def pair(self) -> Tensor:
        """Both numbers as one tensor of shape (2, 1)."""
        return torch.stack([self.largest, self.norm]).unsqueeze(1)

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both numbers on the device and in the dtype of a tensor."""
        return self.largest.to(like, non_blocking=True), self.norm.to(like, non_blocking=True)


def dual_norm(blocks: list[Block], q: float) -> DualNorm:
    """``||T g||_q`` over all blocks, on the device of the first; zero if there are none."""
    if not blocks:
        return DualNorm(torch.zeros(()), torch.zeros(()))
    return together([block.largest_and_norm(q) for block in blocks], q)


def together(parts: Sequence[tuple[Tensor, Tensor]], q: float) -> DualNorm:
    """The norm over several parts, from the largest magnitude of each and the norm in units of it."""
    home = parts[0][0].device
    dtype = torch.float64 if any(part[0].dtype == torch.float64 for part in parts) else torch.float32
    largests = torch.stack([part[0].to(home, dtype, non_blocking=True) for part in parts])
    norms = torch.stack([part[1].to(home, dtype, non_blocking=True) for part in parts])
    largest = largests.max()
    norm = torch.linalg.vector_norm(norms * (largests / largest), q)
    # norm >= 1 unless the gradient is zero (or denormal), and then e must be 0 instead of 0 / 0
    return DualNorm(largest, norm.clamp(min=1e-8))


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: in half precision small numbers, and products of them, would underflow."""
    return tensor.float() if tensor.dtype in HALF else tensor


def nonzero(magnitude: Tensor) -> Tensor:
    """A magnitude that may be divided by."""
    return magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)


def norms(param: Tensor, *, keep_first: bool) -> Tensor:
    """2-norm over all dimensions, or all but the first: keeps them as 1. Scaled, since squares underflow."""
    dims = list(range(1 if keep_first else 0, param.ndim))
    if param.numel() == 0:
        return param.sum(dim=dims, keepdim=True)
    values = wide(param)
    largest = nonzero(values.abs().amax(dim=dims, keepdim=True))
    squares = (values / largest).square_()
    result: Tensor = squares.sum(dim=dims, keepdim=True).sqrt_() * largest
    return result.to(param.dtype)
