"""Evaluate a model at w + e, again and again, and leave no trace."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from operator import is_
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..closures import has_reentrant_checkpoint
from ..layout import views
from ..perturbation import Buffers, copies, forget_weights, run_at
from .arithmetic import Arithmetic
from .batches import Piece
from .derivatives import check_twice_differentiable, differentiated, why_there_is_none
from .draws import RandomStates

Result = TypeVar("Result")


class Evaluation:
    """A model that may be moved and evaluated for a while.

    Weights come back by copying. They are written through ``.data``, which autograd's version counters do not see:
    a graph of the user's that is alive outside stays valid, since the weights it saved are back before it is used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Any],
        params: list[nn.Parameter],
        batchnorm: str,
        written: list[nn.Parameter],
        look: bool,
    ) -> None:
        self._model, self._loss_fn, self._params, self._batchnorm = model, loss_fn, params, batchnorm
        # parameters that are not moved here, and that the model itself may write to: brought back after each piece, or
        # at the end only, to look which of them it writes to
        self._written, self._look = written, look
        self._loss_dtype = torch.float64  # of the last loss
        self._differentiates = False  # whether the loss takes gradients itself

    @property
    def eps(self) -> float:
        """Of the weights: of the lowest precision among them."""
        return max(torch.finfo(param.dtype).eps for param in self._params)

    @property
    def loss_eps(self) -> float:
        """Of the loss that was evaluated last: of its own precision or that of the weights, the lower one."""
        return max(self.eps, torch.finfo(self._loss_dtype).eps)

    def run(self, block: Callable[[Self], Result]) -> Result:
        """What a block returns that moves and evaluates the model; when it ends, everything is as it was."""
        return run_at(self._opened(), lambda: block(self))

    def _opened(self) -> Generator[None, None, None]:
        """Yield once, with the model ready. A bare generator, as :func:`perturbed` is, and for its reason."""
        grad_mode = torch.is_grad_enabled()
        try:
            # it restores the grad mode too, so it must not be entered under no_grad
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                self._note()
                try:
                    self._make_ready()
                    yield
                finally:
                    try:
                        self._bring_back()
                    except BaseException:  # Ctrl-C meanwhile: all of it again
                        self._bring_back()
                        raise
        finally:
            torch._C._set_grad_enabled(grad_mode)  # Ctrl-C may have kept a no_grad() from doing so

    def _note(self) -> None:
        """Keep everything as it is now."""
        model = self._model
        devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        device_types = {device.type for device in devices} | {"cpu"}
        self._modules = [_Module(module) for module in model.modules()]
        with torch.no_grad():
            self._buffers = self._between = Buffers(model.modules())
            self.weights = copies([param.detach() for param in self._params])
            self._others = copies([param.detach() for param in self._written])
        self._random = RandomStates(devices)
        self._arithmetic = Arithmetic(device_types)
        everything = list(model.parameters())
        self._gradients = [(param, param.grad, param.requires_grad) for param in everything]
        self._hooks = [(hooks, dict(hooks)) for param in everything if (hooks := param._backward_hooks)]
        # cuDNN's recurrent layers have no backward pass in eval mode, and none twice
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._without_cudnn = "cuda" in device_types and recurrent

    def _make_ready(self) -> None:
        self._arithmetic.make_exact(without_cudnn=self._without_cudnn)
        for param, _, _ in self._gradients:  # of a loss that takes gradients itself
            param.grad = None
        for hooks, _ in self._hooks:  # what they make of a gradient is the training's
            hooks.clear()
        for module in self._model.modules():
            # the attribute, not eval(): some models merge weights there
            module.training = self._batchnorm == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm)

    def move(self, perturbation: Tensor | None, factors: Sequence[Tensor] | None = None) -> None:
        """Bring the model to w + e, with e one vector of all parameters, times ``factors`` if there are any.

        None: to w itself.
        """
        forget_weights()
        with torch.no_grad():
            data = [param.data for param in self._params]
            if perturbation is None:
                torch._foreach_copy_(data, self.weights)
            elif factors is None:
                for moved, weight, e in zip(data, self.weights, self.parts(perturbation), strict=True):
                    torch.add(weight, e, out=moved)
            else:
                for moved, weight, e, factor in zip(data, self.weights, self.parts(perturbation), factors, strict=True):
                    torch.addcmul(weight, factor, e, out=moved)

    def parts(self, vector: Tensor) -> list[Tensor]:
        """A vector of all parameters as a tensor for each, of its shape, on its device: views where it is there."""
        return [part.to(weight.device) for part, weight in zip(views(vector, self._params), self.weights, strict=True)]

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers these values, by their names in the model."""
        forget_weights()
        with torch.no_grad():
            tensors = {**dict(self._model.named_buffers()), **self._model.state_dict(keep_vars=True)}
            for name, value in state.items():
                tensors[name].data.copy_(value)
            self._between = Buffers(self._model.modules())

    def means(self, pieces: Sequence[Piece]) -> dict[str, float]:
        """The mean loss and the other means over the pieces, weighted by examples, summed in float64."""
        totals: dict[str, Any] = {}
        with torch.no_grad():
            for piece in pieces:
                loss, others = self._without_graph(piece)
                values = {"loss": loss, **others}
                if totals and set(values) != set(totals):
                    raise ValueError(
                        f"loss_fn must return the same means for every batch, got {list(values)} after {list(totals)}"
                    )
                for name, value in values.items():
                    scalar = value.detach().double() if isinstance(value, Tensor) else float(value)
                    totals[name] = totals.get(name, 0.0) + scalar * piece.size
                self._restore_between()
        examples = sum(piece.size for piece in pieces)
        return {name: float(total) / examples for name, total in totals.items()}

    def loss_and_gradient(self, pieces: Sequence[Piece], *, require_use: bool = False) -> tuple[float, Tensor]:
        """The mean loss over the pieces and its gradient, one vector of all parameters."""
        examples = sum(piece.size for piece in pieces)
        losses: list[Tensor] = []
        like = all_of(self._params)
        gradient = like.new_zeros(like.shape)
        totals = self.parts(gradient)
        with torch.enable_grad():
            for piece in pieces:
                loss, _ = self._call(piece)
                if require_use and has_reentrant_checkpoint(loss):
                    raise ValueError(
                        "the loss has no gradient of parameters behind torch.utils.checkpoint with use_reentrant=True: "
                        "checkpoint with use_reentrant=False"
                    )
                try:
                    grads = torch.autograd.grad(loss, self._params, allow_unused=True)
                except RuntimeError as error:
                    if reason := why_there_is_none(error):
                        raise ValueError(f"the loss has no gradient: {reason}") from error
                    raise
                if require_use and all(grad is None for grad in grads):
                    raise ValueError(
                        "the loss depends on none of the parameters: loss_fn must use the model it is given"
                    )
                losses.append(loss.detach())
                _accumulate(totals, grads, piece.size / examples)
                del loss, grads
                self._restore_between()
        self._gather(totals, gradient)
        values = torch.stack(losses).tolist()
        return sum(value * piece.size for value, piece in zip(values, pieces, strict=True)) / examples, gradient

    def hessian_product(self, pieces: Sequence[Piece], vectors: Tensor, *, look: bool) -> Tensor:
        """H v for every row v of ``vectors`` (k, n): a graph of the gradient per piece, used k times.

        With ``look``, see first that autograd can differentiate the gradient.

        Raises:
            NoSecondDerivative: autograd cannot differentiate the gradient.
        """
        examples = sum(piece.size for piece in pieces)
        products = all_of(self._params).new_zeros(vectors.shape)
        rows = [[part.to(param) for part, param in zip(self.parts(v), self._params, strict=True)] for v in vectors]
        totals = list(map(self.parts, products))
        # fused attention has no double backward
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for piece in pieces:
                loss, _ = self._call(piece)
                if look:
                    check_twice_differentiable(loss, self._params)
                    look = False
                grads = differentiated([loss], self._params)
                for total, row in zip(totals, rows, strict=True):
                    used = [(g, v) for g, v in zip(grads, row, strict=True) if g is not None and g.requires_grad]
                    if used:
                        outputs, weights = zip(*used, strict=True)
                        second = differentiated(outputs, self._params, weights)
                    else:  # the loss is linear in the parameters
                        second = (None,) * len(self._params)
                    _accumulate(total, second, piece.size / examples)
                self._restore_between()
        for total, product in zip(totals, products, strict=True):
            self._gather(total, product)
        return products

    def changed(self) -> list[nn.Parameter]:
        """The parameters that are not moved here, and that the model itself has written to."""
        pairs = zip(self._written, self._others, strict=True)
        return [param for param, value in pairs if not torch.equal(param.detach(), value)]

    def _without_graph(self, piece: Piece) -> tuple[Tensor, Mapping[str, Any]]:
        """What `_call` returns, with a graph only for a loss that takes gradients itself."""
        if not self._differentiates:
            try:
                return self._call(piece)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            self._differentiates = True
            self._restore_between()
        with torch.enable_grad():
            return self._call(piece)

    def _call(self, piece: Piece) -> tuple[Tensor, Mapping[str, Any]]:
        loss = self._loss_fn(self._model, piece.batch)
        others: Mapping[str, Any] = {}
        if isinstance(loss, tuple) and len(loss) == 2:
            loss, others = loss
            _check_means(others)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(
                f"loss_fn must return the mean loss of the batch, a real scalar tensor, got {_described(loss)}"
            )
        self._loss_dtype = loss.dtype
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError("the loss has no gradient: loss_fn must not detach it or run under torch.no_grad()")
        return loss if loss.ndim == 0 else loss.reshape(()), others

    def _gather(self, parts: Sequence[Tensor], vector: Tensor) -> None:
        """Write those parts of a vector into it that are not views of it, but on other devices."""
        if any(part.device != vector.device for part in parts):
            for part, view in zip(parts, views(vector, self._params), strict=True):
                if part.device != view.device:
                    view.copy_(part)

    def _bring_back(self) -> None:
        try:
            for module in self._modules:
                module.restore()
            self.move(None)
            self._restore_written()
            with torch.no_grad():
                self._buffers.restore(versions=False)
            self._random.restore()
            for param, grad, required in self._gradients:
                param.grad = grad
                if param.requires_grad != required:
                    param.requires_grad_(required)
            for hooks, functions in self._hooks:
                hooks.update(functions)
        finally:
            self._arithmetic.restore()

    def _restore_between(self) -> None:
        """Bring back what the model itself has written to."""
        self._between.restore(versions=False)
        if not self._look:
            self._restore_written()

    def _restore_written(self) -> None:
        if not self._written:  # to enter no_grad() after each of many small batches takes a while
            return
        with torch.no_grad():
            for param, value in zip(self._written, self._others, strict=True):
                param.data.copy_(value)


# Where a module keeps its parameters, buffers, layers and hooks.
REGISTRIES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


class _Module:
    """A layer as it was, with what it keeps for itself, such as the weight that weight norm has computed."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._training, self._attributes = module, module.training, dict(vars(module))
        # those of a TorchScript module are of another kind, and nothing is registered there
        held = [each for name in REGISTRIES if isinstance(each := getattr(module, name, None), dict | set)]
        self._held: list[tuple[Any, Any]] = [(each, each.copy()) for each in held]

    def restore(self) -> None:
        """Bring back its mode and attributes, and all that is registered: parameters, layers, hooks."""
        self._module.training = self._training
        for name in vars(self._module).keys() - self._attributes.keys():
            delattr(self._module, name)
        vars(self._module).update(self._attributes)
        for each, before in self._held:
            if isinstance(each, set):
                each.intersection_update(before)
            elif not (len(each) == len(before) and all(map(is_, each.values(), before.values()))):
                each.clear()
            each.update(before)


