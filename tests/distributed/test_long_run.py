"""Two replicas after a thousand steps in float32, each of which ran at two points of its own."""

import pytest
import torch
from processes import everywhere, launch
from slow_reference import weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from asam import ASAM

STEPS = 1000

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_a_thousand_steps(tmp_path):
    launch(tmp_path, 2, replicas_with_batch_norm_stay_equal)


@pytest.mark.slow
def test_a_thousand_steps_of_four(tmp_path):
    launch(tmp_path, 4, replicas_with_batch_norm_stay_equal)


def replicas_with_batch_norm_stay_equal(rank):
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    asam, generator = ASAM(model, rho=0.5), torch.Generator().manual_seed(rank)
    seen, start = [], weights(model)
    for step in range(STEPS):
        inputs, targets = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)

        def closure(step=step, inputs=inputs, targets=targets):
            if step == STEPS - 1:
                seen.append(model.module[0].weight.detach().clone())
            return nn.functional.cross_entropy(model(inputs), targets)

        asam.backward(closure)
        optimizer.step()
        optimizer.zero_grad()

    first, *others = everywhere(seen[1])
    assert not any(torch.equal(first, other) for other in others)
    for name, param in model.named_parameters():
        first, *others = everywhere(param.detach())
        assert all(torch.equal(first, other) for other in others), name
        assert not torch.equal(param, start[name])
    # the wrapper hands out the first one's statistics before a forward pass, those of the ascent pass
    mine = {name: everywhere(buffer)[0] for name, buffer in model.module.named_buffers()}
    model.eval()
    model(torch.zeros(1, 6))
    for name, buffer in model.module.named_buffers():
        first, *others = everywhere(buffer)
        assert torch.equal(first, mine[name])
        assert all(torch.equal(first, other) for other in others), name
    assert model.module[1].num_batches_tracked == STEPS
