"""ASAM and SAM as a gradient: what ``loss.backward()`` was, ``asam.backward(closure)`` is.

    g = gradient at w                               ascent
    e = argmax <g, e> over ||T_w^-1 e||_p <= rho
    .grad += gradient at w + e                      descent

Optimizer, scheduler, gradient scaler, clipping, accumulation and checkpoints stay as they are.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Execution
from .checks import check_choice, check_rho, warn
from .closures import Closure, as_closures, checked, descend, forward_only, total
from .combination import Combine, combine_
from .direction import Gradient, Momentum
from .geometry import Geometry
from .kernels import HALF
from .parameters import check_model, selected_parameters
from .passes import Passes
from .perturbation import RandomState, modules_of, parameters_of, perturbed, run_at, running_statistics
from .replicas import Replicas
from .sharding import Unsharded, check_sharding

# Those whose step or perturbed() block is running.
_inside: dict[int, "ASAM"] = {}


class ASAM:
    """Adaptive Sharpness-Aware Minimization: the gradient at the worst point of the neighborhood of the weights.

    Args:
        model: the module whose parameters are perturbed and whose buffers are kept from moving twice. The wrapper
            itself, if it is wrapped by DistributedDataParallel; already sharded, if it is by ``fully_shard`` (FSDP2).
        rho: neighborhood size, a finite number >= 0; may be set at any time. With 0, ``backward`` is one plain pass.
        eta, normalization, p, bias: the geometry of the neighborhood, see :class:`Geometry`.
        params: names or tensors of the parameters to perturb, all by default. Those without a gradient are left alone.
        replay_rng: whether the descent pass draws the same random numbers (dropout masks) from torch's default
            generators as the ascent pass did.
        sync_ascent: under DistributedDataParallel, whether the ascent gradient is averaged over the processes, which
            then share one perturbation, that of the whole batch. By default each climbs on its own shard of the batch
            and its ascent pass reduces nothing. With FSDP2 the gradient is that of the whole batch in any case.
        direction: what is climbed, the gradient at w by default: a :class:`Gradient` with a mean of earlier ones, or a
            :class:`Momentum`, which costs no pass at w. A memory shared by two ASAM holds the gradients of both.
        combine: takes the inner products <g0, g0>, <g0, g1> and <g1, g1> of the gradients at w and at w + e, scalar
            tensors (the squares never 0), and returns (c0, c1): what is added to ``.grad`` of the perturbed parameters
            is c0 g0 + c1 g1 instead of g1. g0 is kept until then, one more copy of them.
        compile: whether the way to w + e runs as compiled code, made in the first step; the model is not compiled. On
            a Linux CPU, for float32, p = 2 and T_w = |w| + eta or 1, by a C++ compiler in two seconds: about half the
            time for large tensors, two fifths for many small ones. Elsewhere by ``torch.compile`` in some ten
            seconds. The copy of w is taken while the gradients at w are there: one more copy at the peak.
        rounding: of w + e where weights are in bfloat16 or float16: to the ``"nearest"``, in which most of what
            bfloat16 weights should do is lost, or ``"stochastic"``, which keeps it in the mean. The random numbers are
            from torch's default generators, of each process its own.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or the model is wrapped in a way that cannot work.

    Source: Kwon et al., arXiv:2102.11600.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> asam = ASAM(model, rho=0.5)
        >>> inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss = asam.backward(lambda: torch.nn.functional.mse_loss(model(inputs), targets))
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        normalization: str | Callable[[Tensor], Tensor | float] = "elementwise",
        p: float = 2,
        bias: str = "unscaled",
        params: Iterable[str | Tensor] | None = None,
        replay_rng: bool = False,
        sync_ascent: bool = False,
        direction: Gradient | Momentum | None = None,
        combine: Combine | None = None,
        compile: bool = False,
        rounding: str = "nearest",
    ) -> None:
        check_model(model)
        if not isinstance(replay_rng, bool):
            raise TypeError(f"replay_rng must be a bool, got {type(replay_rng).__name__}")
        if not isinstance(sync_ascent, bool):
            raise TypeError(f"sync_ascent must be a bool, got {type(sync_ascent).__name__}")
        if not isinstance(direction, Gradient | Momentum | None):
            raise TypeError(f"direction must be a Gradient or a Momentum, got {type(direction).__name__}")
        if combine is not None and not callable(combine):
            raise TypeError(f"combine must be a callable, got {type(combine).__name__}")
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be a bool, got {type(compile).__name__}")
        if not isinstance(rounding, str):
            raise TypeError(f"rounding must be a string, got {type(rounding).__name__}")
        check_choice("rounding", rounding, ("nearest", "stochastic"))
        self.geometry = Geometry(normalization, p, eta, bias)
        self.rho = rho
        self.replay_rng = replay_rng
        self.sync_ascent = sync_ascent
        self._model = model
        self._replicas = Replicas(model)
        self._unsharded = Unsharded(model)
        self._unsharded.let_go()
        chosen = selected_parameters(model, params)
        self._params = {name: param for name, param in chosen.items() if self.geometry.perturbs(name)}
        if not self._params:
            raise ValueError("params leaves nothing to perturb: the model has no such parameters")
        for name, param in self._params.items():
            if param.is_complex():
                raise TypeError(f"params must be real, got {param.dtype} for {name!r}: leave it out with params=...")
        if rounding == "nearest":
            _warn_of_half_precision(self._params)
        sharded = check_sharding(model, self._params)
        self._passes = Passes(model, self._params, self._replicas, self._unsharded, sharded, type(self).__name__)
        self._direction = Gradient() if direction is None else direction
        self._combine = combine
        if combine is not None and self._replicas and not sync_ascent:
            raise ValueError(
                "combine under DistributedDataParallel needs sync_ascent=True: a combination with the gradient of one "
                "process alone would let the replicas drift apart"
            )
        if combine is not None and not self._direction.needs_ascent:
            raise ValueError("combine needs the gradient at w, and direction=Momentum(...) takes none")
        self._execution = Execution(compile, rounding == "stochastic")
        self._called = False
        self._loss_at = "w"

    @property
    def rho(self) -> float:
        """Neighborhood size. Set it to follow a schedule."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        check_rho(rho)
        self._rho = float(rho)

    @property
    def loss_at(self) -> str:
        """Where the loss that ``backward`` returned last was taken, ``"w"`` or ``"w + e"``.

        It is w, but for a :class:`Momentum` direction, whose one pass is at w + e.
        """
        return self._loss_at

    def __repr__(self) -> str:
        more = "" if self._is_gradient_alone else f", {self._direction!r}"
        return f"{type(self).__name__}(rho={self.rho}, {self.geometry}{more}, parameters={len(self._params)})"

    def backward(
        self,
        closure: Closure | Sequence[Closure],
        *,
        ascent: Closure | Sequence[Closure] | None = None,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """Add the gradient at w + e to ``.grad`` and return the loss at w.

        Args:
            closure: computes the loss, a scalar tensor; forward only. It is called twice, at w and at w + e. Several
                closures share one perturbation and their losses add up.
            ascent: what is climbed, if not ``closure``: for example the loss on a part of the batch. The loss returned
                is then this one's. Of no account for a :class:`Momentum`, which has no pass of its own to climb.
            backward: how to call backward on a loss, ``loss.backward()`` by default. With a gradient scaler:
                ``lambda loss: scaler.scale(loss).backward()``; with Accelerate: ``accelerator.backward``. It runs in
                both passes, and parameters outside the model then get the gradients of both, as they do with FSDP2.

        Returns:
            The loss at w (at :attr:`loss_at`), detached: a scalar tensor.

        Raises:
            TypeError: a closure is not callable or does not return a tensor.
            ValueError: a loss is not a scalar, or there is no closure.
            RuntimeError: no perturbed parameter has a gradient, a gradient is sparse, the call is nested in another on
                the same parameters, ``backward`` is given and DistributedDataParallel has ``static_graph``, or it is
                not and parameters are behind reentrant activation checkpointing or another layer whose backward pass
                writes ``.grad``.

        The weights are w again afterwards, bit for bit, also if a closure raises.
        """
        descents = as_closures("closure", closure)
        ascents = descents if ascent is None else as_closures("ascent", ascent)
        if backward is not None and not callable(backward):
            raise TypeError(f"backward must be a callable that takes the loss, got {type(backward).__name__}")
        if backward is None and not self._called:  # what is wrong with a closure is so from the start
            everything = list(self._model.parameters())
            same = ascents is descents
            descents = [forward_only(item, everything) for item in descents]
            ascents = descents if same else [forward_only(item, everything) for item in ascents]
        with self._entered(), torch.enable_grad():
            loss = self._step(descents, ascents, backward)
        self._called = True
        return loss

    def _step(
        self,
        descents: Sequence[Closure],
        ascents: Sequence[Closure],
        backward: Callable[[Tensor], Any] | None,
    ) -> Tensor:
        if isinstance(self._direction, Momentum):
            return self._without_ascent(self._direction, descents, backward)
        if self.rho == 0:
            return descend(descents, backward, [])
        before = self._random_state() if self.replay_rng else None
        loss, names, params, grads, units_at_w = self._passes.ascend(ascents, backward, averaged=self.sync_ascent)
        at_w = list(grads) if self._combine else []
        if self._combine or self._direction.remembers:
            units_at_w = self._passes.unit(units_at_w, averaged=self.sync_ascent)
        grads = self._direction.climbed(names, grads, units_at_w)
        units: list[Tensor] = []

        def descent() -> None:
            after = None
            if before is not None:
                after = self._random_state()
                before.restore()
            try:
                descend(descents, backward, units)
                if ascents is not descents:  # on a part of the batch, which drew less
                    after = None
            finally:
                if after is not None:
                    after.restore()

        with self._passes.alone() if self._combine else nullcontext():
            run_at(self._moved(names, params, grads, self.rho), descent)
            if self._combine:
                self._passes.check_dense(self._params, [param.grad for param in self._params.values()])
                met = set(params)
                units = self._passes.unit(units, averaged=bool(self._replicas))
                late = [param for param in self._params.values() if param.grad is not None and param not in met]
                combine_(self._combine, [*params, *late], [*at_w, *[None] * len(late)], (units_at_w, units))
        return loss

    def _without_ascent(
        self,
        momentum: Momentum,
        closures: Sequence[Closure],
        backward: Callable[[Tensor], Any] | None,
    ) -> Tensor:
        """One forward-backward pass, at w + e, and now and then a forward pass at w."""
        momenta = momentum.momenta(self._params) if self.rho else [None] * len(self._params)
        found = [
            (name, param, value)
            for (name, param), value in zip(self._params.items(), momenta, strict=True)
            if value is not None and param.requires_grad
        ]
        layers = running_statistics(self._model) if found else []
        loss = None
        if layers and momentum.looks():
            # a process whose inputs have run out would wait for a gradient of it
            with torch.no_grad(), self._replicas.apart(accumulating=False) if self._replicas else nullcontext():
                loss = total([checked(closure()).detach() for closure in closures])
        units: list[Tensor] = []
        with self._passes.alone() if momentum.remembers else nullcontext():
            if found:
                names, params, values = (list(column) for column in zip(*found, strict=True))
                # after a look at w every buffer has moved
                keeping = layers if loss is None else None
                moved = self._moved(names, params, values, -self.rho, keeping)
                there = run_at(moved, lambda: descend(closures, backward, units))
            else:
                there = descend(closures, backward, units)
            grads_there = [param.grad for param in self._params.values()]
            self._passes.look_at_missing(grads_there)
            if momentum.remembers:
                names, _, grads = self._passes.present(self._params, grads_there, averaged=False)
                momentum.observe(names, grads, self._passes.unit(units, averaged=bool(self._replicas)))
            elif found:
                self._passes.look_for_any(grads_there)
        self._loss_at = "w" if loss is not None or not found else "w + e"
        return there if loss is None else loss

    def _moved(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        grads: list[Tensor],
        rho: float,
        keeping: Iterable[nn.Module] | None = None,
    ) -> Generator[None, None, None]:
        return perturbed(
            self._model, self._unsharded, self.geometry, names, params, grads, rho, keeping, self._execution
        )

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Run a block at w + e, with the ``.grad`` that is there as the ascent gradient.

        The gradients of the whole model are cleared on entry, so that the block's own backward pass leaves the
        gradient at w + e in ``.grad``. Under DistributedDataParallel, the ascent gradient is this process's own if
        its pass, forward and backward, ran in ``model.no_sync()``.

        Raises:
            RuntimeError: no perturbed parameter has a gradient, one is sparse, or the call is nested in another on the
                same parameters.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(3, 1)
            >>> asam, inputs = ASAM(model), torch.randn(8, 3)
            >>> model(inputs).square().mean().backward()
            >>> with asam.perturbed():
            ...     model(inputs).square().mean().backward()
        """
        self._check_passes_apart()
        with self._entered():
            # a layer frozen since the last step may hold its old gradient
            grads_at_w = [param.grad if param.requires_grad else None for param in self._params.values()]
            self._passes.look_at_missing(grads_at_w)
            names, params, grads = self._passes.present(self._params, grads_at_w, averaged=self.sync_ascent)
            del grads_at_w
            yield from self._moved(names, params, grads, self.rho, self._clear_grads())

    @property
    def _is_gradient_alone(self) -> bool:
        """Whether what is climbed is the gradient at w and nothing else."""
        return self._direction.needs_ascent and not self._direction.remembers

    def _check_passes_apart(self) -> None:
        """Raise if the two passes cannot be the caller's own."""
        for name, needed in (
            ("replay_rng=True", self.replay_rng),
            ("combine", self._combine is not None),
            (f"direction={self._direction!r}", not self._is_gradient_alone),
        ):
            if needed:
                raise RuntimeError(f"{name} needs the whole step, which only backward(closure) takes")

    def _clear_grads(self) -> list[nn.Module]:
        """Set the gradients of the whole model to None, and return its modules."""
        self._unsharded.let_go()
        modules = modules_of(self._model)
        for param in parameters_of(self._model, modules):
            param.grad = None
        return modules

    def state_dict(self) -> dict[str, Any]:
        """What changes during training: ``rho``, and a memory of the direction. The geometry is the constructor's."""
        return {"rho": self.rho, **self._direction.state_dict(self._params)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`.

        Raises:
            ValueError, TypeError: it is no mapping, has other keys, or a value is not what that key holds.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        keys = sorted(self.state_dict())
        if set(state_dict) != set(keys):
            raise ValueError(f"state_dict must have the keys {keys}, got {sorted(map(str, state_dict))}")
        check_rho(state_dict["rho"])
        self._direction.load_state_dict(state_dict, self._params)
        self.rho = state_dict["rho"]

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if _inside:
            ours = set(map(id, self._params.values()))
            for other in list(_inside.values()):  # other threads have theirs
                if not ours.isdisjoint(map(id, other._params.values())):
                    raise RuntimeError(
                        "the weights are perturbed already: leave perturbed() or the closure of backward() before you "
                        f"call {type(self).__name__} again"
                    )
        try:
            _inside[id(self)] = self
            yield
        finally:
            _inside.pop(id(self), None)

    def _random_state(self) -> RandomState:
        return RandomState({param.device for param in self._params.values()})


def _warn_of_half_precision(params: Mapping[str, Tensor]) -> None:
    half = {str(param.dtype).removeprefix("torch.") for param in params.values() if param.dtype in HALF}
    if half:
        warn(
            f"weights in {' and '.join(sorted(half))} lose part of the perturbation, where it is smaller than half "
            "their last digit: keep them in float32 and use torch.autocast, or pass rounding='stochastic'"
        )


class SAM(ASAM):
    """Sharpness-Aware Minimization: ASAM with no normalization, a ball of fixed size around the weights.

    Args:
        model, rho, p, bias, params, replay_rng, sync_ascent, direction, combine, compile, rounding: as for
            :class:`ASAM`; of the bias policies, ``"scaled"`` and ``"unscaled"`` are the same here.

    Source: Foret et al., arXiv:2010.01412.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> loss = SAM(model, rho=0.05).backward(lambda: model(torch.randn(8, 3)).square().mean())
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.05,
        p: float = 2,
        bias: str = "unscaled",
        params: Iterable[str | Tensor] | None = None,
        replay_rng: bool = False,
        sync_ascent: bool = False,
        direction: Gradient | Momentum | None = None,
        combine: Combine | None = None,
        compile: bool = False,
        rounding: str = "nearest",
    ) -> None:
        super().__init__(
            model,
            rho=rho,
            normalization="none",
            p=p,
            bias=bias,
            params=params,
            replay_rng=replay_rng,
            sync_ascent=sync_ascent,
            direction=direction,
            combine=combine,
            compile=compile,
            rounding=rounding,
        )
