"""Move the weights to w + e for a while, and bring everything back exactly.

The weights are saved and copied back, never subtracted: (w + e) - e is not w in floating point. They are moved in
place, so that a graph which still needs the old values raises autograd's version error instead of giving a wrong
gradient. Buffers (batch-norm statistics, any other) come back too, so that they move once a step, in the pass at w.
All of it happens in ``finally``: an exception, Ctrl-C or an out-of-memory error leaves the model as it was. Ctrl-C may
also come while they are brought back, between any two operations: then all of it is done again. The step of an
optimizer would be lost with that, so it is refused meanwhile.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .blocks import AS_IT_STANDS, CPU_BLOCK, Block, Execution
from .geometry import Geometry
from .layout import is_writable, put_back
from .native import NativeBlock
from .sharding import Unsharded, local

Result = TypeVar("Result")

# The parameters that are away from w just now, those of each perturbed() that is open.
_away: dict[int, Sequence[Tensor]] = {}


def perturbed(
    model: nn.Module,
    unsharded: Unsharded,
    geometry: Geometry,
    names: Sequence[str],
    params: Sequence[Tensor],
    grads: list[Tensor],
    rho: float,
    keeping: Iterable[nn.Module] | None = None,
    execution: Execution = AS_IT_STANDS,
) -> Generator[None, None, None]:
    """Yield once, at ``w + e``, with e the maximizer of <grads, e> in the ball of size ``rho``; -e if rho < 0.

    ``grads`` is emptied. The extra memory is the saved copy of ``params``, let go at the end. Buffers come back, those
    of the modules ``keeping`` if given. A bare generator: nothing can interrupt its ``close()`` before that has begun,
    as Ctrl-C can interrupt the ``__exit__`` of a context manager.

    Raises:
        RuntimeError: an optimizer took a step on one of them meanwhile, or one has another shape afterwards.
    """
    saved: list[Block | NativeBlock] = []
    large: list[tuple[Tensor, Tensor]] = []
    resized: list[Tensor] = []
    with torch.no_grad():
        buffers = Buffers(modules_of(model) if keeping is None else keeping)

    def bring_back() -> None:
        try:
            with torch.no_grad():
                for block in reversed(saved):  # memory that two parameters share was moved twice
                    resized.extend(block.put_back())
                for param, memory in large:
                    if param.data_ptr() != memory.data_ptr() or param.shape != memory.shape:
                        resized.extend(put_back([param], [memory]))
                buffers.restore()
        finally:
            _away.pop(id(params), None)
            unsharded.let_go()
            forget_weights()

    try:
        _away[id(params)] = params
        with torch.no_grad():
            # large ones move as memory, in slices for example, which does not follow if the parameter gets another
            memories = list(params)
            for i, size in enumerate(map(Tensor.numel, params)):
                if size > CPU_BLOCK and type(params[i]) is nn.Parameter:
                    memories[i] = params[i].detach()
                    large.append((params[i], memories[i]))
            for block in geometry.blocks(names, memories, grads, rho, execution=execution):
                block.keep()
                saved.append(block)
                block.move()
                block.let_go()
        unsharded.let_go()
        forget_weights()
        yield
    except BaseException:
        unsharded.abort()
        raise
    finally:
        try:
            bring_back()
        except BaseException:
            bring_back()
            raise
    if resized:
        changed = [name for name, param in zip(names, params, strict=True) if any(param is it for it in resized)]
        raise RuntimeError(
            f"the shape of a parameter changed while it was perturbed, and is as before now: {', '.join(changed)}. "
            "Change the model between the steps, and make ASAM and the optimizer again"
        )


def run_at(moved: Generator[None, None, None], block: Callable[[], Result]) -> Result:
    """What a block returns that runs while the weights are where :func:`perturbed` has moved them."""
    try:
        next(moved)
        result = block()
        next(moved, None)
        return result
    finally:
        moved.close()


def forget_weights() -> None:
    """Clear what torch keeps of the weights while a context is open: autocast's copies, parametrizations' results."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _refuse_lost_steps(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if not _away:
        return
    away = {id(param) for params in list(_away.values()) for param in params}  # other threads have theirs
    if any(id(param) in away for group in optimizer.param_groups for param in group["params"]):
        raise RuntimeError(
            f"{type(optimizer).__name__} took a step while its parameters are perturbed, which would be lost when they "
            "come back: call step() after backward(), or after the perturbed() block, not in it nor in a hook"
        )


register_optimizer_step_pre_hook(_refuse_lost_steps)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()`` in a third of the time: it is asked for in every step."""
    if _has_own(model, "modules", "named_modules"):
        return list(model.modules())
    found, seen = [model], {id(model)}
    for module in found:  # which grows meanwhile
        if module._modules:
            for child in module._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    found.append(child)
    return found


def parameters_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """``model.parameters()`` from all its modules, in a part of the time; tied ones more than once."""
    if _has_own(model, "parameters", "named_parameters"):
        return list(model.parameters())
    return [param for module in modules for param in module._parameters.values() if param is not None]


def _has_own(model: nn.Module, *methods: str) -> bool:
    """Whether its class has another idea of what these methods find than nn.Module."""
    return any(getattr(type(model), name) is not getattr(nn.Module, name) for name in methods)


def running_statistics(model: nn.Module) -> list[nn.Module]:
    """The layers that collect running statistics now, to use them in evaluation."""
    layers = (module for module in modules_of(model) if getattr(module, "running_mean", None) is not None)
    return [layer for layer in layers if layer.training]


class Buffers:
    """Every buffer of these modules as it was when this was made."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [
            (module, name, buffer)
            for module in modules
            if module._buffers  # in half the time, as few have any
            for name, buffer in module._buffers.items()
        ]
        # an expanded tensor cannot be written to, neither by the module nor here
        self._buffers = local(
            [
                buffer
                for _, _, buffer in self._places
                if buffer is not None
                and buffer.layout == torch.strided
                and is_writable(buffer)
                and not buffer.is_inference()  # nor does anything else write to it
            ]
        )
        self._contents = copies(self._buffers)

    def restore(self, *, versions: bool = True) -> None:
        """Bring back the tensors themselves and their contents.

        Without ``versions``, autograd does not see the write: for contents that no graph can have seen otherwise.
        """
        if not self._places:
            return
        for module, name, buffer in self._places:
            # those of a TorchScript module are found anew each time
            if isinstance(module._buffers, dict) and module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        # all of them: batch norm writes its running statistics without counting up their versions
        if self._buffers and versions:
            put_back(self._buffers, self._contents)
        elif self._buffers:
            torch._foreach_copy_([buffer.data for buffer in self._buffers], self._contents)


class RandomState:
    """The random state of the CPU and of the accelerators in use, to be drawn from again."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Let the generators draw again what they drew from here on."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones, in one list call where torch has it."""
    if tensors and hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(tensors))
    return [tensor.clone() for tensor in tensors]
