"""The neighborhood in which sharpness is taken: the ball ``||T_w^-1 e||_p <= rho``.

SAM climbs in a ball of fixed size, so rescaling a ReLU network, which leaves its function as it is, changes what SAM
sees. ASAM measures a perturbation e in units of the weights themselves, ``u = T_w^-1 e`` with T_w = diag(|w| + eta),
and the dependence on the scale is gone. Everything here follows from that one change of variables:

    the maximizer of <g, e> on the ball    e = rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1),   1/p + 1/q = 1
    for p = 2                              e = rho T^2 g / ||Tg||_2
    for p = inf                            e = rho T sign(Tg)

The work is done in blocks of tensors: many small tensors in one list call, a large one in slices that stay in the
cache. Nothing here reads a value back from the device.

Source: Kwon et al., ASAM, ICML 2021, arXiv:2102.11600.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

NORMALIZATIONS = ("elementwise", "filterwise", "layerwise", "none")
BIASES = ("unscaled", "scaled", "fixed")

# Elements in a block: what stays in a core's cache on the CPU; what bounds the scratch memory on an accelerator.
CPU_BLOCK = 2**17
ACCELERATOR_BLOCK = 2**24


@dataclass(frozen=True)
class Geometry:
    """The ball ``||T_w^-1 e||_p <= rho`` around the weights w: its scales T_w, its maximizer and its projection.

    Args:
        normalization: T_w of the weights. ``"elementwise"``: |w| + eta. ``"filterwise"``: the 2-norm over all
            dimensions but the first (|w| for tensors of fewer than two dimensions), + eta. ``"layerwise"``: the
            2-norm of the tensor, + eta. ``"none"``: 1, which is SAM. Or a callable that takes the parameter and
            returns its scale, a tensor that broadcasts to it or a number; the scale is used as it is, without eta.
        p: the norm of the ball, any number > 1 or ``math.inf``.
        eta: stabilizer added to weight magnitudes, >= 0. With 0 a weight of exactly 0 is not perturbed.
        bias: what holds for parameters whose own name (the part after the last dot) ends in ``bias``.
            ``"unscaled"``: scale 1 (the paper). ``"scaled"``: as weights. ``"fixed"``: not perturbed, scale 0.

    Raises:
        ValueError, TypeError: an argument is not one of the above.

    Example:
        >>> import torch
        >>> geometry = Geometry(eta=0.0)
        >>> params, grads = {"weight": torch.tensor([3.0, 1.0])}, {"weight": torch.tensor([1.0, 4.0])}
        >>> geometry.maximizer(params, grads, rho=1.0)["weight"]  # T g = (3, 4), so T^2 g / ||T g|| = (9, 4) / 5
        tensor([1.8000, 0.8000])
    """

    normalization: str | Callable[[Tensor], Tensor | float] = "elementwise"
    p: float = 2
    eta: float = 0.01
    bias: str = "unscaled"

    def __post_init__(self) -> None:
        if isinstance(self.normalization, str):
            if self.normalization not in NORMALIZATIONS:
                raise ValueError(
                    f"normalization must be one of {', '.join(map(repr, NORMALIZATIONS))} or a callable, "
                    f"got {self.normalization!r}"
                )
        elif not callable(self.normalization):
            raise TypeError(
                "normalization must be a string or a callable from a parameter to its scale, "
                f"got {type(self.normalization).__name__}"
            )
        check_number("p", self.p, "a number > 1 or math.inf", lambda p: p > 1)
        check_number("eta", self.eta, "a finite number >= 0", lambda eta: 0 <= eta < math.inf)
        if not isinstance(self.bias, str):
            raise TypeError(f"bias must be a string, got {type(self.bias).__name__}")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {self.bias!r}")

    def perturbs(self, name: str) -> bool:
        """Whether the parameter of that name is perturbed at all."""
        return not (self.bias == "fixed" and _is_bias(name))

    def scales(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """T_w, the diagonal as one tensor per parameter, each of the parameter's shape.

        Example:
            >>> Geometry().scales({"weight": torch.tensor([-2.0, 0.0]), "bias": torch.tensor([5.0])})
            {'weight': tensor([2.0100, 0.0100]), 'bias': tensor([1.])}
        """
        with torch.no_grad():
            return {name: self._scale(name, param.detach()) for name, param in params.items()}

    def norm(self, params: Mapping[str, Tensor], perturbations: Mapping[str, Tensor]) -> Tensor:
        """``||T_w^-1 e||_p`` over all parameters, a scalar tensor.

        An element that is 0 where T_w is 0 counts as 0; any other there makes the norm infinite.

        Example:
            >>> Geometry(eta=0.0).norm({"weight": torch.tensor([2.0, 0.0])}, {"weight": torch.tensor([1.0, 0.0])})
            tensor(0.5000)
        """
        with torch.no_grad():
            norm: Tensor = torch.linalg.vector_norm(_flat(self._normalized(params, perturbations)), self.p)
            return norm

    def maximizer(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
        """The perturbation e in the ball that maximizes <g, e>, one tensor per parameter.

        It does not depend on the size of g, only on its direction; a zero gradient gives e = 0, a non-finite one a
        non-finite e.

        Raises:
            ValueError: ``grads`` and ``params`` do not have the same names, or ``rho`` is negative.
        """
        check_rho(rho)
        _check_names("grads", params, grads)
        with torch.no_grad():
            result = {name: torch.zeros_like(param) for name, param in params.items()}
            targets = [result[name] for name in params]
            for block in self.blocks(list(params), list(params.values()), list(grads.values()), rho, targets):
                block.move()
            return result

    def project(
        self, params: Mapping[str, Tensor], perturbations: Mapping[str, Tensor], rho: float
    ) -> dict[str, Tensor]:
        """The point of the ball nearest to e in units of the weights: ``argmin ||T^-1 (e' - e)||_2``.

        Example:
            >>> w, e = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([3.0, 8.0])}
            >>> Geometry(eta=0.0).project(w, e, rho=1.0)["weight"]  # u = (3, 4) shrinks to (0.6, 0.8)
            tensor([0.6000, 1.6000])
        """
        check_rho(rho)
        with torch.no_grad():
            scales = self.scales(params)
            # where T_w is 0, the ball holds nothing but 0
            u = {
                name: value.where(scales[name] > 0, 0)
                for name, value in self._normalized(params, perturbations).items()
            }
            projected = _project_flat(_flat(u), self.p, rho)
            parts = torch.split(projected, [tensor.numel() for tensor in u.values()])
            return {name: part.view_as(u[name]) * scales[name] for name, part in zip(u, parts, strict=True)}

    def _normalized(self, params: Mapping[str, Tensor], perturbations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _check_names("perturbations", params, perturbations)
        scales = self.scales(params)
        return {name: torch.where(perturbations[name] == 0, 0, perturbations[name] / scales[name]) for name in params}

    def _kind(self, name: str, param: Tensor) -> str | Callable[[Tensor], Tensor | float]:
        """How the scale of this parameter is found: the normalization, as the bias policy and the shape leave it."""
        if _is_bias(name) and self.bias != "scaled":
            return "none" if self.bias == "unscaled" else "fixed"
        if self.normalization == "filterwise" and param.ndim < 2:
            return "elementwise"
        return self.normalization

    def _scale(self, name: str, param: Tensor) -> Tensor:
        kind = self._kind(name, param)
        if kind == "elementwise":
            return param.abs() + self.eta
        if kind == "none":
            return torch.ones_like(param)
        if kind == "fixed":
            return torch.zeros_like(param)
        if kind in ("filterwise", "layerwise"):
            return (_norms(param, keep_first=kind == "filterwise") + self.eta).expand_as(param)
        assert callable(kind)
        scale = torch.as_tensor(kind(param), dtype=param.dtype, device=param.device)
        try:
            return scale.expand_as(param)
        except RuntimeError:
            raise ValueError(
                f"normalization must return a scale that broadcasts to the parameter: for {name!r} of shape "
                f"{tuple(param.shape)} it returned shape {tuple(scale.shape)}"
            ) from None

    def blocks(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        grads: list[Tensor],
        rho: float,
        targets: Sequence[Tensor] | None = None,
    ) -> "Iterator[Block]":
        """Cut the parameters into blocks and yield each, ready to give its part of the maximizer.

        The norm is taken over all of them before the first is yielded. ``grads`` is emptied: a gradient is let go
        with its block, when the next one is asked for. ``targets`` are tensors of the parameters' shapes to be cut
        the same way (the parameters themselves if None). To be called and iterated over under ``torch.no_grad()``.
        """
        blocks = self._cut(names, params, grads, params if targets is None else targets)
        grads.clear()
        q = 1.0 if self.p == math.inf else self.p / (self.p - 1)
        norm = _dual_norm(blocks, q)
        blocks.reverse()
        while blocks:
            block = blocks.pop()
            block.rho, block.q, block.dual_norm = rho, q, norm
            yield block
            del block

    def _cut(
        self, names: Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> "list[Block]":
        groups: dict[tuple[torch.device, torch.dtype], list[_Piece]] = {}
        for name, param, grad, target in zip(names, params, grads, targets, strict=True):
            if param.numel() == 0 or not self.perturbs(name):
                continue
            kind = self._kind(name, param)
            scale = None if kind in ("elementwise", "none") else self._scale(name, param.detach())
            piece = _Piece(param, grad, target, scale, kind == "elementwise")
            groups.setdefault((param.device, param.dtype), []).extend(piece.cut(_limit(param.device)))
        return [
            Block(part, self.eta) for (device, _), pieces in groups.items() for part in _packed(pieces, _limit(device))
        ]


def _limit(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK


@dataclass(slots=True)  # not frozen: that costs a microsecond for each of many small tensors
class _Piece:
    """A parameter or a slice of one, with its gradient, its target and its scale (None where it is |w| + eta or 1)."""

    param: Tensor
    grad: Tensor
    target: Tensor
    scale: Tensor | None
    elementwise: bool

    def __getitem__(self, index: int | slice) -> "_Piece":
        scale = None if self.scale is None else self.scale[index]
        return _Piece(self.param[index], self.grad[index], self.target[index], scale, self.elementwise)

    def cut(self, limit: int) -> "Iterator[_Piece]":
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


def _packed(pieces: list[_Piece], limit: int) -> Iterator[list[_Piece]]:
    part: list[_Piece] = []
    size = 0
    for piece in pieces:
        if part and size + piece.param.numel() > limit:
            yield part
            part, size = [], 0
        part.append(piece)
        size += piece.param.numel()
    yield part


class Block:
    """Tensors of one device and dtype that go through every list call together.

    Half precision is computed in float32: a float16 product of a weight and a gradient would underflow.
    """

    rho: float
    q: float
    dual_norm: "_DualNorm"

    def __init__(self, pieces: list[_Piece], eta: float) -> None:
        # those with T = |w| + eta first, then those with a scale of their own, then those with T = 1
        pieces = sorted(pieces, key=lambda piece: (not piece.elementwise, piece.scale is None))
        self._elementwise = sum(piece.elementwise for piece in pieces)
        self._params = [piece.param for piece in pieces]
        self._grads = [piece.grad for piece in pieces]
        self._scales = [piece.scale for piece in pieces if piece.scale is not None]
        self._eta = eta
        self.targets = [piece.target for piece in pieces]
        self.half = self._params[0].dtype in (torch.float16, torch.bfloat16)

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
        largest = _nonzero(torch.stack(torch._foreach_max(scaled)).max())
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
class _DualNorm:
    """``||T g||_q`` as the product of the largest magnitude and the norm in units of it."""

    largest: Tensor
    norm: Tensor

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.largest.to(like, non_blocking=True), self.norm.to(like, non_blocking=True)


def _dual_norm(blocks: list[Block], q: float) -> _DualNorm:
    if not blocks:
        return _DualNorm(torch.ones(()), torch.ones(()))
    parts = [block.largest_and_norm(q) for block in blocks]
    home = parts[0][0].device
    dtype = torch.float64 if any(part[0].dtype == torch.float64 for part in parts) else torch.float32
    largests = torch.stack([part[0].to(home, dtype, non_blocking=True) for part in parts])
    norms = torch.stack([part[1].to(home, dtype, non_blocking=True) for part in parts])
    largest = largests.max()
    norm = torch.linalg.vector_norm(norms * (largests / largest), q)
    # norm >= 1 unless the gradient is zero (or denormal), and then e must be 0 instead of 0 / 0
    return _DualNorm(largest, norm.clamp(min=1e-8))


def _nonzero(magnitude: Tensor) -> Tensor:
    return magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)


def _norms(param: Tensor, *, keep_first: bool) -> Tensor:
    """2-norm over all dimensions, or all but the first: keeps them as 1. Scaled, since squares underflow."""
    dims = list(range(1 if keep_first else 0, param.ndim))
    values = param.float() if param.dtype in (torch.float16, torch.bfloat16) else param
    if param.numel() == 0:
        return torch.zeros_like(param)
    largest = _nonzero(values.abs().amax(dim=dims, keepdim=True))
    squares = (values / largest).square_()
    norms: Tensor = squares.sum(dim=dims, keepdim=True).sqrt_() * largest
    return norms.to(param.dtype)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _project_flat(u: Tensor, p: float, rho: float) -> Tensor:
    """The nearest point to u with ``||.||_p <= rho``.

    In closed form for p = 2 and inf. Otherwise by the optimality conditions, elementwise with x = |result|:
    ``x + l p x^(p-1) = |u|`` for the one multiplier l that gives the norm rho; both are found by bisection.
    """
    if p == math.inf:
        return u.clamp(-rho, rho)
    norm = torch.linalg.vector_norm(u, p)
    if p == 2:
        return u * (rho / norm.clamp(min=rho)) if rho > 0 else torch.zeros_like(u)
    if norm <= rho:
        return u.clone()
    if rho == 0:
        return torch.zeros_like(u)
    if not math.isfinite(norm):  # no bisection would end
        return torch.full_like(u, math.nan)
    target = u.abs().double()

    def shrunk(multiplier: float) -> Tensor:
        low, high = torch.zeros_like(target), target.clone()
        for _ in range(60):
            middle = (low + high) / 2
            above = middle + multiplier * p * middle ** (p - 1) > target
            high = torch.where(above, middle, high)
            low = torch.where(above, low, middle)
        return low

    low, high = 0.0, 1.0
    while torch.linalg.vector_norm(shrunk(high), p) > rho:
        low, high = high, high * 4
    for _ in range(60):
        middle = (low + high) / 2
        if torch.linalg.vector_norm(shrunk(middle), p) > rho:
            low = middle
        else:
            high = middle
    return (shrunk(high) * u.sign()).to(u.dtype)


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].endswith("bias")


def _check_names(argument: str, params: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    if list(params) != list(given):
        raise ValueError(f"{argument} must have the names of params in their order: {list(params)}, got {list(given)}")


def check_number(name: str, value: object, takes: str, holds: Callable[[float], bool]) -> None:
    """Raise an error that names the argument, what it takes and what it got, unless ``holds(value)``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")
    if not holds(float(value)):
        raise ValueError(f"{name} must be {takes}, got {value}")


def check_rho(rho: object) -> None:
    """Raise unless rho, the neighborhood size, is a finite number >= 0."""
    check_number("rho", rho, "a finite number >= 0", lambda rho: 0 <= rho < math.inf)
