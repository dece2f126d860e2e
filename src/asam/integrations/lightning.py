"""ASAM inside Lightning: with one callback more, a ``LightningModule`` as it is trains with the gradient at w + e.

For each micro-batch Lightning calls ``training_step`` of the strategy and then ``backward`` of the module. The callback
takes the place of both: the first is the ascent pass, the second is ``asam.backward``, which calls ``training_step``
once more for the descent pass. All else is Lightning's own.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from ..checks import check_rho
from ..minimizer import ASAM
from ..optimizer import SharpnessAwareOptimizer
from ..parameters import selected_parameters

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger, Logger
except ImportError:  # the same package under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    from pytorch_lightning.loggers.logger import DummyLogger, Logger  # type: ignore[assignment]


class SharpnessAware(Callback):
    """A Lightning callback: a module with automatic optimization trains by ASAM.

    Args:
        rho, eta, normalization, p, bias, replay_rng, sync_ascent, compile, rounding: as for :class:`asam.ASAM`. SAM
            is ``normalization="none"``.
        params: names or tensors of the module's parameters to perturb, all by default.

    Raises:
        TypeError, ValueError: an argument is not one of the above; when a fit starts, ``params`` are not the module's,
            or the strategy (DeepSpeed, FSDP1) or the optimizer (LBFGS, SharpnessAwareOptimizer) cannot work.
        RuntimeError: when a fit starts, optimization is manual, ``training_step`` takes a ``dataloader_iter``, or the
            trainer has another callback of this kind.

    What ``training_step`` logs is of the pass at w, and torchmetrics metrics count that pass alone. Other side effects
    of it happen twice. During a fit ``asam`` is the :class:`asam.ASAM` at work.

    Example:
        >>> sharpness_aware = SharpnessAware(rho=0.5)
        >>> trainer = Trainer(callbacks=[sharpness_aware], accelerator="cpu", barebones=True)
        >>> sharpness_aware.rho  # and then trainer.fit(module, loader)
        0.5
    """

    def __init__(
        self,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        normalization: str | Callable[[Tensor], Tensor | float] = "elementwise",
        p: float = 2,
        bias: str = "unscaled",
        params: Iterable[str | Tensor] | None = None,
        replay_rng: bool = False,
        sync_ascent: bool = False,
        compile: bool = False,
        rounding: str = "nearest",
    ) -> None:
        self._options: dict[str, Any] = {"eta": eta, "normalization": normalization, "p": p, "bias": bias}
        self._options |= {"replay_rng": replay_rng, "sync_ascent": sync_ascent}
        self._options |= {"compile": compile, "rounding": rounding}
        # a wrong argument is told now, not when a fit starts; a layer that draws no random numbers
        ASAM(nn.LayerNorm(1), rho=rho, **self._options)
        if params is not None and (isinstance(params, str | Tensor) or not isinstance(params, Iterable)):
            raise TypeError(f"params must be an iterable of names or parameters, got {type(params).__name__}")
        self._params = None if params is None else list(params)
        self._rho = float(rho)
        self.asam: ASAM | None = None
        self._again: Callable[[], Tensor] | None = None
        self._patches = ExitStack()

    @property
    def rho(self) -> float:
        """Neighborhood size. Set it to follow a schedule; checkpoints keep it."""
        return self._rho if self.asam is None else self.asam.rho

    @rho.setter
    def rho(self, rho: float) -> None:
        check_rho(rho)
        self._rho = float(rho)
        if self.asam is not None:
            self.asam.rho = rho

    def state_dict(self) -> dict[str, Any]:
        """What changes during training: ``rho``."""
        return {"rho": self.rho}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self.rho = state_dict["rho"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of the strategy's ``training_step`` and of the module's ``backward``."""
        _check(trainer, pl_module)
        params = None if self._params is None else list(selected_parameters(pl_module, self._params).values())
        asam = self.asam = ASAM(trainer.model or pl_module, rho=self.rho, params=params, **self._options)
        step, backward = trainer.strategy.training_step, pl_module.backward
        own = getattr(backward, "__func__", backward) is not LightningModule.backward

        def ascend(*args: Any) -> Any:
            self._again = _step_again(asam, step, trainer, pl_module, args) if asam.rho > 0 else None
            with asam._replicas.apart(accumulating=False) if asam.rho > 0 else ExitStack():
                return step(*args)

        def descend(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            again, self._again = self._again, None
            if again is None:
                return backward(loss, *args, **kwargs)
            try:
                asam.backward(again, ascent=lambda: loss, backward=backward if own else None)
            except NoLossError:
                # a scaler, and the other processes, wait for gradients
                if _scaler(trainer) is not None or trainer.world_size > 1:
                    raise

        self._patches.enter_context(_replaced(trainer.strategy, training_step=ascend))
        self._patches.enter_context(_replaced(pl_module, backward=descend))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back what :meth:`on_fit_start` took."""
        self._patches.close()
        self._rho, self.asam, self._again = self.rho, None, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back what :meth:`on_fit_start` took: Lightning does not call ``teardown`` here."""
        self.teardown(trainer, pl_module, "fit")


class NoLossError(RuntimeError):
    """``training_step`` skips the step, and does so at w + e only."""


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what cannot work."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, SharpnessAware) for callback in callbacks) > 1:
        raise RuntimeError("callbacks must hold one SharpnessAware, got more")
    if not pl_module.automatic_optimization:
        raise RuntimeError(
            "SharpnessAware needs automatic_optimization=True. With manual optimization, make an ASAM of the model and "
            "call asam.backward(closure, backward=self.manual_backward) in training_step, in the place of "
            "self.manual_backward(loss)"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise RuntimeError("SharpnessAware needs each batch twice: let training_step take batch, not dataloader_iter")
    if trainer.strategy.handles_gradient_accumulation:
        raise TypeError(
            f"strategy must leave the backward pass to the module, as {type(trainer.strategy).__name__} does not: use "
            "one device, DDP or FSDP2 (ModelParallelStrategy)"
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise TypeError("the optimizer must take its step from the gradient, and LBFGS evaluates the loss itself")
    if any(isinstance(optimizer, SharpnessAwareOptimizer) for optimizer in trainer.optimizers):
        raise TypeError(
            "configure_optimizers must not return a SharpnessAwareOptimizer beside SharpnessAware, which would perturb "
            "the weights twice: return its base optimizer"
        )


def _step_again(
    asam: ASAM, step: Callable[..., Any], trainer: Trainer, pl_module: LightningModule, args: Iterable[Any]
) -> Callable[[], Tensor]:
    """A closure that computes the loss as Lightning is about to: from the same batch and random state."""
    args = tree_map(_copied, list(args))  # a step may take it apart
    before = asam._random_state() if asam.replay_rng else None

    def again() -> Tensor:
        if before is not None:
            before.restore()
        with _unnoticed(trainer, pl_module):
            output = step(*args)
        loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            raise NoLossError("training_step must return a loss at w + e if it does at w, got None")
        loss = loss / trainer.accumulate_grad_batches
        scaler = _scaler(trainer)
        return loss if scaler is None else scaler.scale(loss)

    return again


def _copied(leaf: Any) -> Any:
    """What is no tensor, list or dict, such as a dataclass, as an object of its own where it can be copied."""
    if isinstance(leaf, Tensor):
        return leaf
    try:
        return copy(leaf)
    except TypeError:  # a generator
        return leaf


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``: one function for all steps, since a compiled ``training_step`` is compiled for each."""


class _Silent(DummyLogger):
    """Logs nothing, and says of itself what the logger says in whose place it is."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def __getattribute__(self, name: str) -> Any:
        if name in ("name", "version", "save_dir", "root_dir", "log_dir"):
            return getattr(self._logger, name)
        return super().__getattribute__(name)


@contextmanager
def _unnoticed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run a training_step that logs nothing, and that no torchmetrics metric counts."""
    loggers = trainer.loggers
    with ExitStack() as stack:
        stack.enter_context(_replaced(pl_module, log=_nothing, print=_nothing))
        for metric in [module for module in pl_module.modules() if isinstance(module, Metric)]:
            # copies, since an update may write in place
            states = {k: v.clone() if isinstance(v, Tensor) else list(v) for k, v in metric.metric_state.items()}
            stack.enter_context(_replaced(metric, **{**vars(metric), **states}))
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [_Silent(logger) for logger in loggers]
        yield


@contextmanager
def _replaced(owner: object, /, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes of its own for a while."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(owner).pop(name, None)
        vars(owner).update(before)
