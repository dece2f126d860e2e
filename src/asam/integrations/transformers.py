"""ASAM inside ``transformers.Trainer``: each training step is taken at w + e, all else is Trainer's own.

``Trainer.training_step`` is a forward and a backward pass, with everything that Trainer, Accelerate and the user's
subclass put around them: it runs twice, at w and at w + e.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..minimizer import ASAM


class SharpnessAwareTrainer(Trainer):
    """A ``transformers.Trainer`` that trains with the gradient at w + e.

    A trainer of another class becomes sharpness-aware in the same way, with this one named first:
    ``class MyTrainer(SharpnessAwareTrainer, Seq2SeqTrainer): pass``.

    Args:
        args, kwargs: Trainer's own.
        asam: makes an :class:`ASAM` or :class:`SAM` of the model that it is given, the wrapped one:
            ``partial(ASAM, rho=0.5)``. It is called once for the arguments to be checked, and again when training
            starts, so ``params`` in it must be a list, not an iterator. The result is ``trainer.asam``, whose ``rho``
            may be set at any time, by a callback for example.

    Raises:
        TypeError, ValueError: ``asam`` or what it makes is not one, or has a direction with a memory or a ``combine``,
            which cannot see the loss scale here; an argument of ASAM's is wrong, or the gradients
            are not in ``.grad`` after a backward pass: with DeepSpeed, FSDP1, Megatron, SageMaker's model parallelism,
            and optimizers that step in the backward pass.

    The loss that is logged is that at w. ``compute_loss`` runs twice a step.

    Example:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=9, hidden_size=24))
        >>> data = [{"input_ids": [3, 5, 7], "labels": 1}] * 8
        >>> with TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, use_cpu=True)
        ...     trainer = SharpnessAwareTrainer(model, args, train_dataset=data, asam=partial(ASAM, rho=0.5))
        >>> trainer.asam.rho  # and then trainer.train()
        0.5
    """

    def __init__(self, *args: Any, asam: Callable[[nn.Module], ASAM] = ASAM, **kwargs: Any) -> None:
        if not callable(asam):
            raise TypeError(f"asam must make an ASAM of a model, got {asam!r}: write partial(ASAM, rho=0.5)")
        super().__init__(*args, **kwargs)
        self._check_gradients()
        self._make_asam = asam
        self._asam_is_of: nn.Module | None = None
        self.asam = self._asam_of(self.model)  # type: ignore[arg-type]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the model may have been changed, and will be wrapped or sharded, before the first step."""
        self._asam_is_of = None
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's step at w and again at w + e: adds the gradient there to ``.grad``, returns the loss at w."""
        if model is not self._asam_is_of:
            rho = self.asam.rho
            self.asam = self._asam_of(model)
            self.asam.rho = rho
            self._asam_is_of = model
        step = super().training_step
        # the backward pass is a part of the step already, and what is left of its loss has no graph
        return self.asam.backward(
            lambda: step(model, *args, **kwargs).detach().requires_grad_(), backward=lambda loss: None
        )

    def _check_gradients(self) -> None:
        optim = OptimizerNames(self.args.optim).value
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        unable = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP1": fsdp is not None and fsdp.fsdp_version == 1,
            "Megatron-LM": self.accelerator.distributed_type == "MEGATRON_LM",
            "SageMaker's model parallelism": is_sagemaker_mp_enabled(),
            f"optim={optim}": optim in ("lomo", "adalomo") or optim.endswith("layerwise"),
        }
        for name, used in unable.items():
            if used:
                raise ValueError(
                    f"args must leave the gradients in .grad after a backward pass, as {name} does not: use one "
                    "process, DistributedDataParallel or FSDP2, and an optimizer that steps after the backward pass"
                )

    def _asam_of(self, model: nn.Module) -> ASAM:
        asam = self._make_asam(model)
        if not isinstance(asam, ASAM):
            raise TypeError(
                f"asam must make an ASAM or SAM of a model, got {type(asam).__name__} from {self._make_asam}"
            )
        # they need the gradient without the loss scale, which is Trainer's secret here
        if asam._combine is not None or not asam._is_gradient_alone:
            raise ValueError("asam must make one without combine, and with no direction but the gradient at w")
        return asam
