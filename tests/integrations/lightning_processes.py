"""DDP and FSDP2 of Lightning in two processes, against loops written by hand. A script that takes a folder."""

import logging
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from asam import ASAM
from asam.integrations.lightning import SharpnessAware

OPTIONS = [
    {},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
]


class Environment(TorchElasticEnvironment):
    """Two processes that are there already."""

    world_size = staticmethod(lambda: 2)
    global_rank = local_rank = staticmethod(dist.get_rank)
    node_rank = staticmethod(lambda: 0)
    validate_settings = staticmethod(lambda num_devices, num_nodes: None)


def network(sharded=False):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers, *([] if sharded else [nn.BatchNorm1d(3)])).double()


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(6)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Module(LightningModule):
    def __init__(self, sharded=False):
        super().__init__()
        self.network, self.sharded, self.log_of_passes = network(sharded), sharded, []

    def configure_model(self):
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.network[0], self.network[2], self.network):
                fully_shard(layer, mesh=mesh)

    def on_train_start(self):
        if isinstance(self.trainer.model, DistributedDataParallel):
            watch(self.trainer.model, self.log_of_passes)

    def training_step(self, batch):
        self.log_of_passes.append("forward")
        return self.network(batch).square().mean()

    def configure_optimizers(self):
        return sgd(self)


def watch(model, log):
    """Note each reduction of gradients, and each time that the buffers of the first process are sent around."""
    model.register_comm_hook(log, reduce)
    send = model._sync_buffers

    def sent():
        log.append("buffers")
        send()

    model._sync_buffers = sent


def reduce(log, bucket):
    log.append("reduce")
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])


def fit(module, strategy, data, *, accumulate=1, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        plugins=[Environment()],
        callbacks=[SharpnessAware(**options)],
        accumulate_grad_batches=accumulate,
        max_epochs=2,
        use_distributed_sampler=False,
        barebones=True,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module


def ddp_is_the_loop_written_by_hand(rank):
    for options in OPTIONS:
        # a static graph whose first backward pass is not synchronized fails in torch, with ASAM or without
        for accumulate in (1,) if options.get("static_graph") else (1, 3):
            for sync_ascent in (False, True):
                asked = {"rho": 0.5, "sync_ascent": sync_ascent}
                module = fit(Module(), DDPStrategy(**options), batches(rank), accumulate=accumulate, **asked)

                model, log = DistributedDataParallel(network(), **options), []
                watch(model, log)
                asam, optimizer = ASAM(model, **asked), sgd(model)

                def loss(batch, model=model, log=log, accumulate=accumulate):
                    output = model(batch)
                    log.append("forward")
                    return output.square().mean() / accumulate

                for i, batch in enumerate(2 * batches(rank), start=1):
                    with nullcontext() if i % accumulate == 0 else model.no_sync():
                        asam.backward(lambda batch=batch, loss=loss: loss(batch))
                    if i % accumulate == 0:
                        optimizer.step()
                        optimizer.zero_grad()
                assert module.log_of_passes == log, (options, module.log_of_passes, log)
                assert log.count("reduce") == log.count("buffers") == 12 // accumulate, log
                for one, other in zip(
                    module.network.state_dict().values(), model.module.state_dict().values(), strict=True
                ):
                    assert torch.equal(one, other), (options, accumulate, sync_ascent)


def fsdp2_is_one_process(rank):
    for accumulate in (1, 3):
        module = fit(Module(True), ModelParallelStrategy(2, 1), batches(rank), accumulate=accumulate, rho=0.5)
        model = network(True)
        asam, optimizer = ASAM(model, rho=0.5), sgd(model)
        for i, parts in enumerate(2 * list(zip(batches(0), batches(1), strict=True)), start=1):
            batch = torch.cat(parts)
            asam.backward(lambda x=batch, model=model, n=accumulate: model(x).square().mean() / n)
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        for one, other in zip(module.network.parameters(), model.parameters(), strict=True):
            assert one.to_local().shape != other.shape
            torch.testing.assert_close(one.full_tensor(), other, rtol=1e-12, atol=1e-14)


def fsdp1_is_refused(rank):
    class Strategy(DDPStrategy):
        def _setup_model(self, model):
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    with pytest.raises(TypeError, match="must not be wrapped by FullyShardedDataParallel: use fully_shard"):
        fit(Module(), Strategy(), batches(rank))


def process(rank, folder):
    warnings.filterwarnings("ignore", "isinstance.treespec, LeafSpec.", FutureWarning)  # Lightning's own
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "meet").as_uri(), rank=rank, world_size=2)
    for check in (ddp_is_the_loop_written_by_hand, fsdp2_is_one_process, fsdp1_is_refused):
        check(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    # forked before any backward pass, so that Lightning is imported once
    torch.multiprocessing.start_processes(process, (sys.argv[1],), nprocs=2, start_method="fork")
