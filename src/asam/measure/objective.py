"""The function that is measured: the mean loss over fixed data, as a function of the weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_rho
from ..geometry import Geometry
from ..layout import views
from ..parameters import check_model, selected_parameters
from .batches import pieces_of
from .draws import RandomStates
from .evaluation import Evaluation, Result, all_of

BATCHNORM = ("eval", "train")
FEW = 2**12  # elements of which a copy costs nothing


class Objective:
    """The mean loss of a model over fixed data, as a function of the weights.

    Batches are weighted by their number of examples, so the loss does not depend on how the data is cut. That number is
    the length that the tensors of a batch share, so a tensor for each example is to be stacked with the others. Of a
    list of strings it is its length, and a batch without tensors is one example.

    The model is evaluated in eval mode, with autocast and TF32 off, and without the hooks on parameters, which may clip
    or scale gradients. No measurement changes the model, its buffers, attributes, gradients or mode, or the random
    state of torch, NumPy and Python, also when it fails. (What `forward` writes into a list or a tensor that is no
    buffer stays, and what it writes, only away from these weights, into a parameter of more than 4,096 elements that is
    not measured; and a DataLoader draws from a generator of its own.) The weights are those that the model has at the
    time of each measurement, of the same parameters.

    Args:
        model: the network.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch, a scalar tensor, or a pair of it and a
            dict of other means over the batch, such as ``{"error": ...}``.
        data: an iterable of batches; it is read once and kept. A measurement costs many passes over it: about a
            thousand examples are usually enough.
        params: the parameters to perturb, as tensors or names; None: all that require a gradient.
        batchnorm: ``"eval"`` for running statistics, ``"train"`` for those of the batches as they are given.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or the loss is not the same twice for the same
            data, not a scalar, or does not depend on the parameters.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> data = [(torch.ones(3, 2), torch.ones(3, 1)), (torch.zeros(1, 2), torch.ones(1, 1))]
        >>> mse = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> objective = Objective(model, mse, data)
        >>> objective.examples, list(objective.params)
        (4, ['weight', 'bias'])
        >>> torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        (Parameter containing:
        tensor([[0., 0.]], requires_grad=True), Parameter containing:
        tensor([0.], requires_grad=True))
        >>> objective.loss()
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Mapping[str, Tensor | float]]],
        data: Iterable[Any],
        *,
        params: Iterable[str | Tensor] | None = None,
        batchnorm: str = "eval",
    ) -> None:
        check_model(model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of a model and a batch, got {type(loss_fn).__name__}")
        check_choice("batchnorm", batchnorm, BATCHNORM)
        self.model = model
        self.loss_fn = loss_fn
        self.batchnorm = batchnorm
        random = RandomStates({param.device for param in model.parameters()})
        try:  # a DataLoader draws a seed
            with torch.inference_mode(False):
                self.pieces = pieces_of(data)
        finally:
            random.restore()
        self.examples = sum(piece.size for piece in self.pieces)
        chosen = selected_parameters(model, params)
        frozen = [name for name, param in chosen.items() if not param.requires_grad]
        if params is not None and frozen:
            raise ValueError(f"params holds {frozen[0]!r}, which does not require a gradient")
        self.params = {name: param for name, param in chosen.items() if param.requires_grad}
        if params is not None and not chosen:
            raise ValueError("params is empty: there is nothing to perturb")
        if not self.params:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to perturb")
        for name, param in self.params.items():
            if not param.is_floating_point():
                raise TypeError(f"parameter {name!r} has dtype {param.dtype}: only real floating point is supported")
        if not any(param.numel() for param in self.params.values()):
            raise ValueError("the parameters have no elements: there is nothing to perturb")
        measured = {id(param) for param in self.params.values()}
        self._written = [param for param in model.parameters() if id(param) not in measured]
        self._check()

    def loss(self, perturbation: Mapping[str, Tensor] | Tensor | None = None) -> float:
        """The mean loss at the weights, or at the weights plus a perturbation."""
        return self.means(perturbation)["loss"]

    def means(self, perturbation: Mapping[str, Tensor] | Tensor | None = None) -> dict[str, float]:
        """The mean loss under ``"loss"`` and every other mean that ``loss_fn`` returns."""

        def there(evaluation: Evaluation) -> dict[str, float]:
            evaluation.move(None if perturbation is None else self.flat(perturbation))
            return evaluation.means(self.pieces)

        return self.run(there)

    def gradient(self, perturbation: Mapping[str, Tensor] | Tensor | None = None) -> dict[str, Tensor]:
        """The gradient of the mean loss, one tensor per parameter; 0 for a parameter that the loss does not use."""

        def there(evaluation: Evaluation) -> dict[str, Tensor]:
            evaluation.move(None if perturbation is None else self.flat(perturbation))
            return self.named(evaluation.loss_and_gradient(self.pieces)[1])

        return self.run(there)

    def run(self, block: Callable[[Evaluation], Result]) -> Result:
        """What a block returns that moves and evaluates the model; when it ends, everything is as it was.

        Raises:
            ValueError: the model has other parameters than when this was made.
        """
        present = {id(param) for param in self.model.parameters()}
        for name, param in self.params.items():
            if id(param) not in present:
                raise ValueError(
                    f"the model has another parameter than {name!r} when the Objective was made, as after "
                    "load_state_dict(..., assign=True): make the Objective again"
                )
        return self._evaluation(look=False).run(block)

    def _evaluation(self, *, look: bool) -> Evaluation:
        params = list(self.params.values())
        return Evaluation(self.model, self.loss_fn, params, self.batchnorm, self._written, look)

    def scales(self, geometry: Geometry, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """T of a geometry as one vector, at the model's weights or at others."""
        if not isinstance(geometry, Geometry):
            raise TypeError(f"geometry must be a Geometry, got {type(geometry).__name__}")
        weights = {name: param.detach() for name, param in self.params.items()} if weights is None else weights
        scales = self.flat(geometry.scales(weights))
        if callable(geometry.normalization) and not scales.isfinite().all():
            raise ValueError("normalization must return finite scales")
        return scales

    def flat(self, tensors: Mapping[str, Tensor] | Tensor) -> Tensor:
        """One vector of all parameters in their order, from a tensor per parameter (a vector is returned as it is).

        Parameters that are not named are 0. The vector has the highest precision among the parameters, at least
        float32.
        """
        dtype, device = self.like.dtype, self.like.device
        if isinstance(tensors, Tensor):
            if tensors.shape != self.like.shape:
                raise ValueError(
                    f"a vector over the parameters must have shape {tuple(self.like.shape)}, got {tuple(tensors.shape)}"
                )
            return _real(tensors).to(device, dtype)
        if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError(f"expected a vector over the parameters or a tensor for each, got {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if name not in self.params:
                raise ValueError(f"{name!r} is not one of the parameters that are measured")
            if tensor.shape != self.params[name].shape:
                raise ValueError(
                    f"{name!r} must have shape {tuple(self.params[name].shape)}, got {tuple(tensor.shape)}"
                )
        parts = [
            _real(tensors[name]).detach().reshape(-1).to(device, dtype)
            if name in tensors
            else self.like.new_zeros(p.numel())
            for name, p in self.params.items()
        ]
        return torch.cat(parts)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A tensor per parameter, of its shape, from one vector of all (views of it)."""
        return dict(zip(self.params, views(vector, list(self.params.values())), strict=True))

    @property
    def like(self) -> Tensor:
        """A vector of all parameters without memory of its own, for its shape, dtype and device."""
        return all_of(list(self.params.values()))

    def _check(self) -> None:
        def twice(evaluation: Evaluation) -> tuple[float, list[float], list[float], set[int]]:
            _, gradient = evaluation.loss_and_gradient(self.pieces[:1], require_use=True)
            first = [evaluation.means([piece])["loss"] for piece in self.pieces]
            again = [evaluation.means([piece])["loss"] for piece in reversed(self.pieces)]
            return torch.finfo(gradient.dtype).eps, first, again, {id(param) for param in evaluation.changed()}

        eps, first, again, written = self._evaluation(look=True).run(twice)
        for one, two in zip(first, reversed(again), strict=True):
            same = one == two or abs(one - two) <= 100 * eps * max(abs(one), abs(two))
            if not same and not (math.isnan(one) and math.isnan(two)):
                raise ValueError(
                    f"the loss is not deterministic: the same batch gave {one:.9g}, then {two:.9g}; switch off "
                    "dropout, augmentation and sampling in loss_fn"
                )
        # the other large ones need no copy from now on; a small one, such as a range, may be written to elsewhere
        self._written = [param for param in self._written if id(param) in written or param.numel() <= FEW]


def _real(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        raise TypeError(f"a vector over the parameters must be real, got {tensor.dtype}")
    return tensor


def check_objective(objective: object) -> None:
    """Raise if it is not an objective."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective(model, loss_fn, data), got {type(objective).__name__}")


def check_size(objective: Objective, rho: float) -> None:
    """Raise if rho is no neighborhood size for these weights."""
    check_rho(rho)
    dtype = objective.like.dtype
    if float(rho) > torch.finfo(dtype).max:
        raise ValueError(f"rho must be a number of {dtype}, at most {torch.finfo(dtype).max:.3g}, got {rho}")
