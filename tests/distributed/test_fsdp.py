"""FSDP2 and tensor parallelism: the ball is that of the whole model, the result that of one process."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import batch, launch, loss, whole_batch
from shards import (
    NORMALIZATIONS,
    as_an_optimizer,
    assert_like_one_process,
    by_hand,
    network,
    plainly,
    sharded,
    through,
    whole,
)
from slow_reference import assert_near, gradients, norm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import profile

from asam import ASAM, SAM, Geometry
from asam.native import NativeBlock, library


@pytest.mark.fsdp2
def test_two_shards(tmp_path):
    launch(
        tmp_path,
        2,
        shards_are_uneven_and_empty,
        every_geometry_is_that_of_one_process,
        every_way_and_many_steps,
        scales_of_the_users_own,
        a_part_of_the_parameters,
        the_perturbation_has_the_size_rho,
        accumulation,
        one_collective_a_step,
        compiled_code_moves_the_shards,
        tensor_parallelism,
    )


@pytest.mark.slow
@pytest.mark.fsdp2
def test_replicas_of_shards(tmp_path):
    launch(tmp_path, 4, hybrid_sharding, tensor_parallelism_of_shards)


def shards_are_uneven_and_empty(rank):
    model = sharded()
    rows = {name: p.to_local().shape[0] for name, p in model.named_parameters()}
    assert rows["conv.weight"] == (3, 2)[rank]
    assert rows["temperature"] == (1, 0)[rank]


def every_geometry_is_that_of_one_process(rank):
    balls = [(2, "unscaled"), (2, "scaled"), (2, "fixed"), (math.inf, "scaled"), (3, "fixed"), (1.5, "unscaled")]
    for normalization, (p, bias) in itertools.product(NORMALIZATIONS, balls):
        make = partial(ASAM, normalization=normalization, p=p, bias=bias)
        assert_like_one_process(rank, make, sharded())
    # nothing of what is perturbed lies in the second process
    for normalization in NORMALIZATIONS:
        make = partial(ASAM, normalization=normalization, params=["temperature"])
        assert_like_one_process(rank, make, sharded())


def every_way_and_many_steps(rank):
    for reshard in (True, False, None):
        for way in (plainly, through, by_hand, as_an_optimizer):
            assert_like_one_process(rank, ASAM, sharded(reshard_after_forward=reshard), way=way, steps=3)
    assert_like_one_process(rank, partial(ASAM, normalization="layerwise"), sharded(), steps=20)
    assert_like_one_process(rank, partial(SAM, sync_ascent=True), sharded(), steps=3)
    assert_like_one_process(rank, partial(ASAM, rho=0), sharded(), steps=3)


def compiled_code_moves_the_shards(rank):
    moves, real = [], NativeBlock.move
    ends = []
    for fast in (False, True):
        model = sharded(network().float())
        asam = ASAM(model, rho=0.1, compile=fast)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NativeBlock, "move", lambda block: (moves.append(1), real(block)))
            for step in range(3):
                inputs, targets = batch(step, rank)
                data = (inputs.float(), targets)
                asam.backward(lambda data=data, model=model: loss(model, data))
                optimizer.step()
                optimizer.zero_grad()
        ends.append(whole(dict(model.named_parameters())))
    assert len(moves) == (3 if library() else 0)
    assert_near(ends[1], ends[0], rtol=1e-4, atol=1e-6)


def scales_of_the_users_own(rank):
    for normalization in (
        lambda w: w.abs() + 0.1,
        lambda w: w.norm(),
        lambda w: w.abs().sum(dim=0, keepdim=True),
        lambda w: 0.3,
        lambda w: torch.tensor(0.3),
    ):
        assert_like_one_process(rank, partial(ASAM, normalization=normalization), sharded())


def a_part_of_the_parameters(rank):
    def frozen(model):
        model.conv.weight.requires_grad_(False)
        return model

    for params in (["conv.bias", "head.weight"], None):
        make = partial(ASAM, params=params, normalization="filterwise")
        assert_like_one_process(rank, make, sharded(frozen(network())), frozen(network()))


def the_perturbation_has_the_size_rho(rank):
    for normalization, p in itertools.product(NORMALIZATIONS, [2, math.inf, 1.5]):
        model, seen = sharded(), []

        def closure(model=model, seen=seen):
            seen.append(whole(dict(model.named_parameters())))
            return loss(model, batch(0, rank))

        ASAM(model, rho=0.3, normalization=normalization, p=p).backward(closure)
        perturbations = {name: seen[1][name] - w for name, w in seen[0].items()}
        assert norm(seen[0], perturbations, normalization, p) == pytest.approx(0.3, rel=1e-10)

    geometry, params = Geometry(normalization="layerwise"), whole(dict(model.named_parameters()))
    grads = {name: torch.randn_like(w) for name, w in params.items()}
    expected = geometry.maximizer(params, grads, 0.1)
    for name, param in model.named_parameters():
        grads[name] = torch.distributed.tensor.distribute_tensor(grads[name], param.device_mesh, param.placements)
    assert_near(whole(geometry.maximizer(dict(model.named_parameters()), grads, 0.1)), expected)


def accumulation(rank):
    model, single = sharded(), network()
    asam, reference = ASAM(model), ASAM(single)
    for step in range(3):
        asam.backward(lambda step=step: loss(model, batch(step, rank)))
        reference.backward(lambda step=step: loss(single, whole_batch(step)))
    asam.backward([lambda step=step: loss(model, batch(step, rank)) for step in range(2)])
    reference.backward([lambda step=step: loss(single, whole_batch(step)) for step in range(2)])
    assert_near(whole({name: p.grad for name, p in model.named_parameters()}), gradients(single))


def collectives(run):
    run()
    with profile() as profiler:
        run()
    return sorted(event.name for event in profiler.events() if event.name.startswith("c10d::"))


def one_collective_a_step(rank):
    model = sharded()

    def two_passes():
        for _ in range(2):
            loss(model, batch(0, rank)).backward()

    plain = collectives(two_passes)
    for normalization, p in itertools.product(NORMALIZATIONS, [2, math.inf]):
        asam = ASAM(model, normalization=normalization, p=p)
        more = collectives(lambda asam=asam: asam.backward(lambda: loss(model, batch(0, rank))))
        for name in plain:
            more.remove(name)
        assert more == ["c10d::allgather_"] * (2 if normalization == "layerwise" else 1)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return torch.tanh(self.down(torch.tanh(self.up(self.norm(x)))))


def assert_tensor_parallel(mesh, rank, shard=None):
    torch.manual_seed(2)
    single = Perceptron().double()
    inputs = torch.randn(2, 5, 6, dtype=torch.float64)
    for normalization, p in itertools.product(NORMALIZATIONS, [2, math.inf, 3]):
        model = copy.deepcopy(single)
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if shard is not None:
            fully_shard(model, mesh=shard)
        asam, reference = (ASAM(m, normalization=normalization, p=p) for m in (model, single))
        assert "Shard(dim=1)" in str(model.down.weight.placements)
        mine = inputs if shard is None else inputs[shard.get_local_rank()]
        asam.backward(lambda model=model, mine=mine: model(mine).square().mean())
        reference.backward(lambda: single(inputs).square().mean())
        grads = {name: param.grad for name, param in model.named_parameters()}
        whole_grads = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
        assert_near(whole_grads, gradients(single))
        single.zero_grad()


def tensor_parallelism(rank):
    assert_tensor_parallel(init_device_mesh("cpu", (2,)), rank)


def tensor_parallelism_of_shards(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    assert_tensor_parallel(mesh["tensor"], rank, mesh["shard"])


def hybrid_sharding(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for normalization, p in itertools.product(NORMALIZATIONS, [2, math.inf, 3]):
        make = partial(ASAM, normalization=normalization, p=p)
        assert_like_one_process(rank, make, sharded(mesh=mesh), count=4)
    # whole parameters that are cut again among two processes between the passes
    assert_like_one_process(rank, ASAM, sharded(reshard_after_forward=2), steps=3, count=4)
    model = sharded(mesh=mesh)
    assert_like_one_process(rank, ASAM, model, steps=10, count=4)
    for param in model.parameters():
        here = param.to_local().detach().contiguous()
        replicas = [torch.empty_like(here) for _ in range(2)]
        dist.all_gather(replicas, here, group=mesh.get_group("replicate"))
        assert torch.equal(*replicas)
