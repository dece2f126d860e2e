"""Which parameters are perturbed: by name, as tensors, or by one of the usual choices."""

import pytest
import torch
from slow_reference import applied, assert_near, assert_same, gradient, maximizer, shapes_problem, weights
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from asam import ASAM, norm_parameters, weight_parameters

CHOICES = {
    "names": lambda model: ["conv.weight", "temperature"],
    "tensors": lambda model: [model.conv.weight, model.temperature],
    "both": lambda model: ["conv.weight", model.temperature, model.conv.weight],
    "an iterator": lambda model: iter(["temperature", "conv.weight"]),
    "a set": lambda model: {model.conv.weight, model.temperature},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_chosen_are_perturbed_and_no_others(choice):
    model, closure = shapes_problem()
    w, g = weights(model), gradient(model, closure)
    chosen = [name for name in w if name in ("conv.weight", "temperature")]
    e = maximizer({name: w[name] for name in chosen}, {name: g[name] for name in chosen}, 0.5)

    _, at_perturbed = applied(ASAM(model, params=CHOICES[choice](model)), model, closure)

    assert_near(at_perturbed, {name: w[name] + e[name] if name in e else w[name] for name in w})
    assert all(torch.equal(at_perturbed[name], w[name]) for name in w if name not in e)
    # every parameter gets the gradient at w + e all the same
    assert all(param.grad is not None for param in model.parameters())


def test_a_tied_parameter_by_either_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    inputs = torch.randn(5, 3)
    seen = [
        applied(ASAM(model, params=[name]), model, lambda: model(inputs).square().mean())[1]
        for name in ("0.weight", "2.weight")
    ]
    assert_same(*seen)
    assert not torch.equal(seen[0]["0.weight"], model[0].weight)


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "checkpointed within": lambda model: nn.Sequential(checkpoint_wrapper(model[0]), *model[1:]),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_by_the_names_that_the_model_has_without_a_wrapper(wrap):
    wrapped = wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    own = [name for name, _ in wrapped.named_parameters()]
    assert "0.weight" not in own
    inputs = torch.randn(5, 3)
    for names in (["0.weight"], own[:1]):
        _, seen = applied(ASAM(wrapped, params=names), wrapped, lambda: wrapped(inputs).square().mean())
        moved = [not torch.equal(seen[name], value) for name, value in weights(wrapped).items()]
        assert moved == [True, False, False, False]


class LlamaRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class LayerNorm2d(nn.LayerNorm):
    pass


class ConvNorm(nn.Module):
    """Ends in Norm, but its convolution is none."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.bn = nn.BatchNorm2d(3)


class Normalize(nn.Linear):
    """No normalization layer, for all its name."""


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LayerNorm(4)
        self.one, self.two, self.three = nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.bare = nn.LayerNorm(4, elementwise_affine=False)
        self.sync = nn.SyncBatchNorm(4)
        self.rms, self.torch_rms = LlamaRMSNorm(4), nn.RMSNorm(4)
        self.flat = LayerNorm2d(4)
        self.block = ConvNorm()
        self.tied = nn.LayerNorm(4)
        self.tied.weight = self.layer.weight
        self.head, self.trap = nn.Linear(4, 2), Normalize(4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.gamma = nn.Parameter(torch.ones(4))


def names_of(model, params):
    names = {id(param): name for name, param in model.named_parameters()}
    return [names[id(param)] for param in params]


def test_norm_parameters():
    model = Everything()
    affine = ["layer", "one", "two", "three", "group", "instance", "sync", "flat", "block.bn"]
    expected = {f"{layer}.{kind}" for layer in affine for kind in ("weight", "bias")}
    expected |= {"rms.weight", "torch_rms.weight", "tied.bias"}
    names = names_of(model, norm_parameters(model))
    assert len(names) == len(set(names))
    assert set(names) == expected


def test_weight_parameters():
    model = Everything()
    names = names_of(model, weight_parameters(model))
    assert names == ["block.conv.weight", "head.weight", "trap.weight", "embedding.weight"]


def test_a_weight_without_a_shape_is_not_left_out_in_silence():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1))
    with pytest.raises(ValueError, match=r"^'1\.weight' has no shape yet: run a batch through the model first$"):
        weight_parameters(model)
    model(torch.ones(2, 2))
    assert names_of(model, weight_parameters(model)) == ["0.weight", "1.weight"]


def test_without_normalization_layers_there_is_nothing():
    assert norm_parameters(nn.Linear(2, 1)) == []
    with pytest.raises(ValueError, match="params leaves nothing to perturb"):
        ASAM(nn.Linear(2, 1), params=norm_parameters(nn.Linear(2, 1)))


class Named(nn.Module):
    """Parameters whose names hold 'bias' in some place; the loss has the gradient 1 in all of them."""

    def __init__(self):
        super().__init__()
        self.weighting, self.bias_net, self.attention = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Module()
        self.attention.in_proj_bias = nn.Parameter(torch.randn(3))
        self.biases = nn.Parameter(torch.randn(3))
        self.double()

    def forward(self):
        return sum(param.sum() for param in self.parameters())


@pytest.mark.parametrize("policy", ["unscaled", "scaled", "fixed"])
def test_biases_are_told_by_the_last_part_of_the_name(policy):
    model = Named()
    w = weights(model)
    assert list(w) == ["biases", "weighting.weight", "weighting.bias", "bias_net.weight", "attention.in_proj_bias"]
    biases = {"weighting.bias", "attention.in_proj_bias"}
    scales = {
        name: torch.full_like(value, {"unscaled": 1.0, "fixed": 0.0}[policy])
        if name in biases and policy != "scaled"
        else value.abs() + 0.01
        for name, value in w.items()
    }
    length = torch.cat([scale.flatten() for scale in scales.values()]).norm()
    _, at_perturbed = applied(ASAM(model, bias=policy), model, model)
    assert_near(at_perturbed, {name: w[name] + 0.5 * scales[name] ** 2 / length for name in w})


class Elsewhere(nn.Module):
    """A parameter that no layer holds, and that its methods show."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        vars(self)["factor"] = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.layer(x) * self.factor

    def named_parameters(self, *arguments, **options):
        yield from super().named_parameters(*arguments, **options)
        yield "factor", self.factor

    def parameters(self, recurse=True):
        return (param for _, param in self.named_parameters(recurse=recurse))


@pytest.mark.parametrize("params", [None, ["layer.weight"]])
def test_a_parameter_that_only_the_models_own_methods_show(params):
    model, inputs = Elsewhere(), torch.randn(8, 4)
    asam = ASAM(model, params=params)

    def loss():
        return model(inputs).square().mean()

    def within():
        loss().backward()
        with asam.perturbed():
            loss().backward()

    found = []
    for way in (
        lambda: asam.backward(loss),
        lambda: asam.backward(loss, backward=torch.Tensor.backward),
        within,
    ):
        for param in model.parameters():
            param.grad = None
        way()
        found.append({name: param.grad for name, param in model.named_parameters()})
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
