"""A model whose shards are uneven, the ways to take a step, and one process to compare with."""

import torch
from processes import batch, loss, whole_batch
from slow_reference import assert_near, gradients, weights
from torch import nn
from torch.distributed.fsdp import fully_shard

from asam import SharpnessAwareOptimizer

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
