"""compile=True on the CPU: the loops in C++ do what the operations of torch do."""

import time
from pathlib import Path

import pytest
import torch
from layers import LARGE, network, there, with_gradients
from slow_reference import assert_same, maximizer, shapes_problem, weights
from torch import nn

import asam.native
from asam import ASAM, SAM, EconomicalASAM, Geometry
from asam.blocks import Execution
from asam.native import library


@pytest.mark.parametrize("width", [40, LARGE])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "setting",
    [{}, {"eta": 0.0}, {"bias": "scaled"}, {"bias": "fixed"}, {"normalization": "none"}, {"params": ["0.weight"]}],
    ids=str,
)
def test_it_is_the_perturbation_of_the_paper(setting, threads, width, moves):
    model = with_gradients(network(width))
    torch.set_num_threads(threads)
    try:
        before, grads, moved = there(model, ASAM(model, rho=0.3, compile=True, **setting))
    finally:
        torch.set_num_threads(1)
    assert len(moves) == 1
    chosen = setting.get("params", list(before))
    double = {name: before[name].double() for name in chosen}
    e = Geometry(**{key: value for key, value in setting.items() if key != "params"}).maximizer(
        double, {name: grads[name].double() for name in chosen}, 0.3
    )
    for name, w in before.items():
        expected = w.double() + e[name] if name in e else w.double()
        # the sum is rounded once, its second part to float32 before
        torch.testing.assert_close(moved[name].double(), expected, rtol=2e-7, atol=2e-6 * 0.3)


def test_a_small_one_is_the_slow_reference(moves):
    model = shapes_problem(torch.float32)[0]
    generator = torch.Generator().manual_seed(2)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    before, grads, moved = there(model, ASAM(model, rho=0.3, compile=True))
    e = maximizer(before, grads, 0.3)
    for name, w in before.items():
        torch.testing.assert_close(moved[name], w + e[name], rtol=1e-6, atol=1e-7)
    assert moves


@pytest.mark.parametrize("magnitude", [1e-42, 1e-36, 1e-20, 1.0, 1e20, 1e36])
@pytest.mark.parametrize("make", [ASAM, SAM])
def test_the_magnitude_of_the_gradient_does_not_matter(make, magnitude):
    model = with_gradients(network(), magnitude)
    before, _, moved = there(model, make(model, rho=0.3, compile=True))
    e = {name: (moved[name] - w).double() for name, w in before.items()}
    norm = float(make(model).geometry.norm({name: w.double() for name, w in before.items()}, e))
    if magnitude < 1e-38:  # denormal: the ball is not left, as with the operations of torch
        assert norm <= 0.3 * (1 + 1e-3)
    else:
        assert norm == pytest.approx(0.3, rel=1e-4)


def test_no_gradient_gives_no_perturbation():
    model = with_gradients(network(), 0.0)
    before, _, moved = there(model, ASAM(model, compile=True))
    assert_same(moved, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_leaves_the_weights_as_they_were(value):
    model = with_gradients(network())
    model[0].weight.grad[0, 0] = value
    _, _, moved = there(model, ASAM(model, compile=True))
    assert not any(w.isfinite().all() for w in moved.values())


def test_the_number_of_threads_changes_no_bit():
    results = []
    for threads in (1, 2, 3):
        model = with_gradients(network(LARGE))
        torch.set_num_threads(threads)
        try:
            results.append(there(model, ASAM(model, compile=True))[2])
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert_same(other, results[0])


def test_steps_are_those_without_it():
    inputs = torch.randn(8, 40)
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 1))
        asam = ASAM(model, rho=0.2, compile=fast)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            losses.append(asam.backward(lambda model=model: model(inputs).square().mean()))
            optimizer.step()
            optimizer.zero_grad()
        results.append([*losses, *weights(model).values()])
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["elementwise", "none"])
def test_a_negative_rho_is_the_way_downhill(normalization, moves):
    w, grad, ends = torch.randn(40, 40), torch.randn(40, 40), []
    for execution in (Execution(), Execution(compile=True)):
        params = [w.clone()]
        for block in Geometry(normalization).blocks(["0.weight"], params, [grad], -0.3, execution=execution):
            block.keep()
            block.move()
        ends.append(params[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-7)
    assert ((ends[1] - w) * grad).sum() < 0
    assert len(moves) == 1


def test_against_the_momentum(moves):
    torch.manual_seed(0)
    model = nn.Linear(40, 1)
    inputs = torch.randn(8, 40)
    asam = EconomicalASAM(model, steps=4, exact=0.5, compile=True)
    for _ in range(4):
        asam.backward(lambda: model(inputs).square().mean())
    assert len(moves) == 3  # the first step has no momentum yet


def test_no_gradient_beside_one_of_another_dtype(moves):
    model = with_gradients(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).double()]))
    model[0].weight.grad.zero_()
    model[0].bias.grad.zero_()
    before, grads, moved = there(model, asam := ASAM(model, rho=0.3, compile=True))
    e = asam.geometry.maximizer(before, grads, 0.3)
    for name, w in before.items():
        torch.testing.assert_close(moved[name], w + e[name])
    assert moves == [2]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1e6])
def test_the_default_dtype_does_not_matter_beside_another_dtype(default, magnitude, moves):
    model = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20).double()])
    expected = there(with_gradients(model, magnitude), ASAM(model, compile=True))[2]
    with_gradients(model, magnitude)
    torch.set_default_dtype(default)
    try:
        assert_same(there(model, ASAM(model, compile=True))[2], expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert moves == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype, moves):
    expected = there(with_gradients(model := network()), ASAM(model, compile=True))[2]
    with_gradients(model)
    torch.set_default_dtype(dtype)
    try:
        assert_same(there(model, ASAM(model, compile=True))[2], expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(moves) == 2


def test_the_default_device_does_not_matter():
    asam = ASAM(model := network(), compile=True)
    expected = there(with_gradients(model), asam)[2]
    with_gradients(model)
    with torch.device("meta"):
        assert_same(there(model, asam)[2], expected)


def test_it_is_small_and_compiles_in_seconds():
    assert len(Path(asam.native.SOURCE).read_text().splitlines()) < 150
    library.cache_clear()
    start = time.monotonic()
    assert library() is not None
    assert time.monotonic() - start < 30
