"""The formulas of the paper once more, element by element, with nothing of the package in them."""

import math

import torch
from torch import nn


def is_bias(name):
    return name.split(".")[-1].endswith("bias")


def scale(name, w, normalization, eta, bias):
    if is_bias(name) and bias == "unscaled":
        return torch.ones_like(w)
    if is_bias(name) and bias == "fixed":
        return torch.zeros_like(w)
    if callable(normalization):
        return torch.ones_like(w) * normalization(w)
    if normalization == "none":
        return torch.ones_like(w)
    if normalization == "layerwise":
        return torch.full_like(w, length(w) + eta)
    if normalization == "filterwise" and w.ndim >= 2:
        return torch.stack([torch.full_like(row, length(row) + eta) for row in w])
    return torch.tensor([abs(x) + eta for x in w.flatten().tolist()], dtype=w.dtype).view(w.shape)


def length(w):
    return math.sqrt(sum(x * x for x in w.flatten().tolist()))


def maximizer(params, grads, rho, normalization="elementwise", p=2, eta=0.01, bias="unscaled"):
    """argmax <g, e> over ||T^-1 e||_p <= rho."""
    scales = {name: scale(name, w.detach(), normalization, eta, bias) for name, w in params.items()}
    scaled = {name: scales[name] * grads[name] for name in params}
    if p == math.inf:
        return {name: rho * scales[name] * scaled[name].sign() for name in params}
    q = p / (p - 1)
    dual_norm = sum(abs(x) ** q for tensor in scaled.values() for x in tensor.flatten().tolist()) ** (1 / q)
    return {
        name: rho * scales[name] * tensor.sign() * (tensor.abs() / dual_norm) ** (q - 1)
        for name, tensor in scaled.items()
    }


def norm(params, perturbations, normalization="elementwise", p=2, eta=0.01, bias="unscaled"):
    """||T^-1 e||_p, over the elements that T allows to move."""
    units = []
    for name, w in params.items():
        scales = scale(name, w.detach(), normalization, eta, bias).flatten().tolist()
        for s, e in zip(scales, perturbations[name].flatten().tolist(), strict=True):
            assert s > 0 or e == 0
            units.append(abs(e) / s if s > 0 else 0.0)
    return max(units) if p == math.inf else sum(u**p for u in units) ** (1 / p)


class Shapes(nn.Module):
    """A network with parameters of every shape: 4-D, 2-D, 1-D, biases, no dimension at all; two weights are 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        with torch.no_grad():
            self.conv.weight[0, 0, 0, 0] = 0
            self.head.weight[1, 2] = 0
            self.norm.bias.normal_()
            self.norm.weight.normal_(1, 0.3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.conv(x)).mean((2, 3)))) * self.temperature


def shapes_problem(dtype=torch.float64):
    """A :class:`Shapes` and a closure that gives its loss."""
    torch.manual_seed(1)
    model = Shapes().to(dtype)
    inputs, targets = torch.randn(6, 2, 5, 5, dtype=dtype), torch.randint(3, (6,))
    return model, lambda: nn.functional.cross_entropy(model(inputs), targets)


def weights(model):
    """A copy of the parameters by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def gradients(model):
    """A copy of ``.grad`` by name, None where there is none."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def gradient(model, closure):
    """The gradient of the closure by name, ``.grad`` untouched."""
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(closure(), params), strict=True))


def applied(asam, model, closure, **arguments):
    """The weights that the closure sees at its calls, while ``asam.backward`` runs it."""
    seen = []

    def watched():
        seen.append(weights(model))
        return closure()

    asam.backward(watched, **arguments)
    return seen


def assert_same(actual, expected):
    """The same names, and tensors equal to the bit."""
    assert list(actual) == list(expected)
    for name in expected:
        assert (actual[name] is None) == (expected[name] is None), name
        assert expected[name] is None or torch.equal(actual[name], expected[name]), name


def assert_near(actual, expected, rtol=1e-12, atol=1e-14):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
