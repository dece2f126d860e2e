"""Losses whose sharpness has a closed form, and the exact maximum of a quadratic on a ball."""

import itertools
import math

import torch
from torch import nn

from asam.measure import Objective

NOTHING = [torch.zeros(1, 1)]  # data for a loss that needs none


def rms(w):
    return w.square().mean().sqrt() + 0.1


SCHEMES = {
    "elementwise": "elementwise",
    "filterwise": "filterwise",
    "layerwise": "layerwise",
    "none": "none",
    "callable": rms,
}


SHAPES = {"kernel": (2, 2, 1, 2), "weight": (3, 2), "gain": (), "bias": (2,)}


class Quadratic(nn.Module):
    """``g'd + d'Hd/2`` with d the distance from the first weights, over parameters of several shapes."""

    SIZE = 17

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.first = self.flat().detach().clone()
        self.gradient = torch.zeros_like(self.first)
        self.hessian = torch.zeros(self.SIZE, self.SIZE, dtype=dtype)

    def flat(self):
        return torch.cat([param.reshape(-1) for param in self.parameters()])

    def forward(self):
        d = self.flat() - self.first
        return self.gradient @ d + d @ self.hessian @ d / 2

    def objective(self):
        return Objective(self, lambda model, batch: model(), NOTHING)

    def scales(self, geometry):
        """T, the diagonal as a vector."""
        scales = geometry.scales({name: param.detach() for name, param in self.named_parameters()})
        return torch.cat([scale.reshape(-1) for scale in scales.values()])


def in_units(geometry, values, gradient, seed=0):
    """A quadratic with ``THT = Q diag(values) Q'`` and ``Tg = Q gradient``; returns it, THT and Tg."""
    model = Quadratic(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    q = torch.linalg.qr(torch.randn(model.SIZE, model.SIZE, generator=generator, dtype=torch.float64)).Q
    a, c, t = q * values @ q.T, q @ gradient, model.scales(geometry)
    inverse = torch.where(t > 0, 1 / t, 0)
    model.hessian, model.gradient = (a + a.T) / 2 * inverse * inverse[:, None], c * inverse
    return model, t * model.hessian * t[:, None], t * model.gradient


def highest(hessian, gradient, rho):
    """The maximum of ``g'u + u'Hu/2`` on ``||u||_2 <= rho``, and a bound that no point of the ball exceeds."""
    values, vectors = torch.linalg.eigh(hessian)
    return highest_along_axes(values, vectors.T @ gradient, rho)


def highest_along_axes(values, gradient, rho):
    """The same for an H of these eigenvalues, from the gradient along the eigenvectors.

    It is the minimum over mu > max(lambda_max, 0) of the convex ``mu rho^2/2 + g'(mu I - H)^-1 g/2``, which is
    reached at lambda_max in the hard case and at 0 where the maximum lies inside.
    """
    c = gradient.square()
    top = max(float(values.max()), 0.0)
    gaps, c = (top - values)[c > 0], c[c > 0]
    low, high = 0.0, float(gradient.norm()) / rho
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (c / (gaps + middle) ** 2).sum() > rho**2 else (low, middle)
    return float((top + high) * rho**2 / 2 + (c / (gaps + high)).sum() / 2)


class Chain(nn.Module):
    """``(prod w_i - y)^2 / 2`` at its minimum, with the factors of the product as given up to their common size."""

    Y = 1.5

    def __init__(self, factors):
        super().__init__()
        common = (self.Y / math.prod(factors)) ** (1 / len(factors))
        for i, factor in enumerate(factors):
            self.register_parameter(f"w{i}", nn.Parameter(torch.tensor(factor * common, dtype=torch.float64)))

    def forward(self):
        return (torch.stack(list(self.parameters())).prod() - self.Y) ** 2 / 2

    def objective(self):
        return Objective(self, lambda model, batch: model(), NOTHING)


CHAINS = {
    "two": (1.0, 1.0),
    "two, rescaled": (100.0, 0.01),
    "three": (1.0, 1.0, 1.0),
    "three, rescaled": (0.02, 7.0, 30.0),
    "five, rescaled": (1.0, 0.5, 20.0, 3.0, 1e-3),
}


class Net(nn.Module):
    """A ReLU network with biases, in float64."""

    def __init__(self, seed=0, sizes=(4, 6, 5, 3), dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64).mul(0.6).to(dtype)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

    def rescale(self, per_neuron=True, seed=3):
        """Multiply what enters each hidden neuron (or layer) and divide what leaves it: the function stays."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer, after in itertools.pairwise(self.layers):
                count = layer.out_features if per_neuron else 1
                factors = torch.exp(torch.randn(count, generator=generator, dtype=torch.float64) * 1.5)
                layer.weight.mul_(factors[:, None])
                layer.bias.mul_(factors)
                after.weight.div_(factors)
        return self


def examples(n=12, seed=5, inputs=4, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def batches(data, *sizes):
    """Tensors cut along their first dimension into batches of the given sizes."""
    return list(zip(*(tensor.split(list(sizes)) for tensor in data), strict=True))


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def net_objective(model=None, data=None, **arguments):
    return Objective(model or Net(), cross_entropy, [data or examples()], **arguments)
