"""DistributedDataParallel: the ascent pass of each process is its own, the descent pass is shared."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from processes import batch, everywhere, launch, loss, network, whole_batch
from slow_reference import assert_near, assert_same, gradients, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.profiler import profile

from asam import ASAM, SAM, SharpnessAwareOptimizer

OPTIONS = [
    {},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    {"static_graph": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
]
MAKERS = [
    ASAM,
    SAM,
    lambda model, **more: ASAM(model, p=math.inf, normalization="filterwise", **more),
    lambda model, **more: ASAM(model, p=3, bias="fixed", normalization="layerwise", **more),
]


def test_two_replicas(tmp_path):
    launch(
        tmp_path,
        2,
        the_ascent_pass_reduces_nothing,
        replicas_stay_equal,
        each_replica_climbs_on_its_own_batch,
        the_wrapped_module_will_do,
        every_way_climbs_on_its_own_batch,
        the_shared_ascent_is_that_of_the_whole_batch,
        parameters_that_one_process_uses,
        accumulation,
        buffers_move_once,
        weights_come_back_after_an_exception,
        what_cannot_work_says_so,
    )


def the_ascent_pass_reduces_nothing(rank):
    log = []

    def reduce(state, bucket):
        log.append("reduce")
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    for ways in ({}, {"backward": torch.Tensor.backward}):
        model = DistributedDataParallel(network())
        model.register_comm_hook(None, reduce)
        log.clear()

        def closure(model=model):
            log.append("forward")
            return loss(model, batch(0, rank))

        ASAM(model).backward(closure, **ways)
        assert log == ["forward", "forward", "reduce"]

    model = DistributedDataParallel(network())
    plain = collectives(lambda: loss(model, batch(0, rank)).backward())
    assert plain == ["c10d::allreduce_"]
    assert collectives(lambda: ASAM(model).backward(lambda: loss(model, batch(0, rank)))) == plain
    shared = collectives(lambda: ASAM(model, sync_ascent=True).backward(lambda: loss(model, batch(0, rank))))
    assert shared == 2 * plain


def collectives(run):
    for _ in range(2):  # in the second one the buckets are rebuilt
        run()
    with profile() as profiler:
        run()
    return [event.name for event in profiler.events() if event.name.startswith("c10d::")]


def replicas_stay_equal(rank):
    for sync_ascent, fast in ((False, False), (True, False), (False, True)):
        dtype = torch.float32 if fast else torch.float64
        model = DistributedDataParallel(network().to(dtype))
        asam = ASAM(model, sync_ascent=sync_ascent, compile=fast)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(50):  # a thousand are in test_long_run
            inputs, targets = batch(step, rank)
            data = (inputs.to(dtype), targets)
            asam.backward(lambda data=data, model=model: loss(model, data))
            optimizer.step()
            optimizer.zero_grad()
        for param in model.parameters():
            one, other = everywhere(param.detach())
            assert torch.equal(one, other)


def each_replica_climbs_on_its_own_batch(rank):
    for options in OPTIONS:
        for make in MAKERS if not options else MAKERS[:1]:
            assert_local(rank, make, DistributedDataParallel(network(), **options))


def the_wrapped_module_will_do(rank):
    for options in OPTIONS[:4]:
        model = DistributedDataParallel(network(), **options)
        assert_local(rank, lambda wrapper: ASAM(wrapper.module), model)


def assert_local(rank, make, model, backward=lambda asam, closure: asam.backward(closure)):
    """Three steps are those of one process that accumulates the micro-batches of both."""
    single = network()
    asam, reference = make(model), make(Same(single))
    for step in range(3):
        backward(asam, lambda step=step: loss(model, batch(step, rank)))
        for other in range(2):
            reference.backward(lambda step=step, other=other: loss(single, batch(step, other)) / 2)
        assert_near(gradients(model.module), gradients(single))
        descend(model)
        descend(single)
    assert_near(weights(model.module), weights(single))


class Same(nn.Module):
    """A wrapper for ``make`` that takes one."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def descend(model):
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= 0.1 * param.grad
            param.grad = None


def through(asam, closure):
    asam.backward(closure, backward=torch.Tensor.backward)


def by_hand(asam, closure):
    with nullcontext() if asam.sync_ascent else asam._model.no_sync():
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


WAYS = [through, by_hand, as_an_optimizer]


