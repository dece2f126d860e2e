"""Sums over shards, in groups of this process alone: what several add up is in the tests of directions."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from asam.sharding import Unsharded, summed


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_each_layout_is_added_up_once(group, monkeypatch):
    reduced = []
    real = dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda total, group: (reduced.append(total.clone()), real(total, group=group))
    )
    values = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])]
    total = summed(values, [(group,), (), (group,)])
    assert total.tolist() == [111.0, 222.0]
    assert [part.tolist() for part in reduced] == [[101.0, 202.0]]


def test_modules_that_keep_no_state_are_left_alone():
    unsharded = Unsharded(nn.Linear(1, 1))
    unsharded.modules = [nn.Linear(1, 1)]  # of a torch whose FSDPModule has no reset_iter_state
    unsharded.abort()
