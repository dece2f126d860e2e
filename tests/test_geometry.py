"""The ball: its scales, its norm and its maximizer, as Geometry gives them and as ASAM applies them."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from slow_reference import (
    applied,
    assert_near,
    assert_same,
    gradient,
    maximizer,
    norm,
    scale,
    shapes_problem,
    weights,
)

from asam import ASAM, SAM, Geometry


def rms(w):
    return w.square().mean().sqrt() + 0.1


def rows(w):
    return w.abs().amax(dim=tuple(range(1, w.ndim)), keepdim=True) + 0.2 if w.ndim > 1 else 0.5


SCHEMES = ["elementwise", "filterwise", "layerwise", "none", rms, rows]
SETTINGS = [
    {"normalization": normalization, "p": p, "eta": eta, "bias": bias}
    for normalization, p, eta, bias in itertools.product(
        SCHEMES, [1.5, 2, 3, math.inf], [0.0, 0.01], ["unscaled", "scaled", "fixed"]
    )
]
BLOCKS = {"whole": 2**17, "sliced": 7}
RHO = 0.3


def label(setting):
    normalization = setting["normalization"]
    name = normalization if isinstance(normalization, str) else normalization.__name__
    return f"{name}-p{setting['p']}-eta{setting['eta']}-{setting['bias']}"


@pytest.fixture(params=BLOCKS)
def block(request, monkeypatch):
    """Blocks that hold everything, and blocks so small that tensors are cut."""
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", BLOCKS[request.param])


def mappings(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (3, 2, 2, 2), "fc.weight": (4, 3), "norm.weight": (5,), "fc.bias": (4,), "gain": ()}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_maximizer_is_the_papers(setting):
    params, grads = mappings(0), mappings(1)
    params["fc.weight"][0, 0] = 0
    grads["fc.weight"][1, 1] = 0

    e = Geometry(**setting).maximizer(params, grads, RHO)

    assert_near(e, maximizer(params, grads, RHO, **setting))
    assert norm(params, e, **setting) == pytest.approx(RHO, rel=1e-12)
    assert Geometry(**setting).norm(params, e).item() == pytest.approx(RHO, rel=1e-12)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "none"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_another_precision_are_neither_rounded_nor_written_to(kind, normalization):
    params, grads = mappings(0, torch.float32), mappings(1)
    grads = {name: (1e-6 * grad).to(kind) for name, grad in grads.items()}  # what float16 holds in a few bits
    before = {name: grad.clone() for name, grad in grads.items()}

    e = Geometry(normalization).maximizer(params, grads, RHO)

    assert_same(grads, before)
    exact = [{name: tensor.double() for name, tensor in tensors.items()} for tensors in (params, grads)]
    expected = Geometry(normalization).maximizer(*exact, RHO)
    for name, value in e.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-6, atol=0)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_what_asam_applies_is_the_papers(setting):
    model, closure = shapes_problem()
    w = weights(model)
    e = maximizer(w, gradient(model, closure), RHO, **setting)

    at_w, at_perturbed = applied(ASAM(model, rho=RHO, **setting), model, closure)

    assert_same(at_w, w)
    # w + e is rounded once: an error of 1e-16 of the larger of the two
    assert_near(at_perturbed, {name: w[name] + e[name] for name in w})
    assert_same(weights(model), w)


@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_scales(setting):
    params = mappings(0)
    setting = {name: value for name, value in setting.items() if name != "p"}
    expected = {name: scale(name, w, **setting) for name, w in params.items()}
    assert_near(Geometry(**setting).scales(params), expected)
    assert all(s.shape == params[name].shape for name, s in Geometry(**setting).scales(params).items())


@pytest.mark.usefixtures("block")
def test_sam_is_asam_without_normalization():
    model, closure = shapes_problem()
    e = maximizer(weights(model), gradient(model, closure), 0.05, normalization="none")
    _, at_perturbed = applied(SAM(model, rho=0.05), model, closure)
    assert_near(at_perturbed, {name: w + e[name] for name, w in weights(model).items()})


@pytest.mark.parametrize("p", [1.2, 1.5, 2, 3, 8, math.inf])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise", "none"])
def test_maximizer_beats_the_ball(normalization, p):
    ball = Geometry(normalization, p=p, eta=0.0, bias="scaled")
    params, grads = mappings(0), mappings(1)
    best = gain(grads, ball.maximizer(params, grads, RHO))
    scales = ball.scales(params)
    generator = torch.Generator().manual_seed(2)
    for i in range(200):
        # from all over the ball's surface, and from close to the maximizer
        width = 10.0 ** -(i % 5)
        e = {
            name: value * (i % 5 > 0)
            + width * scales[name] * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for name, value in ball.maximizer(params, grads, RHO).items()
        }
        size = ball.norm(params, e)
        assert gain(grads, {name: value * (RHO / size) for name, value in e.items()}) <= best * (1 + 1e-12)
    # the bound of Hoelder's inequality, rho ||Tg||_q, is reached
    q = 1 if p == math.inf else p / (p - 1)
    dual = torch.linalg.vector_norm(torch.cat([(scales[n] * grads[n]).flatten() for n in grads]), q)
    assert best.item() == pytest.approx(RHO * dual.item(), rel=1e-12)


def gain(grads, e):
    return sum((grads[name] * e[name]).sum() for name in grads)


@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
@pytest.mark.parametrize("factor", [1e-28, 1e-35, 1e28, 1e30])
def test_maximizer_does_not_depend_on_the_size_of_the_gradient(factor, p):
    params, grads = mappings(0, torch.float32), mappings(1, torch.float32)
    scaled = {name: grad * factor for name, grad in grads.items()}
    assert_near(
        Geometry(p=p).maximizer(params, scaled, RHO), Geometry(p=p).maximizer(params, grads, RHO), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("number", [np.float32, np.float16, Fraction, int])
def test_rho_may_be_any_kind_of_number(number):
    params, grads = {"weight": torch.tensor([3.0, 1.0])}, {"weight": torch.tensor([1.0, 4.0])}
    e = Geometry(eta=0.0).maximizer(params, grads, number(1))["weight"]
    torch.testing.assert_close(e, torch.tensor([1.8, 0.8]))


@pytest.mark.parametrize("rho", [1e-30, 1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("factor", [10.0**power for power in range(-32, 33, 8)])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "none"])
def test_maximizer_of_any_size_in_float32(normalization, factor, rho):
    # one block of ordinary size, one of a thousandth of it, and one that stands still
    params, grads = mappings(0, torch.float32), mappings(1, torch.float32)
    for name, share in (("large.weight", 1e-3), ("still.weight", 0.0)):
        params[name] = torch.randn(150, 200)
        grads[name] = torch.randn(150, 200) * share
    grads = {name: grad * factor for name, grad in grads.items()}
    in_float64 = ({name: tensor.double() for name, tensor in tensors.items()} for tensors in (params, grads))
    exact = Geometry(normalization).maximizer(*in_float64, rho)
    for name, e in Geometry(normalization).maximizer(params, grads, rho).items():
        assert (e - exact[name]).abs().max() <= 1e-6 * exact[name].abs().max(), name


@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_gradient_gives_zero(dtype, p):
    params = mappings(0, dtype)
    zeros = {name: torch.zeros_like(w) for name, w in params.items()}
    assert_same(Geometry(p=p).maximizer(params, zeros, RHO), zeros)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
def test_non_finite_gradient_gives_a_non_finite_perturbation(p, value):
    params, grads = mappings(0), mappings(1)
    grads["norm.weight"][3] = value
    e = Geometry(p=p).maximizer(params, grads, RHO)
    assert all(tensor.isnan().all() for tensor in e.values())


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("p", [1.5, 2, 3, math.inf])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise"])
def test_half_precision_is_rounded_once(dtype, unit, p, normalization):
    model, _ = shapes_problem()
    model.to(dtype)
    names = [name for name, _ in model.named_parameters()]
    w = {name: param.double() for name, param in weights(model).items()}
    # small gradients: their products with the weights underflow in float16
    g = {name: (torch.randn_like(value) * 1e-3).to(dtype) for name, value in w.items()}
    e = maximizer(w, {name: grad.double() for name, grad in g.items()}, RHO, normalization, p=p)
    seen = []

    def closure():
        seen.append(weights(model))
        return sum((g[name] * param).float().sum() for name, param in model.named_parameters())

    ASAM(model, rho=RHO, p=p, normalization=normalization).backward(closure)

    assert names == list(seen[1])
    # one rounding to nearest: half a unit in the last place, 1e-5 for float32; half the smallest subnormal near 0
    for name in names:
        error = (seen[1][name].double() - (w[name] + e[name])).abs()
        assert (error <= (unit + 1e-5) * (w[name] + e[name]).abs() + 2**-25 + 1e-5 * e[name].abs()).all(), name


def test_norms_of_tiny_and_huge_weights():
    for factor in (1e-30, 1e30):
        w = {"a.weight": torch.full((3, 4), factor)}
        for normalization, length in (("layerwise", math.sqrt(12)), ("filterwise", 2.0)):
            scales = Geometry(normalization, eta=0.0).scales(w)["a.weight"]
            torch.testing.assert_close(scales, torch.full((3, 4), length * factor), rtol=1e-6, atol=0)
    rows = torch.tensor([[1e-30], [1e30]]).expand(2, 4)
    scales = Geometry("filterwise", eta=0.0).scales({"a.weight": rows})["a.weight"]
    torch.testing.assert_close(scales, 2 * rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise", "none"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scales_are_like_their_parameters(dtype, shape, normalization):
    scale = Geometry(normalization).scales({"a.weight": torch.ones(shape, dtype=dtype)})["a.weight"]
    assert (scale.shape, scale.dtype) == (shape, dtype)


def exact_norm(tensor):
    return math.sqrt(sum(chunk.double().square().sum().item() for chunk in tensor.split(100)))


def test_norm_of_a_large_float32_tensor():
    generator = torch.Generator().manual_seed(0)
    params = {"weight": torch.full((5000, 8000), 0.5)}
    grads = {"weight": torch.rand((5000, 8000), generator=generator)}
    e = Geometry("none").maximizer(params, grads, RHO)
    assert exact_norm(e["weight"]) == pytest.approx(RHO, rel=1e-5)
    assert Geometry("none").norm(params, e) == pytest.approx(RHO, rel=1e-5)
    nearer = Geometry("none").project(params, e, RHO / 2)["weight"]
    assert exact_norm(nearer) == pytest.approx(RHO / 2, rel=1e-5)


@pytest.mark.parametrize("normalization", ["elementwise", "none"])
@pytest.mark.parametrize("factor", [1.0, 1e-20])
@pytest.mark.parametrize("shape", [(1000, 1000), (32, 1025), (40_001,), (181, 181), (2000,), (8, 64, 32, 32)])
def test_norm_where_all_gradients_are_the_same(factor, normalization, shape):
    # added up one after the other, in float32, 130 thousand of them would be off by 5e-5
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    params = {"weight": torch.full(shape, 0.7).to(memory_format=order)}
    grads = {"weight": torch.full(shape, 1.1 * factor).to(memory_format=order)}
    e = Geometry(normalization).maximizer(params, grads, RHO)["weight"]
    assert exact_norm(e / Geometry(normalization).scales(params)["weight"]) == pytest.approx(RHO, rel=1e-6)
    assert (grads["weight"] == torch.tensor(1.1 * factor)).all()


@pytest.mark.parametrize("p", [1.2, 4 / 3, 1.5, 2, 3, 4, math.inf])
def test_norms_of_other_orders(p):
    generator = torch.Generator().manual_seed(0)
    params = {"weight": torch.zeros(1000, 1000)}
    # some much larger than others
    grads = {"weight": torch.randn(1000, 1000, generator=generator) * torch.rand(1000, 1000, generator=generator) ** 8}
    ball = Geometry("none", p=p)
    e = ball.maximizer(params, grads, RHO)
    assert torch.linalg.vector_norm(e["weight"].double(), p).item() == pytest.approx(RHO, rel=1e-5)
    exact = torch.linalg.vector_norm(grads["weight"].double(), p).item()
    assert ball.norm(params, grads).item() == pytest.approx(exact, rel=1e-5)


def test_perturbation_where_the_scale_is_zero():
    ball = Geometry(eta=0.0)
    w = {"weight": torch.tensor([0.0, 2.0])}
    assert ball.norm(w, {"weight": torch.tensor([0.0, 1.0])}) == 0.5
    assert ball.norm(w, {"weight": torch.tensor([1e-9, 1.0])}) == math.inf


def test_empty_parameters_are_passed_over():
    params = {"none": torch.zeros(0, 3), "weight": torch.tensor([3.0, 1.0])}
    e = Geometry(eta=0.0).maximizer(params, {"none": torch.zeros(0, 3), "weight": torch.tensor([1.0, 4.0])}, 1.0)
    assert e["none"].shape == (0, 3)
    torch.testing.assert_close(e["weight"], torch.tensor([1.8, 0.8]))
    for p in (1.5, 2, math.inf):
        nothing = Geometry(p=p).maximizer({"none": torch.zeros(0, 3)}, {"none": torch.zeros(0, 3)}, 1.0)
        assert nothing["none"].shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "biased"),
    [
        ("bias", True),
        ("weighting.bias", True),
        ("attention.in_proj_bias", True),
        ("bias_net.weight", False),
        ("bias.weight", False),
        ("biases", False),
        ("gamma", False),
        ("pos_embed", False),
    ],
)
def test_a_bias_is_told_by_the_last_part_of_its_name(name, biased):
    w = torch.tensor([2.0, -3.0])
    assert_same(Geometry().scales({name: w}), {name: torch.ones(2) if biased else w.abs() + 0.01})
    assert Geometry(bias="fixed").perturbs(name) is not biased
    assert Geometry(bias="scaled").perturbs(name)
