"""transformers.Trainer: exceptions at w + e, losses and settings that cannot work."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from slow_reference import assert_same, weights
from transformers_problem import Aware, InOrder, Watching, network, trainer

from asam import ASAM, Gradient, Momentum
from asam.integrations.transformers import SharpnessAwareTrainer


class Interrupted(Watching):
    """Fails in the last pass of the second step."""

    error = RuntimeError("interrupted")

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if len(self.seen) == 4:
            raise self.error
        return loss


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_after_an_exception(error, tmp_path):
    model = network()
    training = trainer(tmp_path, model, kind=Interrupted)
    training.error = error("interrupted")
    with pytest.raises(error, match="interrupted"):
        training.train()
    assert_same(weights(model), training.seen[2][0])
    training.train()
    assert len(training.seen) == 4 + 6


def test_losses_that_cannot_work_say_so(tmp_path):
    class NoGraph(Aware):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs).detach()

    class NoLoss(InOrder):
        def training_step(self, *args):
            return torch.zeros(())

    class Skipping(SharpnessAwareTrainer, NoLoss):
        pass

    model = network()
    before = weights(model)
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer(tmp_path, model, kind=NoGraph).train()
    with pytest.raises(RuntimeError, match="no perturbed parameter has a gradient"):
        trainer(tmp_path, model, kind=Skipping).train()
    model.bert.embeddings.word_embeddings.sparse = True
    with pytest.raises(RuntimeError, match=r"does not take sparse gradients.*params="):
        trainer(tmp_path, model).train()
    assert_same(weights(model), before)


@pytest.mark.parametrize(
    ("asam", "error", "message"),
    [
        ({"rho": 0.5}, TypeError, r"asam must make an ASAM of a model, got \{'rho': 0.5\}: write partial"),
        (0.5, TypeError, "asam must make an ASAM of a model, got 0.5"),
        (lambda model: model, TypeError, "asam must make an ASAM or SAM of a model, got BertForSequenceClassification"),
        (partial(ASAM, rho=-1), ValueError, "rho must be a finite number >= 0, got -1"),
        (partial(ASAM, normalization="rows"), ValueError, "normalization must be"),
        (partial(ASAM, radius=1), TypeError, "radius"),
        (partial(ASAM, direction=Gradient(mean=-1.0)), ValueError, "no direction but the gradient at w"),
        (partial(ASAM, direction=Momentum()), ValueError, "no direction but the gradient at w"),
        (partial(ASAM, combine=lambda g00, g01, g11: (0, 1)), ValueError, "without combine"),
    ],
)
def test_wrong_arguments_are_refused_before_training(asam, error, message, tmp_path):
    with pytest.raises(error, match=message):
        trainer(tmp_path, network(), more={"asam": asam})


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"leave the gradients in .grad after a backward pass, as optim={optim} does"):
        trainer(tmp_path, network(), optim=optim)


STATES = {
    "DeepSpeed": {"deepspeed_plugin": SimpleNamespace(zero_stage=2)},
    "FSDP1": {"fsdp_plugin": SimpleNamespace(fsdp_version=1, activation_checkpointing=False)},
    "Megatron-LM": {"distributed_type": "MEGATRON_LM"},
}


@pytest.mark.parametrize("name", STATES)
def test_what_shards_gradients_its_own_way_is_refused(name, tmp_path):
    class Pretending(Aware):
        """With the state that Accelerate has under that launcher."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            real = self.accelerator
            state = SimpleNamespace(**STATES[name])
            distributed = getattr(state, "distributed_type", real.distributed_type)
            self.is_deepspeed_enabled = hasattr(state, "deepspeed_plugin")
            self.accelerator = SimpleNamespace(
                state=state, distributed_type=distributed, unwrap_model=real.unwrap_model, parallelism_config=None
            )

    with pytest.raises(ValueError, match=f"leave the gradients in .grad after a backward pass, as {name} does not"):
        trainer(tmp_path, network(), kind=Pretending)
