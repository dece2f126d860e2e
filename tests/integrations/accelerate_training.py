"""Checks that two processes run, started by ``accelerate launch`` from test_accelerate.py."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from processes import batch, everywhere, loss, network
from slow_reference import assert_near, assert_same, maximizer, weights
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from asam import ASAM, SharpnessAwareOptimizer

PROCESSES, MICRO_BATCHES, RHO, MAX_NORM = 2, 2, 0.3, 0.5


class Training:
    """The loop of the recipe, or with ``ours=False`` the same with a plain ``accelerator.backward``."""

    def __init__(self, accumulate=MICRO_BATCHES, *, ours=True, fsdp=None, sync_each_batch=False):
        # in the process group of the first one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        AcceleratorState._reset_state()
        GradientState._reset_state()
        plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_each_batch=sync_each_batch)
        self.accelerator = Accelerator(
            cpu=True, step_scheduler_with_optimizer=False, gradient_accumulation_plugin=plugin
        )
        if fsdp is not None:
            # on the CPU accelerate leaves the plugin aside without a word, and takes DistributedDataParallel
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = fsdp
        model = one_dimension_each()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.asam = ASAM(self.model, rho=RHO)
        self.accelerator.register_for_checkpointing(self.asam)
        self.ours = ours

    def micro_batch(self, micro, rank):
        with self.accelerator.accumulate(self.model):
            data = batch(micro, rank)
            if self.ours:
                self.asam.backward(lambda: loss(self.model, data), backward=self.accelerator.backward)
            else:
                self.accelerator.backward(loss(self.model, data))
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.scheduler.step()
            self.asam.rho *= 0.9

    def run(self, micro_batches, rank):
        for micro in micro_batches:
            self.micro_batch(micro, rank)
        return {
            name: param.full_tensor() if isinstance(param, DTensor) else param
            for name, param in weights(self.accelerator.unwrap_model(self.model)).items()
        }


def one_dimension_each():
    """The network of the other tests, with its scalar parameter as a vector: ``fully_shard`` takes no scalars."""
    model = network()
    model.temperature = nn.Parameter(model.temperature.detach().reshape(1))
    return model


def by_hand(steps, *, shared_ascent=False):
    """The weights after the steps, from the formulas, in one process that sees the batches of all."""
    model = one_dimension_each()
    velocity = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    clipped = 0

    def gradient(micro, ranks):
        value = sum(loss(model, batch(micro, rank)) for rank in ranks) / len(ranks)
        return dict(zip(velocity, torch.autograd.grad(value, list(model.parameters())), strict=True))

    def move(by, factor):
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.add_(by[name], alpha=factor)

    everyone = range(PROCESSES)
    for step in range(steps):
        total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
        for micro in range(MICRO_BATCHES * step, MICRO_BATCHES * (step + 1)):
            for ranks in [everyone] if shared_ascent else [[rank] for rank in everyone]:
                w = weights(model)
                move(maximizer(w, gradient(micro, ranks), RHO * 0.9**step), 1)
                for name, grad in gradient(micro, ranks).items():
                    total[name] += grad * len(ranks) / (PROCESSES * MICRO_BATCHES)
                model.load_state_dict(w)
        norm = torch.stack([grad.norm() for grad in total.values()]).norm()
        clipped += norm > MAX_NORM
        for name in velocity:
            velocity[name] = 0.9 * velocity[name] + total[name] * min(1, MAX_NORM / (norm + 1e-6))
        # the scheduler of accelerate halves the rate once a step with step_scheduler_with_optimizer=False
        move(velocity, -0.2 * 0.5**step)
    assert clipped > 0
    return weights(model)


def accumulation_clipping_and_a_scheduler(rank, folder):
    found = Training().run(range(6), rank)
    assert_near(found, by_hand(3))
    for tensor in found.values():
        one, other = everywhere(tensor)
        assert torch.equal(one, other)


def collectives(run):
    with profile() as profiler:
        run()
    return [event.name for event in profiler.events() if event.name.startswith("c10d::")]


def only_the_last_descent_reduces(rank, folder):
    counts = {}
    for ours in (False, True):
        training = Training(ours=ours)
        training.run(range(4), rank)  # in the second step the buckets are rebuilt
        counts[ours] = [collectives(lambda m=micro, t=training: t.micro_batch(m, rank)) for micro in (4, 5)]
    assert counts[True] == counts[False] == [[], ["c10d::allreduce_"]]


def a_saved_state_goes_on_to_the_same_weights(rank, folder):
    training = Training()
    training.run(range(4), rank)
    training.accelerator.save_state(folder / "state")
    expected = training.run(range(4, 8), rank)
    resumed = Training()
    resumed.accelerator.load_state(folder / "state")
    assert resumed.asam.rho == RHO * 0.9 * 0.9
    assert_same(resumed.run(range(4, 8), rank), expected)


def the_facade_goes_around_the_prepared_optimizer(rank, folder):
    expected, facade = Training(accumulate=1), Training(accumulate=1)
    optimizer = SharpnessAwareOptimizer(facade.asam, facade.optimizer)
    for step in range(3):
        data = batch(step, rank)
        expected.asam.backward(lambda d=data: loss(expected.model, d), backward=expected.accelerator.backward)
        expected.optimizer.step()
        expected.optimizer.zero_grad()
        expected.scheduler.step()

        def closure(data=data):
            optimizer.zero_grad()
            value = loss(facade.model, data)
            facade.accelerator.backward(value)
            return value

        optimizer.step(closure)
        facade.scheduler.step()
    assert_same(weights(facade.model), weights(expected.model))


def fully_sharded(rank, folder):
    for sync_each_batch in (True, False):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False
        )
        training = Training(fsdp=plugin, sync_each_batch=sync_each_batch)
        assert training.accelerator.is_fsdp2
        assert all(isinstance(param, DTensor) for param in training.model.parameters())
        if sync_each_batch:
            assert_near(training.run(range(6), rank), by_hand(3, shared_ascent=True))
        else:  # the gradient of the whole batch, which the ascent needs, is never there
            with pytest.raises(RuntimeError, match=r"leave set_requires_gradient_sync\(True\)"):
                training.run(range(6), rank)


CHECKS = [
    accumulation_clipping_and_a_scheduler,
    only_the_last_descent_reduces,
    a_saved_state_goes_on_to_the_same_weights,
    the_facade_goes_around_the_prepared_optimizer,
    fully_sharded,
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    first = Accelerator(cpu=True)
    assert first.num_processes == PROCESSES
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check(first.process_index, Path(sys.argv[1]))
        except Exception as error:
            error.add_note(f"in {check.__name__}, process {first.process_index}")
            raise
        if first.is_main_process:
            print("passed", check.__name__)
    first.end_training()
