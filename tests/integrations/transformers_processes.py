"""Run by torchrun in two processes: Trainer with DistributedDataParallel and FSDP2 against one process."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from slow_reference import assert_near, weights
from torch.distributed.tensor import DTensor
from transformers_problem import Aware, batches, by_hand, cross_entropy, network, sentences, trainer

from asam import ASAM


class OwnLoss(Aware):
    """With the mean over each micro-batch, which the model's own loss does not let Trainer scale correctly."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        return cross_entropy(model, inputs)


def check(folder, shared):
    model = network()
    reference = copy.deepcopy(model)
    training = trainer(
        folder,
        model,
        kind=OwnLoss,
        more={"asam": lambda model: ASAM(model, sync_ascent=shared)},
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        ddp_backend="gloo",
    )
    reduced = []
    made = training._asam_of

    def watched(model):
        if hasattr(model, "register_comm_hook"):
            model.register_comm_hook(None, reduce)
        return made(model)

    def reduce(state, bucket):
        reduced.append(bucket.is_last())
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    training._asam_of = watched
    training.train()
    assert type(training.asam._model).__name__ == "DistributedDataParallel"
    assert sum(reduced) == 3, "once for each optimizer step, never in an ascent pass"

    asam, optimizer = ASAM(reference), torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    shards = batches(sentences(), 2)
    for step in range(3):
        for micro in range(2):
            # accelerate deals the batches of two to the processes in turn
            pair = [shards[4 * step + 2 * micro + rank] for rank in range(2)]
            losses = [lambda batch=batch: cross_entropy(reference, batch) / 4 for batch in pair]
            for group in [losses] if shared else losses:
                asam.backward(group)
        optimizer.step()
        optimizer.zero_grad()
    assert_near(weights(model), weights(reference), rtol=1e-10, atol=1e-12)


def pretend_gpus(training):
    """The state that Accelerate has under FSDP2 on GPUs; on the CPU it would take DistributedDataParallel."""
    state = training.accelerator.state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    training.is_fsdp_enabled = True
    assert training.accelerator.is_fsdp2


def check_sharded(folder, sync_each_batch):
    model = network()
    reference = copy.deepcopy(model)
    training = trainer(
        folder,
        model,
        kind=OwnLoss,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        ddp_backend="gloo",
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": sync_each_batch}},
    )
    pretend_gpus(training)
    if not sync_each_batch:
        with pytest.raises(RuntimeError, match=r"leave set_requires_gradient_sync\(True\)"):
            training.train()
        return
    training.train()
    sharded = training.asam._model
    assert all(isinstance(param, DTensor) for param in sharded.parameters())
    parts = batches(sentences())
    by_hand(reference, ASAM(reference), [parts[:2], parts[2:4], parts[4:]], max_norm=0.05)
    whole = {name: param.full_tensor() for name, param in sharded.named_parameters()}
    assert_near(whole, weights(reference), rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shared in (False, True):
        check(sys.argv[1], shared)
    for sync_each_batch in (False, True):
        check_sharded(sys.argv[1], sync_each_batch)
    print("same")