def every_way_climbs_on_its_own_batch(rank):
    for options in OPTIONS[:4]:
        for way in WAYS:
            assert_local(rank, ASAM, DistributedDataParallel(network(), **options), way)


def the_shared_ascent_is_that_of_the_whole_batch(rank):
    for options in OPTIONS:
        for make in MAKERS if not options else MAKERS[:1]:
            for way in [lambda asam, closure: asam.backward(closure), *WAYS]:
                if options.get("static_graph") and way in WAYS:
                    continue
                model, single = DistributedDataParallel(network(), **options), network()
                asam, reference = make(model, sync_ascent=True), make(single)
                for step in range(2):
                    way(asam, lambda step=step, model=model: loss(model, batch(step, rank)))
                    reference.backward(lambda step=step, single=single: loss(single, whole_batch(step)))
                    assert_near(gradients(model.module), gradients(single))
                    descend(model)
                    descend(single)


class Branches(nn.Module):
    """Each process has a branch of its own, and there is one for none."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x, branch):
        return self.branches[branch](x)


def parameters_that_one_process_uses(rank):
    torch.manual_seed(1)
    single = Branches().double()
    inputs = torch.randn(2, 4, 3, dtype=torch.float64)
    for view in (False, True):
        model = DistributedDataParallel(
            copy.deepcopy(single), find_unused_parameters=True, gradient_as_bucket_view=view
        )
        for sync_ascent in (False, True):
            ASAM(model, sync_ascent=sync_ascent).backward(lambda model=model: model(inputs[rank], rank).square().mean())
            if sync_ascent:
                ASAM(single).backward(lambda: sum(single(inputs[i], i).square().mean() for i in range(2)) / 2)
            else:
                for i in range(2):
                    ASAM(single).backward(lambda i=i: single(inputs[i], i).square().mean() / 2)
            assert_near(gradients(model.module), gradients(single))
            assert model.module.branches[2].weight.grad is None
            model.zero_grad()
            single.zero_grad()


def accumulation(rank):
    for options in OPTIONS[:4]:
        for sync_ascent in (False, True):
            model, single = DistributedDataParallel(network(), **options), network()
            asam, reference = ASAM(model, sync_ascent=sync_ascent), ASAM(single)
            for step in (0, 2):
                for micro in (step, step + 1):
                    with model.no_sync() if micro == step else nullcontext():
                        asam.backward(lambda micro=micro, model=model: loss(model, batch(micro, rank)))
                    if sync_ascent:
                        reference.backward(lambda micro=micro, single=single: loss(single, whole_batch(micro)))
                        continue
                    for i in range(2):
                        reference.backward(lambda m=micro, i=i, single=single: loss(single, batch(m, i)) / 2)
                assert_near(gradients(model.module), gradients(single))
                descend(model)
                descend(single)


def buffers_move_once(rank):
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    plain = copy.deepcopy(model.module)
    inputs = torch.randn(2, 5, 3)
    asam = ASAM(model)
    for _ in range(3):
        # the wrapper takes up the statistics of the first process before each forward pass
        state = {name: everywhere(buffer)[0] for name, buffer in plain.named_buffers()}
        plain.load_state_dict(state, strict=False)
        plain(inputs[rank])
        asam.backward(lambda: model(inputs[rank]).square().mean())
        assert_same(dict(model.module.named_buffers()), dict(plain.named_buffers()))


def weights_come_back_after_an_exception(rank):
    model, calls = DistributedDataParallel(network()), []
    before = weights(model)

    def closure():
        calls.append(None)
        value = loss(model, batch(0, rank))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return value

    asam = ASAM(model)
    with pytest.raises(KeyboardInterrupt):
        asam.backward(closure)
    assert_same(weights(model), before)
    assert_local(rank, lambda wrapper: ASAM(wrapper), model)


def what_cannot_work_says_so(rank):
    model = DistributedDataParallel(network(), static_graph=True)
    for way in (through, as_an_optimizer):
        with pytest.raises(RuntimeError, match="does not go with static_graph=True"):
            way(ASAM(model), lambda: loss(model, batch(0, rank)))
    assert_local(rank, ASAM, model)

    if torch.version.cuda and not torch.cuda.is_available():
        return  # torch itself asks for a driver for what follows
    half = _MixedPrecision(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must not use the mixed_precision of .*: use torch.autocast"):
        ASAM(DistributedDataParallel(network(), mixed_precision=half))