def all_of(params: Sequence[Tensor]) -> Tensor:
    """A vector of all parameters without memory of its own, for its shape, dtype and device.

    The dtype is the highest precision among the parameters, at least float32.
    """
    dtype = torch.float32
    for param in params:
        dtype = torch.promote_types(dtype, param.dtype)
    return torch.zeros((), dtype=dtype, device=params[0].device).expand(sum(param.numel() for param in params))


def _check_means(others: object) -> None:
    if not isinstance(others, Mapping):
        raise ValueError(f"loss_fn must return (loss, dict of other means), got a pair with {_described(others)}")
    for name, value in others.items():
        if name == "loss":
            raise ValueError("loss_fn must not return another mean called 'loss'")
        if not isinstance(value, Tensor | Real) or (
            isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex())
        ):
            raise ValueError(f"loss_fn must return a number for the mean {name!r}, got {_described(value)}")


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _accumulate(totals: list[Tensor], grads: Sequence[Tensor | None], weight: float) -> None:
    """Add weighted gradients, which may be sparse or in half precision, to totals; None is 0."""
    used = [grad for grad in grads if grad is not None]
    if len(used) < len(grads):
        totals = [total for total, grad in zip(totals, grads, strict=True) if grad is not None]
    if used:
        torch._foreach_add_(totals, used, alpha=weight)
