"""The neighborhood in which sharpness is taken: the ball ``||T_w^-1 e||_p <= rho``.

SAM climbs in a ball of fixed size, so rescaling a ReLU network, which leaves its function as it is, changes what SAM
sees. ASAM measures a perturbation e in units of the weights themselves, ``u = T_w^-1 e`` with T_w = diag(|w| + eta),
and the dependence on the scale is gone. Everything here follows from that one change of variables:

    the maximizer of <g, e> on the ball    e = rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1),   1/p + 1/q = 1
    for p = 2                              e = rho T^2 g / ||Tg||_2
    for p = inf                            e = rho T sign(Tg)

Source: Kwon et al., ASAM, ICML 2021, arXiv:2102.11600.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .blocks import AS_IT_STANDS, Block, Execution, Pieces, dual_norm, factors_of, packed
from .checks import check_choice, check_number, check_rho
from .kernels import HALF, factors
from .native import NativeBlock, block_of, is_for
from .norms import DualNorm, norms, safe_norm, together
from .projection import nearest_in_ball
from .sharding import groups, is_sharded, local, over_shards, shard

NORMALIZATIONS = ("elementwise", "filterwise", "layerwise", "none")
BIASES = ("unscaled", "scaled", "fixed")
BIAS = "bias"  # how the names of those parameters end; a dot is no part of it

# How the scale of a parameter is found: a normalization, or "fixed".
Kind = str | Callable[[Tensor], Tensor | float]
# Those for which no tensor is made in advance: |w| + eta, 1, and 0, for what does not move.
WITHOUT_SCALE = ("elementwise", "none", "fixed")


@dataclass(frozen=True)
class Geometry:
    """The ball ``||T_w^-1 e||_p <= rho`` around the weights w: its scales T_w, its maximizer and its projection.

    Args:
        normalization: T_w of the weights. ``"elementwise"``: |w| + eta. ``"filterwise"``: the 2-norm over all
            dimensions but the first (|w| for tensors of fewer than two dimensions), + eta. ``"layerwise"``: the
            2-norm of the tensor, + eta. ``"none"``: 1, which is SAM. Or a callable that takes the parameter and
            returns its scale, a tensor that broadcasts to it or a number; the scale is used as it is, without eta. A
            sharded parameter is given whole, as a DTensor.
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
        check_choice("bias", self.bias, BIASES)

    def perturbs(self, name: str) -> bool:
        """Whether the parameter of that name is perturbed at all."""
        return not (self.bias == "fixed" and name.endswith(BIAS))

    def scales(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """T_w, the diagonal as one tensor per parameter, each of the parameter's shape.

        Example:
            >>> Geometry().scales({"weight": torch.tensor([-2.0, 0.0]), "bias": torch.tensor([5.0])})
            {'weight': tensor([2.0100, 0.0100]), 'bias': tensor([1.])}
        """
        with torch.no_grad():
            kinds = self._kinds(list(params), list(params.values()))
            return {
                name: self._scale(name, kind, param.detach()).to(param.dtype)
                for (name, param), kind in zip(params.items(), kinds, strict=True)
            }

    def norm(self, params: Mapping[str, Tensor], perturbations: Mapping[str, Tensor]) -> Tensor:
        """``||T_w^-1 e||_p`` over all parameters, a scalar tensor.

        An element that is 0 where T_w is 0 counts as 0; any other there makes the norm infinite.

        Example:
            >>> Geometry(eta=0.0).norm({"weight": torch.tensor([2.0, 0.0])}, {"weight": torch.tensor([1.0, 0.0])})
            tensor(0.5000)
        """
        with torch.no_grad():
            return safe_norm(_flat(self._normalized(params, perturbations)), self.p)

    def maximizer(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
        """The perturbation e in the ball that maximizes <g, e>, one tensor per parameter.

        It does not depend on the size of g, only on its direction, as long as T g is a normal number of its dtype; a
        zero gradient gives e = 0, a non-finite one a non-finite e.

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
            projected = nearest_in_ball(_flat(u), self.p, rho)
            parts = torch.split(projected, [tensor.numel() for tensor in u.values()])
            return {name: part.view_as(u[name]) * scales[name] for name, part in zip(u, parts, strict=True)}

    def _normalized(self, params: Mapping[str, Tensor], perturbations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _check_names("perturbations", params, perturbations)
        scales = self.scales(params)
        return {name: torch.where(perturbations[name] == 0, 0, perturbations[name] / scales[name]) for name in params}

    def _kinds(self, names: Sequence[str], params: Sequence[Tensor]) -> list[Kind]:
        """How the scale of each parameter is found: the normalization, as the bias policy and the shape leave it."""
        weights = self.normalization
        biases = {"unscaled": "none", "scaled": weights, "fixed": "fixed"}[self.bias]
        kinds = [biases if name.endswith(BIAS) else weights for name in names]
        if weights == "filterwise":
            return [
                "elementwise" if kind == "filterwise" and param.ndim < 2 else kind
                for kind, param in zip(kinds, params, strict=True)
            ]
        return kinds

    def _scale(self, name: str, kind: Kind, param: Tensor) -> Tensor:
        if kind == "elementwise":
            return param.abs() + self.eta
        if kind == "none":
            return torch.ones_like(param)
        if kind == "fixed":
            return torch.zeros_like(param)
        if kind in ("filterwise", "layerwise"):
            return (norms(param, keep_first=kind == "filterwise") + self.eta).expand_as(param)
        assert callable(kind)
        value = kind(param)
        if not isinstance(value, Tensor | Real):
            raise TypeError(
                f"normalization must return a scale, a tensor or a number: for {name!r} it returned "
                f"{type(value).__name__}"
            )
        dtype = torch.float32 if param.dtype in HALF else param.dtype
        scale = torch.as_tensor(value, dtype=dtype, device=param.device)
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
        execution: Execution = AS_IT_STANDS,
    ) -> Iterator[Block | NativeBlock]:
        """Cut the parameters into blocks and yield each, ready to give its part of the maximizer.

        The norm is taken over all of them before the first is yielded. ``grads`` is emptied: a gradient is let go
        with its block, when the next one is asked for. ``targets`` are tensors of the parameters' shapes to be cut
        the same way (the parameters themselves if None). To be called and iterated over under ``torch.no_grad()``.
        """
        q = 1.0 if self.p == math.inf else self.p / (self.p - 1)
        kinds = self._kinds(names, params)
        if is_sharded(params):
            blocks, norm = self._cut_shards(names, kinds, params, grads, targets, q, execution)
            grads.clear()
            numbers: tuple[Tensor, ...] | float = factors(q, abs(rho), norm.unit, norm.norm)
        else:
            scales: list[Tensor | None] = [None] * len(params)
            if self.normalization not in WITHOUT_SCALE:
                scales = [
                    None if kind in WITHOUT_SCALE else self._scale(name, kind, param.detach())
                    for name, kind, param in zip(names, kinds, params, strict=True)
                ]
            blocks = self._packed(kinds, params, grads, targets, scales, q, execution)
            grads.clear()
            del scales
            numbers = factors_of(blocks, q, abs(rho))
        while blocks:  # from the last on, part of which is still in the cache
            block = blocks.pop()
            block.q, block.sign, block.factors = q, (-1 if rho < 0 else 1), numbers
            yield block
            del block

    def _packed(
        self,
        kinds: Sequence[Kind],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        targets: Sequence[Tensor] | None,
        scales: Sequence[Tensor | None],
        q: float,
        execution: Execution,
    ) -> list[Block | NativeBlock]:
        """Blocks of the parameters that move, with their scales where those are neither |w| + eta nor 1."""
        places: Sequence[int] = range(len(params))
        native: NativeBlock | None = None
        if execution.compile and targets is None and is_for(q):
            adaptive = [True if kind == "elementwise" else False if kind == "none" else None for kind in kinds]
            native, places = block_of(adaptive, params, grads, self.eta)
        elementwise = [kind == "elementwise" for kind in kinds]
        ordered = [place for place in places if elementwise[place]]
        ordered += [place for place in places if kinds[place] not in WITHOUT_SCALE]
        ordered += [place for place in places if kinds[place] == "none"]
        goals = params if targets is None else targets
        blocks = packed(Pieces(params, grads, goals, scales, elementwise), ordered, self.eta, execution)
        return [*([] if native is None else [native]), *blocks]

    def _cut_shards(
        self,
        names: Sequence[str],
        kinds: Sequence[Kind],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        targets: Sequence[Tensor] | None,
        q: float,
        execution: Execution,
    ) -> tuple[list[Block | NativeBlock], DualNorm]:
        """Blocks of the local shards, and the norm over the shards of all processes."""
        spread = [groups(param) for param in params]
        layouts = list(dict.fromkeys(spread))
        values = [shard(grad, param) for grad, param in zip(grads, params, strict=True)]
        shards = local(params)
        goals = None if targets is None else local(targets)
        scales = self._shard_scales(names, kinds, params)
        parts = []
        for layout in layouts:
            members = [i for i, its in enumerate(spread) if its == layout]
            part = self._packed(
                [kinds[i] for i in members],
                [shards[i] for i in members],
                [values[i] for i in members],
                None if goals is None else [goals[i] for i in members],
                [scales[i] for i in members],
                q,
                execution,
            )
            parts.append(part)
        sizes = [dual_norm(part, q).pair() for part in parts]
        over_shards(sizes, layouts, params, q)
        norm = together([(size[0, 0], size[1, 0]) for size in sizes], q)
        return [block for part in parts for block in part], norm

    def _shard_scales(
        self, names: Sequence[str], kinds: Sequence[Kind], params: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The scales of local shards, where they are neither |w| + eta nor 1."""
        scales: list[Tensor | None] = [None] * len(params)
        shards = local(params)
        with_norms = [i for i, kind in enumerate(kinds) if kind in ("filterwise", "layerwise")]
        lengths = [norms(shards[i], keep_first=kinds[i] == "filterwise") for i in with_norms]
        sizes = [torch.stack([length.flatten(), torch.ones_like(length).flatten()]) for length in lengths]
        over_shards(sizes, [groups(params[i], across_rows=kinds[i] == "filterwise") for i in with_norms], params, 2)
        for i, length, size in zip(with_norms, lengths, sizes, strict=True):
            scales[i] = (size.prod(dim=0).to(length).view_as(length) + self.eta).expand_as(shards[i])
        for i, kind in enumerate(kinds):
            if callable(kind):
                scales[i] = shard(self._scale(names[i], kind, params[i].detach()), params[i])
        return scales


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _check_names(argument: str, params: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    if list(params) != list(given):
        raise ValueError(f"{argument} must have the names of params in their order: {list(params)}, got {list(given)}")
