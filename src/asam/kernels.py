"""The arithmetic of the maximizer on one tensor: its size, and the move to w + e.

As it stands, one operation runs after the other; torch's compiler puts them together into few loops. What native.cpp
does instead is the same for float32 and q = 2.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .checks import warn

HALF = (torch.float16, torch.bfloat16)
ROW = 2**10  # elements whose squares are added up at once


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: in half precision small numbers, and products of them, would underflow."""
    return tensor.float() if tensor.dtype in HALF else tensor


def nonzero(magnitude: Tensor) -> Tensor:
    """A magnitude that may be divided by, and whose reciprocal is finite."""
    return magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)


def is_traced() -> bool:
    """Whether operations are recorded or transformed now, so that a number that is read would be a constant of them."""
    mode = _get_current_dispatch_mode()
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        or (mode is not None and mode.is_infra_mode())
    )


def scale_of(param: Tensor, scale: Tensor | None, eta: float | None) -> Tensor | None:
    """T, to be written to, None for 1; it is given as :func:`measured` takes it."""
    return scale if eta is None else wide(param).abs().add_(eta)


def scaled_squares(param: Tensor, grad: Tensor, scale: Tensor | None, eta: float | None) -> Tensor:
    """The sum of (T g)^2, as it comes: it may have under- or overflowed. T is as :func:`measured` takes it."""
    return squared(_scaled(param, grad, scale, eta))


def squared(vector: Tensor, few: int = ROW) -> Tensor:
    """The sum of squares of all elements, as it comes; that of up to so many is one dot product.

    In float32 a dot product of 2^18 elements that are alike is off by 1e-4. The norms of rows, whose squares are added
    up then, are not, and are taken in one reading too.
    """
    if type(vector) is not Tensor or not vector.is_contiguous():  # one that wraps another may not lie as it says
        return vector.square().sum()
    elements, size = vector.view(-1), vector.numel()
    if size <= few:
        return torch.dot(elements, elements)
    whole = size - size % ROW
    norms = torch.linalg.vector_norm(elements[:whole].view(-1, ROW), dim=1)
    total = torch.dot(norms, norms)
    return total if whole == size else total + torch.dot(elements[whole:], elements[whole:])


def measured(param: Tensor, grad: Tensor, scale: Tensor | None, eta: float | None, q: float) -> Any:
    """The largest ``|T g|`` and ``||T g / max |T g| ||_q``.

    T is ``scale``, which is written to, or |w| + eta, or 1 if both are None.
    """
    scaled = _scaled(param, grad, scale, eta)
    low, high = torch.aminmax(scaled)
    largest = nonzero(torch.maximum(high, -low))
    in_units = scaled * largest.reciprocal() if scaled is grad else scaled.mul_(largest.reciprocal())
    return largest, norm_(in_units, q)


def norm_(vector: Tensor, q: float) -> Tensor:
    """``||v||_q`` for a finite q; the powers of the elements must not overflow. Where q is not 2, v is written over.

    In float32 on the CPU torch's own is off by 1e-4; sums are right, since they are made pairwise.
    """
    if q == 2:
        return vector.square().sum().sqrt() if vector.is_cpu else torch.linalg.vector_norm(vector)
    return vector.abs_().sum() if q == 1 else vector.abs_().pow_(q).sum().pow(1 / q)


