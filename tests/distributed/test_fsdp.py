"""FSDP2 and tensor parallelism: the ball is that of the whole model, the result that of one process."""

import copy
import gc
import itertools
import math
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import batch, launch, loss, whole_batch
from slow_reference import assert_near, assert_same, gradients, norm, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import profile

from asam import ASAM, SAM, Geometry, SharpnessAwareOptimizer

NORMALIZATIONS = ["elementwise", "filterwise", "layerwise", "none"]


class Uneven(nn.Module):
    """Five rows, three rows and one: with two processes, the second has fewer of them, or none."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.temperature = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.conv(x)).mean((2, 3)))) * self.temperature


def network():
    torch.manual_seed(1)
    return Uneven().double()


def sharded(model=None, **options):
    model = network() if model is None else model
    for module in (model.conv, model.head, model):
        fully_shard(module, **options)
    return model


def whole(tensors):
    return {name: None if t is None else t.full_tensor().detach().clone() for name, t in tensors.items()}


def plainly(asam, closure):
    asam.backward(closure)


def through(asam, closure):
    asam.backward(closure, backward=torch.Tensor.backward)


def by_hand(asam, closure):
    closure().backward()
    with asam.perturbed():
        closure().backward()


def as_an_optimizer(asam, closure):
    optimizer = SharpnessAwareOptimizer(asam, torch.optim.SGD(asam._model.parameters(), lr=0.0))

    def full():
        optimizer.zero_grad()
        value = closure()
        value.backward()
        return value

    optimizer.step(full)


def assert_like_one_process(rank, make, model, single=None, way=plainly, steps=1, count=2):
    """The steps are those of one process with the whole batch."""
    single = network() if single is None else single
    asam, reference = make(model), make(single)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, single)]
    for step in range(steps):
        way(asam, lambda step=step: loss(model, batch(step, rank)))
        reference.backward(lambda step=step: loss(single, whole_batch(step, count)))
        assert_near(whole({name: p.grad for name, p in model.named_parameters()}), gradients(single))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_near(whole(dict(model.named_parameters())), weights(single))


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
    )


def test_what_two_shards_keep(tmp_path):
    launch(
        tmp_path,
        2,
        weights_come_back,
        the_extra_memory_is_one_copy_of_the_shards,
        passes_compute_with_the_weights_of_the_moment,
        passes_after_an_exception_do_too,
        parameters_are_the_shards,
        mixed_precision,
        mixed_precision_is_that_of_two_passes_by_hand,
        parameters_that_are_offloaded,
        what_cannot_work_says_so,
        tensor_parallelism,
    )


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


def local_shards(model):
    return {name: p.to_local().detach().clone() for name, p in model.named_parameters()}


def weights_come_back(rank):
    for dtype, reshard in itertools.product([torch.float64, torch.float32, torch.bfloat16], [True, False]):
        model = sharded(network().to(dtype), reshard_after_forward=reshard)
        params = list(model.parameters())
        places = [p.to_local().data_ptr() for p in params]
        before = local_shards(model)
        for way in (plainly, through, by_hand, as_an_optimizer):
            inputs, targets = batch(0, rank)
            data = (inputs.to(dtype), targets)
            way(ASAM(model), lambda model=model, data=data: loss(model, data))
            assert_same(local_shards(model), before)
        assert [p.to_local().data_ptr() for p in params] == places
        assert all(p is q for p, q in zip(params, model.parameters(), strict=True))


def the_extra_memory_is_one_copy_of_the_shards(rank):
    model = nn.Sequential(nn.Linear(100, 301), nn.Tanh(), nn.Linear(301, 50))
    for module in (model[0], model[2], model):
        fully_shard(module)
    shards = sum(p.to_local().nbytes for p in model.parameters())
    inputs, used = torch.randn(4, 100), []
    own = {p.to_local().untyped_storage().data_ptr() for p in model.parameters()}
    gc.collect()
    gc.freeze()  # the collector lists what is made from here on alone

    def more():
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(size for place, size in storages.items() if place not in own)

    def closure():
        # besides the copy: the loss, and what makes up norms; a thread of gloo may hold its tensors a moment longer
        limit, tries = (0, shards + 1000)[len(used) % 2], 0
        while more() > limit and tries < 50:
            tries += 1
            time.sleep(0.1)
        used.append(more())
        return model(inputs).square().mean()

    for normalization in ("elementwise", "layerwise"):
        asam = ASAM(model, normalization=normalization)
        for _ in range(2):
            asam.backward(closure)
            model.zero_grad()
            assert used[-2] == 0
            assert shards <= used[-1] <= shards + 1000


def passes_compute_with_the_weights_of_the_moment(rank):
    for reshard in (True, False):
        model = sharded(reshard_after_forward=reshard)
        model.set_reshard_after_backward(False)
        assert_like_one_process(rank, ASAM, model, steps=3)

        model = sharded(reshard_after_forward=reshard)
        before = loss(model, batch(0, rank))
        before.backward()
        with ASAM(model).perturbed():
            # no backward pass after this one, so that whole parameters are left behind
            moved = loss(model, batch(0, rank))
        assert moved > before
        assert torch.equal(loss(model, batch(0, rank)), before)


def parameters_are_the_shards(rank):
    # a forward pass without a backward pass leaves whole parameters in the modules, in place of the shards
    def looked_at(model):
        with torch.no_grad():
            loss(model, batch(9, rank))

    model, single = sharded(reshard_after_forward=False), network()
    looked_at(model)
    assert not hasattr(model.head.weight, "placements") or not hasattr(model.temperature, "placements")
    asam, reference = (ASAM(m, params=["head.weight", "temperature"]) for m in (model, single))
    for step in range(2):
        looked_at(model)
        asam.backward(lambda step=step: loss(model, batch(step, rank)))
        reference.backward(lambda step=step: loss(single, whole_batch(step)))
    assert_near(whole({name: p.grad for name, p in model.named_parameters()}), gradients(single))


class Interrupted(Exception):  # noqa: N818
    pass


def passes_after_an_exception_do_too(rank):
    for reshard, place in itertools.product([True, False], ["head", "conv", "loss", "backward"]):
        model, calls = sharded(reshard_after_forward=reshard), []

        def stop(*_, calls=calls):
            if len(calls) == 2:
                raise Interrupted

        def closure(model=model, calls=calls, place=place, stop=stop):
            calls.append(None)
            value = loss(model, batch(0, rank))
            if place == "loss":
                stop()
            if place == "backward":
                value.register_hook(stop)
            return value

        if place in ("head", "conv"):
            getattr(model, place).register_forward_hook(stop)
        before = local_shards(model)
        asam = ASAM(model)
        with pytest.raises(Interrupted):
            asam.backward(closure)
        assert_same(local_shards(model), before)
        model.zero_grad()
        calls += [None] * 9
        assert_like_one_process(rank, ASAM, model, steps=2)


def mixed_precision(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for normalization in NORMALIZATIONS:
        model = sharded(network().float(), mp_policy=policy)
        before, seen = local_shards(model), []

        def closure(model=model, seen=seen):
            inputs, targets = batch(0, rank)
            value = loss(model, (inputs.float(), targets))
            seen.append(value.item())
            return value

        ASAM(model, rho=1.0, normalization=normalization).backward(closure)
        assert_same(local_shards(model), before)
        assert seen[1] != seen[0]
        assert all(p.grad.dtype == torch.float32 and p.grad.full_tensor().isfinite().all() for p in model.parameters())


def mixed_precision_is_that_of_two_passes_by_hand(rank):
    # the perturbation is found and added in float32, what the passes compute with is rounded afterwards
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    inputs, targets = batch(0, rank)
    data = (inputs.float(), targets)

    def one_pass(model):
        loss(model, data).backward()
        grads = whole({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
        return grads

    for normalization in NORMALIZATIONS:
        model, by_hand = (sharded(network().float(), mp_policy=policy) for _ in range(2))
        asam = ASAM(model, rho=1.0, normalization=normalization)
        at_w = one_pass(by_hand)
        e = asam.geometry.maximizer(whole(dict(by_hand.named_parameters())), at_w, 1.0)
        with torch.no_grad():
            for name, param in by_hand.named_parameters():
                param += torch.distributed.tensor.distribute_tensor(e[name], param.device_mesh, param.placements)
        expected = torch.cat([grad.flatten() for grad in one_pass(by_hand).values()])
        asam.backward(lambda model=model: loss(model, data))
        actual = torch.cat([param.grad.full_tensor().flatten() for param in model.parameters()])
        # a weight on the edge of two bfloat16 numbers may be rounded to the other one
        assert (actual - expected).norm() <= 0.02 * expected.norm()
        assert (torch.cat([grad.flatten() for grad in at_w.values()]) - expected).norm() > 0.2 * expected.norm()


def parameters_that_are_offloaded(rank):
    offloaded = partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    for normalization in NORMALIZATIONS:
        assert_like_one_process(rank, partial(ASAM, normalization=normalization), offloaded(), steps=3)


def what_cannot_work_says_so(rank):
    model = sharded()
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match=r"no perturbed parameter has a gradient: .* set_requires_gradient_sync"):
        ASAM(model).backward(lambda: loss(model, batch(0, rank)))

    model = network()
    fully_shard(model.conv)
    with pytest.raises(ValueError, match=r"params must be sharded if the model is, and 'temperature' is not"):
        ASAM(model)
    ASAM(model, params=["conv.weight"]).backward(lambda: loss(model, batch(0, rank)))

    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"must not be wrapped by FullyShardedDataParallel: use fully_shard"):
        ASAM(model)

    model = network()
    asam = ASAM(model)
    sharded(model)
    with pytest.raises(RuntimeError, match="make ASAM after fully_shard"):
        asam.backward(lambda: loss(model, batch(0, rank)))


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
