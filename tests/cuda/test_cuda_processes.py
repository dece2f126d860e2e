"""Two GPUs and NCCL: DistributedDataParallel, with SyncBatchNorm too, and FSDP2, against one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from slow_reference import assert_near
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asam import ASAM

DEVICE, BACKEND, STEPS = "cuda", "nccl", 20
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def test_two_devices(tmp_path):
    torch.multiprocessing.spawn(_process, ((tmp_path / "meeting-point").as_uri(),), 2)


def _process(rank, meeting_point):
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(BACKEND, init_method=meeting_point, rank=rank, world_size=2)
    for check in (replicas, synchronized_batch_norm, shards):
        torch.manual_seed(0)
        check(rank)
    dist.destroy_process_group()


def network(*, norm=False):
    torch.manual_seed(1)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    return inputs.to(DEVICE), torch.randint(3, (8,), generator=generator).to(DEVICE)


def loss(model, *batches):
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return nn.functional.cross_entropy(model(inputs), targets)


def step(model):
    with torch.no_grad():
        for param in model.parameters():
            param -= 0.1 * param.grad
            param.grad = None


def whole(model):
    named = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named.items()}


def replicas(rank):
    """The ascent pass reduces nothing, the result is that of accumulated micro-batches, replicas stay equal."""
    model, single = DistributedDataParallel(network()), network()
    asam, reference, reduced = ASAM(model), ASAM(single), []

    def count(state, bucket):
        reduced.append(None)
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, count)
    for i in range(STEPS):
        asam.backward(lambda i=i: loss(model, batch(i, rank)))
        for other in range(2):
            reference.backward(lambda i=i, other=other: loss(single, batch(i, other)) / 2)
        step(model)
        step(single)
    assert len(reduced) == STEPS
    assert_near(whole(model), whole(single), rtol=1e-9, atol=1e-12)
    for param in model.parameters():
        both = [torch.empty_like(param) for _ in range(2)]
        dist.all_gather(both, param.detach())
        assert torch.equal(*both)


def synchronized_batch_norm(rank):
    """With the shared ascent the processes are one with the whole batch, and the statistics move once a step."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(norm=True)) if DEVICE == "cuda" else network(norm=False)
    model, single = DistributedDataParallel(model), network(norm=DEVICE == "cuda")
    asam, reference = ASAM(model, sync_ascent=True), ASAM(single)
    for i in range(STEPS):
        asam.backward(lambda i=i: loss(model, batch(i, rank)))
        reference.backward(lambda i=i: loss(single, batch(i, 0), batch(i, 1)))
        step(model)
        step(single)
    assert_near(whole(model), whole(single), rtol=1e-7, atol=1e-9)
    assert_near(dict(model.module.named_buffers()), dict(single.named_buffers()), rtol=1e-7, atol=1e-9)


def shards(rank):
    """Every normalization is that of one process with the whole batch."""
    for normalization in ("elementwise", "filterwise", "layerwise", "none"):
        model, single = network(), network()
        for module in (model[0], model[3], model):
            fully_shard(module)
        make = partial(ASAM, normalization=normalization)
        asam, reference = make(model), make(single)
        before = whole(model)
        for i in range(3):
            asam.backward(lambda i=i, model=model: loss(model, batch(i, rank)))
            reference.backward(lambda i=i, single=single: loss(single, batch(i, 0), batch(i, 1)))
            step(model)
            step(single)
        assert_near(whole(model), whole(single), rtol=1e-9, atol=1e-12)
        assert not torch.equal(whole(model)["0.weight"], before["0.weight"])
