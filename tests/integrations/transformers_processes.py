"""Run by torchrun in two processes: Trainer under DistributedDataParallel against one process that has both shards."""

import copy
import sys

import torch
import torch.distributed as dist
from slow_reference import assert_near, weights
from transformers_problem import Aware, batches, cross_entropy, network, sentences, trainer

from asam import ASAM


class Noting(Aware):
    """Notes how often gradients were reduced when an optimizer step was due."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        return cross_entropy(model, inputs)


def check(folder, shared):
    model = network()
    reference = copy.deepcopy(model)
    training = trainer(
        folder,
        model,
        kind=Noting,
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shared in (False, True):
        check(sys.argv[1], shared)
    print("same")
