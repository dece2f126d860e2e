"""Small trainings in which a direction or a combination is at work."""

import torch
from slow_reference import shapes_problem
from torch import nn

from asam import ASAM, Gradient, Momentum

DIRECTIONS = {
    "away from the mean": lambda optimizer: Gradient(mean=-1.0, decay=0.6),
    "towards the mean": lambda optimizer: Gradient(0.4, 0.6, decay=0.6),
    "own momentum": lambda optimizer: Momentum(decay=0.5),
    "the optimizer's momentum": Momentum,
}
REMEMBERING = list(DIRECTIONS)[:3]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Training:
    """A network with parameters of every shape, four batches in turn, an optimizer and an ASAM."""

    def __init__(self, direction=None, base=sgd, dtype=torch.float64, **options):
        self.model, _ = shapes_problem(dtype)
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(4, 6, 2, 5, 5, generator=generator).to(dtype)
        self.targets = torch.randint(3, (4, 6), generator=generator)
        self.optimizer = base(self.model.parameters())
        if direction is not None:
            options["direction"] = DIRECTIONS[direction](self.optimizer)
        self.asam = ASAM(self.model, **{"rho": 0.3, **options})

    def loss(self, step, part=slice(None)):
        logits = self.model(self.inputs[step % 4, part])
        return nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), self.targets[step % 4, part]
        )

    def step(self, step, **arguments):
        loss = self.asam.backward(lambda: self.loss(step), **arguments)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def memory(self):
        return remembered(self.asam)


class Reversible(torch.autograd.Function):
    """A layer that is run again in the backward pass, by hand."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), grad)
        return x.grad, None


def remembered(asam):
    """The means that there are."""
    return {name: value for name, value in asam.state_dict()["mean"].items() if not value.isnan().all()}


def add_(model, perturbations, factor=1):
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in perturbations:
                param.add_(perturbations[name], alpha=factor)
