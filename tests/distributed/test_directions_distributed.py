"""Directions and combinations over two processes: replicas stay equal, shards take the steps of one process."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import batch, everywhere, launch, loss, network, whole_batch
from slow_reference import assert_near, assert_same, gradients, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asam import ASAM, SAM, EconomicalASAM, Gradient, Momentum


@pytest.mark.slow
def test_two_processes(tmp_path):
    launch(
        tmp_path,
        2,
        replicas_take_the_steps_of_one_process,
        replicas_with_memories_of_their_own_stay_equal,
        replicas_look_at_w_together,
        replicas_whose_inputs_run_out,
        what_no_replica_uses_is_left_alone,
        each_process_has_a_share_of_its_own,
        what_replicas_cannot_do_says_so,
        shards_take_the_steps_of_one_process,
        shards_accumulate_as_one_process_does,
        shards_of_an_economical_training,
        shards_with_a_loss_scale,
        an_element_that_is_not_finite_counts_on_every_shard,
        shards_keep_weights_and_gradients_after_an_exception,
        checkpoint_of_a_sharded_memory,
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def surrogate(g00, g01, g11):
    return -0.4, 1 + 0.4 * g01 / g11


def stable(g00, g01, g11):
    return 0.0, (g00 / g11).sqrt()


WHOLE = {
    "the optimizer's momentum": lambda optimizer: {"direction": Momentum(optimizer)},
    "own momentum": lambda optimizer: {"direction": Momentum(decay=0.5)},
    "mean": lambda optimizer: {"direction": Gradient(mean=-1.0, decay=0.6), "sync_ascent": True},
    "surrogate": lambda optimizer: {"combine": surrogate, "sync_ascent": True},
    "stable": lambda optimizer: {"combine": stable, "sync_ascent": True},
    "both": lambda optimizer: {"direction": Gradient(0.4, 0.6), "combine": surrogate, "sync_ascent": True},
}


def whole(tensors):
    """By the names of one process, and whole where they are sharded."""
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in plain.items()}


def assert_equal_everywhere(tensors):
    for tensor in tensors:
        one, *others = everywhere(tensor.detach())
        assert all(torch.equal(one, other) for other in others)


def memory(asam):
    return asam.state_dict().get("mean", {})


def assert_like_one_process(rank, model, options, steps=6, backward=None, make=ASAM):
    single = flat()
    optimizer, reference_optimizer = sgd(model), sgd(single)
    asam, reference = make(model, rho=0.3, **options(optimizer)), make(single, rho=0.3, **options(reference_optimizer))
    for step in range(steps):
        value = asam.backward(lambda step=step: loss(model, batch(step, rank)), backward=backward)
        expected = reference.backward(lambda step=step: loss(single, whole_batch(step)))
        assert asam.loss_at == reference.loss_at
        dist.all_reduce(value)
        torch.testing.assert_close(value / 2, expected, rtol=1e-12, atol=1e-12)
        for each in (optimizer, reference_optimizer):
            each.step()
            each.zero_grad()
        assert_near(whole(weights(model)), weights(single), rtol=1e-12, atol=1e-12)
    if make is ASAM:
        assert_near(whole(memory(asam)), memory(reference), rtol=1e-11, atol=1e-12)
    return asam


def replicas_take_the_steps_of_one_process(rank):
    for name, options in WHOLE.items():
        for wrapped, backward in (
            ({}, None),
            ({}, torch.Tensor.backward),
            ({"gradient_as_bucket_view": True, "find_unused_parameters": True}, None),
        ):
            model = DistributedDataParallel(flat(), **wrapped)
            asam = assert_like_one_process(rank, model, options, 5, backward)
            assert_equal_everywhere(model.parameters())
            assert_equal_everywhere(memory(asam).values())
            assert bool(memory(asam)) == (name in ("own momentum", "mean", "both"))
        if "sync_ascent" not in options(None):
            assert_like_one_process(rank, DistributedDataParallel(flat(), static_graph=True), options)


def replicas_with_memories_of_their_own_stay_equal(rank):
    model = DistributedDataParallel(network())
    optimizer, asam = sgd(model), ASAM(model, rho=0.3, direction=Gradient(mean=-1.0, decay=0.6))
    for step in range(10):
        asam.backward(lambda step=step: loss(model, batch(step, rank)))
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_everywhere(model.parameters())
    one, other = everywhere(memory(asam)["head.weight"])
    assert not torch.equal(one, other)


def replicas_look_at_w_together(rank):
    torch.manual_seed(3)
    single = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    inputs = torch.randn(8, 2, 5, 3, dtype=torch.float64)
    for direction in (
        lambda optimizer: Momentum(optimizer, statistics_every=3),
        lambda _: Momentum(statistics_every=3),
    ):
        model = DistributedDataParallel(copy.deepcopy(single))
        optimizer = sgd(model)
        asam = ASAM(model, direction=direction(optimizer))
        for step in range(8):
            asam.backward(lambda step=step, model=model: model(inputs[step, rank]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        assert_equal_everywhere(model.parameters())
        assert model.module[1].num_batches_tracked == 4


def replicas_whose_inputs_run_out(rank):
    for make in (
        lambda model, optimizer: ASAM(model, direction=Momentum(optimizer)),
        lambda model, _: EconomicalASAM(model, steps=12),
    ):
        model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        optimizer = sgd(model)
        asam = make(model, optimizer)
        with model.join():
            for _ in range(3 + 9 * rank):
                asam.backward(lambda model=model: model(torch.randn(5, 3)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        assert_equal_everywhere(model.parameters())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.one, self.other = (nn.Linear(3, 1, dtype=torch.float64) for _ in range(2))

    def forward(self, x, both):
        return self.one(x) + (self.other(x) if both else 0)


def what_no_replica_uses_is_left_alone(rank):
    inputs = torch.ones(4, 3, dtype=torch.float64)  # the same for both
    for options in ({"combine": surrogate}, {"direction": Gradient(mean=1.0, decay=0.5)}, {}):
        asams = []
        for model, sync in ((Two(), False), (DistributedDataParallel(Two(), find_unused_parameters=True), True)):
            more = {"direction": copy.deepcopy(options["direction"])} if "direction" in options else options
            optimizer, asam = sgd(model), ASAM(model, sync_ascent=sync, **more)
            for both in (True, False, False):
                asam.backward(lambda model=model, both=both: (model(inputs, both) - 1).square().mean())
                unused = [param.grad for name, param in model.named_parameters() if "other" in name]
                assert both or unused == [None, None]
                optimizer.step()
                optimizer.zero_grad()
            asams.append(asam)
        single, replicas = asams
        params = [list(asam._params.values()) for asam in asams]
        torch.testing.assert_close(params[1], params[0], rtol=1e-12, atol=1e-12)
        if "direction" in options:
            assert_near(memory(replicas), memory(single), rtol=1e-12, atol=1e-12)


def each_process_has_a_share_of_its_own(rank):
    shares = 0.6, 1.4
    data = [batch(0, each) for each in range(2)]

    def weighted(model):
        return sum(share * loss(model, part) for share, part in zip(shares, data, strict=True)) / 2

    def damped(g00, g01, g11):
        return 0.3 / (1 + g00), 1.0

    for options in (
        {"direction": Gradient(mean=-1.0, decay=0.6)},
        {"direction": Momentum(decay=0.5)},
        {"combine": damped},
        {"combine": surrogate},
    ):
        for model in (DistributedDataParallel(flat()), sharded()):
            single = flat()
            more = {"sync_ascent": True} if isinstance(model, DistributedDataParallel) else {}
            asam, reference = ASAM(model, **copy.deepcopy(options), **more), ASAM(single, **copy.deepcopy(options))
            optimizer, reference_optimizer = sgd(model), sgd(single)
            for _ in range(4):
                asam.backward(
                    lambda model=model: loss(model, data[rank]),
                    backward=lambda value: (value * shares[rank]).backward(),
                )
                reference.backward(lambda single=single: weighted(single))
                for each in (optimizer, reference_optimizer):
                    each.step()
                    each.zero_grad()
            assert_near(whole(weights(model)), weights(single), rtol=1e-12, atol=1e-12)


def what_replicas_cannot_do_says_so(rank):
    model = DistributedDataParallel(network(), static_graph=True)
    with pytest.raises(RuntimeError, match=r"^an ascent pass that writes \.grad does not go with static_graph=True"):
        EconomicalASAM(model, steps=100).backward(lambda: loss(model, batch(0, rank)), backward=torch.Tensor.backward)
    message = "^combine under DistributedDataParallel needs sync_ascent=True: a combination"
    with pytest.raises(ValueError, match=message):
        SAM(DistributedDataParallel(network()), combine=surrogate)
    for options in ({"direction": Momentum()}, {"combine": surrogate, "sync_ascent": True}):
        model = DistributedDataParallel(network())
        asam = ASAM(model, **options)
        asam.backward(lambda model=model: loss(model, batch(0, rank)))
        before, earlier, remembered = weights(model), gradients(model), memory(asam)
        with pytest.raises(RuntimeError, match=r"^combine, and a Momentum with a memory of its own, need the gradient"):
            asam.backward(lambda model=model: loss(model, batch(1, rank)))
        assert_same(weights(model), before)
        assert_same(gradients(model), earlier)
        assert_same(memory(asam), remembered)
        model.zero_grad()
        asam.backward(lambda model=model: loss(model, batch(1, rank)))
    # against the optimizer's momentum, gradients may accumulate
    model, single = DistributedDataParallel(network()), network()
    optimizer, reference_optimizer = sgd(model), sgd(single)
    asam, reference = ASAM(model, direction=Momentum(optimizer)), ASAM(single, direction=Momentum(reference_optimizer))
    for step in range(4):
        with model.no_sync():
            asam.backward(lambda step=step: loss(model, batch(2 * step, rank)))
        asam.backward(lambda step=step: loss(model, batch(2 * step + 1, rank)))
        for part in (2 * step, 2 * step + 1):
            reference.backward(lambda part=part: loss(single, whole_batch(part)))
        for each in (optimizer, reference_optimizer):
            each.step()
            each.zero_grad()
        assert_near(whole(weights(model)), weights(single))


def flat():
    """A network whose every parameter has a dimension to be cut along."""
    model = network()
    model.temperature = nn.Parameter(model.temperature.detach().reshape(1))
    return model


def sharded(**options):
    model = flat()
    for module in (model.conv, model.head, model):
        fully_shard(module, **options)
    return model


def shards_take_the_steps_of_one_process(rank):
    for options in WHOLE.values():
        assert_like_one_process(rank, sharded(), options)
        assert_like_one_process(rank, sharded(reshard_after_forward=False), options, 3)


def shards_accumulate_as_one_process_does(rank):
    for options in WHOLE.values():
        model, single = sharded(), flat()
        optimizer, reference_optimizer = sgd(model), sgd(single)
        asam, reference = (ASAM(m, **options(o)) for m, o in ((model, optimizer), (single, reference_optimizer)))
        for step in range(3):
            for part in (2 * step, 2 * step + 1):
                asam.backward(lambda part=part, model=model: loss(model, batch(part, rank)))
                reference.backward(lambda part=part, single=single: loss(single, whole_batch(part)))
            for each in (optimizer, reference_optimizer):
                each.step()
                each.zero_grad()
            assert_near(whole(weights(model)), weights(single), rtol=1e-12, atol=1e-12)
        assert_near(whole(memory(asam)), memory(reference), rtol=1e-11, atol=1e-12)


def shards_of_an_economical_training(rank):
    model = sharded()
    asam = EconomicalASAM(model, steps=100, optimizer=sgd(model))
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match=r"with FSDP2, .*leave set_requires_gradient_sync\(True\)"):
        asam.backward(lambda: loss(model, batch(0, rank)))
    for options in (
        lambda optimizer: {"steps": 8},
        lambda optimizer: {"steps": 8, "optimizer": optimizer, "warmup": 2},
    ):
        assert_like_one_process(rank, sharded(), options, 8, make=EconomicalASAM)


def shards_with_a_loss_scale(rank):
    for options in WHOLE.values():
        model, plain = sharded(), sharded()
        optimizers = sgd(model), sgd(plain)
        asam, reference = (ASAM(m, **options(o)) for m, o in zip((model, plain), optimizers, strict=True))
        for step, scale in enumerate([3.0, 50.0, 0.2, 7.0]):
            asam.backward(
                lambda step=step, model=model: loss(model, batch(step, rank)),
                backward=lambda x, s=scale: (s * x).backward(),
            )
            reference.backward(lambda step=step, plain=plain: loss(plain, batch(step, rank)))
            for param in model.parameters():
                param.grad /= scale
            for each in optimizers:
                each.step()
                each.zero_grad()
        assert_near(whole(weights(model)), whole(weights(plain)), rtol=1e-12, atol=1e-12)


def an_element_that_is_not_finite_counts_on_every_shard(rank):
    for direction in (Gradient(mean=-1.0), Momentum()):
        model = nn.Linear(3, 4, bias=False).double()
        fully_shard(model)
        asam = SAM(model, direction=direction)
        inputs = torch.ones(2, 3, dtype=torch.float64)
        asam.backward(lambda model=model, inputs=inputs: model(inputs).square().mean())
        before = {name: value.to_local().clone() for name, value in memory(asam).items()}
        # of the last row, which lies in the second process
        factors = torch.tensor([1.0, 1.0, 1.0, torch.inf])
        asam.backward(lambda model=model, inputs=inputs, f=factors: (model(inputs) * f).sum())
        assert_same({name: value.to_local() for name, value in memory(asam).items()}, before)


def shards_keep_weights_and_gradients_after_an_exception(rank):
    for options in WHOLE.values():
        model = sharded()
        optimizer = sgd(model)
        asam = ASAM(model, **options(optimizer))
        for step in range(2):
            asam.backward(lambda step=step, model=model: loss(model, batch(step, rank)))
            optimizer.step()
        before, earlier = whole(weights(model)), whole(gradients(model))
        needed, calls = 2 if asam._direction.needs_ascent else 1, []

        def closure(model=model, needed=needed, calls=calls):
            calls.append(None)
            value = loss(model, batch(2, rank))
            if len(calls) == needed:
                raise KeyboardInterrupt
            return value

        with pytest.raises(KeyboardInterrupt):
            asam.backward(closure)
        assert_same(whole(weights(model)), before)
        assert_same(whole(gradients(model)), earlier)


def checkpoint_of_a_sharded_memory(rank):
    with tempfile.TemporaryDirectory() as folder:
        places = [folder]
        dist.broadcast_object_list(places)
        assert_resumes_from(rank, places[0])
        dist.barrier()


def assert_resumes_from(rank, folder):
    def trained(steps, model, optimizer, asam):
        for step in steps:
            asam.backward(lambda step=step: loss(model, batch(step, rank)))
            optimizer.step()
            optimizer.zero_grad()

    def parts():
        model = sharded()
        optimizer = sgd(model)
        return model, optimizer, ASAM(model, direction=Momentum(decay=0.5))

    first = parts()
    trained(range(3), *first)
    model, optimizer, asam = first
    dcp.save(
        {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "asam": asam.state_dict(),
        },
        checkpoint_id=folder,
    )

    second = parts()
    model, optimizer, asam = second
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "asam": asam.state_dict(),
    }
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    asam.load_state_dict(state["asam"])
    trained(range(3, 6), *first)
    trained(range(3, 6), *second)
    assert_same(whole(weights(second[0])), whole(weights(first[0])))
    assert_same(whole(memory(second[2])), whole(memory(first[2])))
