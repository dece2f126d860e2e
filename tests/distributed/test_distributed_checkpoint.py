"""Checkpoints of torch.distributed.checkpoint: they hold w, and training goes on from them on any number of processes.

``asam.state_dict()`` lies beside the model's and the optimizer's; what changes in it is rho, by a schedule here.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import batch, launch, loss, whole_batch
from slow_reference import assert_near, assert_same, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asam import ASAM

HALFWAY, END = 3, 6

# torch says so of every checkpoint that one process reads or writes
single_process = pytest.mark.filterwarnings("ignore:torch.distributed is .*unavailable or uninitialized")


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(45, 3)).double()


def sharded(seed=1, **options):
    model = network(seed)
    for module in (model[0], model[3], model):
        fully_shard(module, **options)
    return model


class Training:
    def __init__(self, model, data):
        self.model, self.data, self.step = model, data, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.asam = ASAM(model, rho=1.0, normalization="layerwise")

    def closure(self):
        return loss(self.model, self.data(self.step))

    def run(self, end):
        while self.step < end:
            self.asam.backward(self.closure)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.asam.rho *= 0.8
            self.step += 1
        return self

    def state(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "asam": self.asam.state_dict(), "step": self.step}

    def save(self, folder):
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.asam.load_state_dict(state["asam"])
        self.step = state["step"]
        return self

    def whole(self):
        """The weights, gathered, by the names of one process."""
        named = {name.removeprefix("module."): w for name, w in weights(self.model).items()}
        return {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in named.items()}


def alone(seed=1, count=2):
    return Training(network(seed), lambda step: whole_batch(step, count))


def here(make):
    """The same training in every process, each with its own batch."""
    return lambda seed=1: Training(make(seed), lambda step: batch(step, dist.get_rank()))


class Check:
    """A check that gets a folder and more, besides the rank."""

    def __init__(self, check, *arguments):
        self.check, self.arguments, self.__name__ = check, arguments, check.__name__

    def __call__(self, rank):
        self.check(*self.arguments, rank)


@single_process
@pytest.mark.fsdp2
def test_two_shards(tmp_path):
    alone().run(HALFWAY).save(tmp_path / "of-one")
    launch(
        tmp_path,
        2,
        Check(shards_go_on_to_the_bit, tmp_path, (2,)),
        Check(two_go_on_from_one, tmp_path),
        Check(what_is_saved_is_w, tmp_path, (2,)),
        Check(replicas_go_on_to_the_bit, tmp_path),
    )
    one_goes_on_from(tmp_path, 2)


@single_process
@pytest.mark.slow
@pytest.mark.fsdp2
def test_replicas_of_shards(tmp_path):
    launch(tmp_path, 4, Check(shards_go_on_to_the_bit, tmp_path, (2, 2)), Check(what_is_saved_is_w, tmp_path, (2, 2)))
    one_goes_on_from(tmp_path, 4)


def hybrid(shape):
    names = ("replicate", "shard")[-len(shape) :]
    return here(lambda seed: sharded(seed, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names)))


def shards_go_on_to_the_bit(folder, shape, rank):
    make = hybrid(shape)
    expected = make().run(END).whole()
    training = make().run(HALFWAY)
    training.save(folder / "halfway")
    assert_same(make().run(END).whole(), expected)  # nothing but the seed decides
    fresh = make(2)
    assert not torch.equal(fresh.whole()["3.weight"], training.whole()["3.weight"])
    fresh.load(folder / "halfway")
    assert fresh.asam.rho == training.asam.rho == pytest.approx(0.8**HALFWAY)
    assert_same(fresh.whole(), training.whole())
    assert_same(fresh.run(END).whole(), expected)
    if rank == 0:
        torch.save(expected, folder / "end.pt")


def two_go_on_from_one(folder, rank):
    assert_near(hybrid((2,))(2).load(folder / "of-one").run(END).whole(), torch.load(folder / "end.pt"))


def one_goes_on_from(folder, count):
    training = alone(2, count).load(folder / "halfway")
    assert training.step == HALFWAY
    assert_near(training.run(END).whole(), torch.load(folder / "end.pt"))


def what_is_saved_is_w(folder, shape, rank):
    make = hybrid(shape)
    training = make().run(HALFWAY)
    before, calls = training.whole(), []

    def closure():
        calls.append(training.whole())
        value = training.closure()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return value

    def step_and_save():
        try:
            training.asam.backward(closure)
        finally:
            training.save(folder / "interrupted")

    with pytest.raises(KeyboardInterrupt):
        step_and_save()
    assert not torch.equal(calls[1]["3.weight"], before["3.weight"])
    assert_same(make(2).load(folder / "interrupted").whole(), before)
    # the shards go on
    training.model.zero_grad()
    assert_same(training.run(END).whole(), make().run(END).whole())

    # it is written while the next steps move the weights, in a group of its own: else its messages mix with theirs
    training, group = make().run(HALFWAY), dist.new_group()
    writing = dcp.async_save(training.state(), checkpoint_id=folder / "meanwhile", process_group=group)
    training.run(END)
    writing.result()
    assert_same(make(2).load(folder / "meanwhile").whole(), before)


def replicas_go_on_to_the_bit(folder, rank):
    make = here(lambda seed: DistributedDataParallel(network(seed)))
    expected = make().run(END).whole()
    make().run(HALFWAY).save(folder / "replicas")
    assert_same(make(2).load(folder / "replicas").run(END).whole(), expected)
