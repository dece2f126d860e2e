"""Matrices with a known spectrum, small networks, and their Hessians by ``torch.func``."""

import copy
import types
import warnings

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

# forward mode loads it at its first use, and it calls torch.jit.script, which is deprecated
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch._decomp import decompositions_for_jvp  # noqa: F401


class Matrix:
    """A dense symmetric matrix as an operator that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, tuple(matrix.shape), matrix.dtype, matrix.device
        self.matvecs = 0

    def matvec(self, vector):
        self.matvecs += 1 if vector.ndim == 1 else vector.shape[1]
        return self.matrix @ vector


def with_spectrum(eigenvalues, seed=0):
    """A random matrix with these eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = q * values @ q.T
    return (matrix + matrix.T) / 2


class Chain(nn.Module):
    """The product of its weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in weights])

    def forward(self, target):
        product = torch.ones((), dtype=torch.float64)
        for weight in self.weights:
            product = product * weight
        return product.expand_as(target)


def chain_loss(model, target):
    """Half the squared distance of a chain to its target."""
    return 0.5 * (model(target) - target).square().mean()


def mlp(activation=nn.Tanh, dtype=torch.float64):
    """A network of 31 parameters for `examples`."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3)).to(dtype)


def examples(dtype=torch.float64, n=12):
    """Inputs of three features and their classes."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (n,), generator=generator)


def cross_entropy(model, batch):
    """The loss and the 0-1 error of a classifier."""
    logits = model(batch[0])
    error = (logits.argmax(-1) != batch[1]).to(logits.dtype).mean()
    return nn.functional.cross_entropy(logits, batch[1]), {"error": error}


def loss_only(model, batch):
    """The loss of a classifier."""
    return cross_entropy(model, batch)[0]


def layer_norm(self, x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def dense_hessian(model, loss_fn, batch, names=None):
    """The Hessian of the loss on one batch, over the parameters of these names, by forward over reverse mode."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # forward over reverse mode through torch's own is wrong, not symmetric
            module.forward = types.MethodType(layer_norm, module)
    params = {
        name: p.detach()
        for name, p in model.named_parameters()
        if (p.requires_grad if names is None else name in names)
    }

    def loss(flat):
        parts = flat.split([p.numel() for p in params.values()])
        moved = {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}
        return loss_fn(lambda *inputs: functional_call(model, moved, inputs), batch)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.hessian(loss)(torch.cat([p.reshape(-1) for p in params.values()]))


def columns(operator):
    """The operator as a matrix, a product at a time."""
    eye = torch.eye(operator.shape[0], dtype=operator.dtype)
    return torch.stack([operator.matvec(column) for column in eye], dim=1)
