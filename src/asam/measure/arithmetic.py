"""How torch computes, made exact for a while: no autocast, no TF32, no fused inference path of attention."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


class Arithmetic:
    """The settings as they are when this is made.

    Each is put back by setting it, which may be done twice, unlike leaving a context: Ctrl-C may come meanwhile.
    """

    def __init__(self, device_types: set[str]) -> None:
        kinds = [kind for kind in device_types if torch.amp.is_autocast_available(kind)]
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
        self._precisions = [(operation, operation.fp32_precision) for operation in _operations()]
        # torch refuses these two where the user has set the precision of an operation
        self._matmul = _unless_refused(torch.get_float32_matmul_precision)
        self._tf32 = _unless_refused(lambda: torch.backends.cudnn.allow_tf32)
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        self._attention = [(enable, enabled()) for enable, enabled in _attention()]
        self._cudnn = torch.backends.cudnn.enabled

    def make_exact(self, *, without_cudnn: bool) -> None:
        """Switch off what is not exact, and cuDNN if it is in the way."""
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, False)
        self._set_float32("highest", False)
        for operation, _ in self._precisions:
            operation.fp32_precision = "ieee"
        torch.backends.mha.set_fastpath_enabled(False)
        if without_cudnn:
            torch.backends.cudnn.enabled = False

    def restore(self) -> None:
        """Put all settings back."""
        if torch.backends.cudnn.enabled != self._cudnn:
            torch.backends.cudnn.enabled = self._cudnn
        for enable, enabled in self._attention:
            enable(enabled)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        self._set_float32(self._matmul, self._tf32)
        for operation, precision in self._precisions:
            _put_precision(operation, precision)
        for kind, enabled in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)

    def _set_float32(self, matmul: Any, tf32: Any) -> None:
        if self._matmul is not None:
            with suppress(RuntimeError):
                torch.set_float32_matmul_precision(matmul)
        if self._tf32 is not None:
            with suppress(RuntimeError):
                torch.backends.cudnn.allow_tf32 = tf32


def _unless_refused(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except RuntimeError:
        return None


def _operations() -> list[Any]:
    """Where torch keeps in what precision float32 is computed, from version 2.9 on."""
    if not hasattr(torch.backends, "fp32_precision"):
        return []
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _attention() -> list[tuple[Callable[[bool], None], Callable[[], bool]]]:
    """The kernels of attention, which a product with the Hessian chooses among: how to enable them, and whether."""
    binding: Any = torch._C  # torch.backends.cuda has not all of them
    pairs = [
        (getattr(binding, f"_set_sdp_use_{name}", None), getattr(binding, f"_get_{name}_sdp_enabled", None))
        for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    ]
    return [(enable, enabled) for enable, enabled in pairs if enable is not None and enabled is not None]


def _put_precision(operation: Any, precision: str) -> None:
    """Set it as it was: to nothing if it was that of all operations, so that it goes on to follow theirs."""
    cudnn: Any = torch.backends.cudnn
    operation.fp32_precision = "none"
    if operation.fp32_precision != precision or operation in (cudnn.conv, cudnn.rnn):  # their default is TF32
        operation.fp32_precision = precision