def factors(q: float, rho: float, unit: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
    """What :func:`perturbation` takes, from the norm over all tensors as a unit and the norm in it, for 0 <= rho."""
    if q == 2:
        # half of the factor to each T, so that neither product leaves the range of floating point
        return (norm.rsqrt() * unit.rsqrt() * math.sqrt(rho),)
    if q == 1:
        # sign(nan) is 0; the unit is not finite where any gradient is not, and passes that on
        return (rho * (unit * 0 + 1),)
    return torch.full_like(norm, rho), unit.reciprocal(), norm


def perturbation(
    param: Tensor, grad: Tensor, scale: Tensor | None, eta: float | None, q: float, factors: Sequence[Tensor] | float
) -> tuple[float, Tensor, Tensor | None]:
    """``rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1)``: a number and a tensor, or two, to multiply.

    T is as :func:`measured` takes it. For q = 2 the factors may be one number, the square of the factor.
    """
    grad = wide(grad)
    scale = scale_of(param, scale, eta)
    if isinstance(factors, float):
        return factors, grad if scale is None else grad * scale, scale
    if q == 2:
        if scale is None:
            return 1, (grad * factors[0]).mul_(factors[0]), None
        scale *= factors[0]
        return 1, grad * scale, scale
    scaled = grad.clone() if scale is None else grad * scale
    if q == 1:
        return 1, scaled.sign_().mul_(factors[0]), scale
    rho, unit, norm = factors
    scaled.mul_(unit).div_(norm)
    return 1, scaled.abs().pow_(q - 1).mul_(rho).copysign_(scaled), scale


def _scaled(param: Tensor, grad: Tensor, scale: Tensor | None, eta: float | None) -> Tensor:
    """T g, the gradient itself where T is 1."""
    scale = scale_of(param, scale, eta)
    return wide(grad) if scale is None else scale.mul_(wide(grad))


def measured_and_copied(param: Tensor, grad: Tensor, scale: Tensor | None, eta: float | None, q: float) -> Any:
    """What :func:`measured` returns, and a copy of the parameter, which is at hand."""
    return *measured(param, grad, scale, eta, q), param.clone()


def moved(base: Tensor | None, sign: int, param: Tensor, *arguments: Any) -> Tensor:
    """The base, the parameter itself if None, plus or minus its :func:`perturbation`, in float32 at least."""
    number, e, scale = perturbation(param, *arguments)
    base = wide(param if base is None else base)
    if scale is None:
        return torch.add(base, e, alpha=sign * number)
    return torch.addcmul(base, e, scale, value=sign * number)


def added(
    base: Tensor, sign: int, scaled: Tensor, scale: Tensor, factors: Sequence[Tensor] | float, *, in_place: bool
) -> Tensor:
    """What :func:`moved` returns for q = 2, from T g and T, which are written to; in the base's place if so asked."""
    addcmul = base.addcmul_ if in_place else base.addcmul
    if isinstance(factors, float):
        return addcmul(scaled, scale, value=sign * factors)
    return addcmul(scaled.mul_(factors[0]), scale.mul_(factors[0]), value=sign)


def move_(base: Tensor | None, sign: int, param: Tensor, *arguments: Any) -> None:
    """Put what :func:`moved` returns in the base's place."""
    base = param if base is None else base
    if base.dtype in HALF:
        base.copy_(moved(base, sign, param, *arguments))
        return
    number, e, scale = perturbation(param, *arguments)
    if scale is None:
        base.add_(e, alpha=sign * number)
    else:
        base.addcmul_(e, scale, value=sign * number)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To half precision by chance: to either neighbor, with the probability that keeps the value in the mean.

    Rounded to the nearest instead, most weights would swallow a perturbation smaller than half their last digit.
    """
    magnitudes = values.abs()
    near = magnitudes.to(dtype)
    # as integers, the neighbors of a magnitude are one apart
    below = near.view(torch.int16) - (near > magnitudes).to(torch.int16)
    low = below.view(dtype).to(values.dtype)
    gap = (below + 1).view(dtype).to(values.dtype) - low
    up = torch.rand_like(values) * gap < magnitudes - low
    return (below + up.to(torch.int16)).view(dtype).copysign(values)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch's compiler makes it, for tensors of any size.

    Where it cannot, for want of a C++ compiler for example, the function runs as it stands, with a warning; where it
    has made as much code as torch allows for one function, the rest runs so too.
    """
    fast: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True)

    def run(*arguments: Any) -> Any:
        nonlocal fast
        if _get_current_dispatch_mode() is not None:  # someone counts or fakes operations: compiled code has none
            return function(*arguments)
        try:
            return fast(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
            if "LimitHit" in type(error).__name__:
                reason = "torch._dynamo.config.recompile_limit is reached"
            else:
                fast = function
            _tell(reason)
            return function(*arguments)

    return run


@cache
def _tell(reason: str) -> None:
    """Warn once; Python's own memory of warnings does not outlast torch's compiler."""
    warn(f"compile=True has no effect, torch.compile failed: {reason}")
