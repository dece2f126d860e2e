"""compile=True on the CPU: the loops in C++ do what the operations of torch do, and give back what they take."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from slow_reference import assert_same, maximizer, shapes_problem, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import asam.native
from asam import ASAM, SAM, EconomicalASAM, Geometry
from asam.blocks import CPU_BLOCK, Execution
from asam.native import CHUNK, DIMENSIONS, NativeBlock, block_of, library

LARGE = 600  # a square of it is more than a block of the CPU, and several chunks
assert max(CPU_BLOCK, CHUNK) < LARGE**2


def has_compiler():
    """Whether any program with a parallel loop can be compiled: then ours must be."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads(); }"
    flags = ["-std=c++20", "-fopenmp", "-x", "c++", "-", "-o", "program"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(os.environ.get("CXX", "c++")), *flags]
        try:
            done = subprocess.run(command, input=program, text=True, capture_output=True, cwd=folder)
        except OSError:
            return False
    return done.returncode == 0


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="it is for Linux"),
    pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler with OpenMP"),
]


@pytest.fixture(autouse=True)
def moves(monkeypatch):
    """How often a native block has moved: a test of it that does not go through it proves nothing."""
    real, calls = NativeBlock.move, []
    monkeypatch.setattr(NativeBlock, "move", lambda block: (calls.append(len(block.targets)), real(block)))
    return calls


def network(width=40):
    """Weights and biases, small and of several chunks, in either order of memory."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(width, width), nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.Linear(3, 1)])
    layers[1].to(memory_format=torch.channels_last)
    return layers


def with_gradients(model, magnitude=1.0):
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.grad = torch.empty_like(param).copy_(magnitude * torch.randn(param.shape, generator=generator))
    return model


def there(model, asam):
    """The weights at w + e, after a look that they come back."""
    before, grads = weights(model), {name: param.grad for name, param in model.named_parameters()}
    with asam.perturbed():
        moved = weights(model)
    assert_same(weights(model), before)
    return before, grads, moved


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


def test_what_it_is_not_for_goes_the_other_way(moves):
    for model, setting in (
        (network().double(), {}),
        (network(), {"p": float("inf")}),
        (network(), {"normalization": "filterwise", "bias": "fixed", "params": ["0.weight"]}),
    ):
        there(with_gradients(model), ASAM(model, compile=True, **setting))
    assert not moves


def test_a_gradient_in_another_order_goes_the_other_way(moves):
    model = with_gradients(network())
    model[0].weight.grad = torch.randn(40, 40).T
    before, grads, moved = there(model, ASAM(model, rho=0.3, compile=True))
    e = Geometry().maximizer(dict(model.named_parameters()), grads, 0.3)
    torch.testing.assert_close(moved["0.weight"], before["0.weight"] + e["0.weight"], rtol=1e-6, atol=1e-6)
    assert moves == [7]


def test_any_order_without_gaps_will_do_if_both_have_it(moves):
    model = nn.Conv3d(4, 6, 3)
    model.weight.data = model.weight.data.permute(4, 1, 3, 0, 2)
    before, grads, moved = there(with_gradients(model), asam := ASAM(model, rho=0.3, compile=True))
    e = asam.geometry.maximizer(before, grads, 0.3)
    for name, w in before.items():
        torch.testing.assert_close(moved[name], w + e[name], rtol=1e-6, atol=1e-6)
    assert moves == [2]


def test_what_has_gaps_or_many_dimensions_goes_the_other_way(moves):
    model = nn.ParameterList([torch.randn(8, 10), torch.randn(8, 5), torch.randn([2] * DIMENSIONS + [3])])
    model[1].data = torch.randn(8, 10)[:, ::2]
    with_gradients(model)[1].grad = torch.randn(8, 10)[:, ::2]
    before, grads, moved = there(model, asam := ASAM(model, rho=0.3, compile=True))
    e = asam.geometry.maximizer(before, grads, 0.3)
    for name, w in before.items():
        torch.testing.assert_close(moved[name], w + e[name], rtol=1e-6, atol=1e-6)
    assert moves == [1]


def test_what_may_not_be_written_to_or_has_another_shape_does_not_fit():
    with torch.inference_mode():
        fixed = torch.randn(4, 3)
    assert block_of([True], [fixed], [torch.randn(4, 3)], 0.0)[0] is None
    assert block_of([True], [torch.randn(4, 3)], [torch.randn(2, 3)], 0.0)[0] is None
    assert block_of([True], [torch.randn(4, 3)], [torch.randn(4, 3)], 0.0)[0] is not None


def test_no_gradient_beside_one_of_another_dtype(moves):
    model = with_gradients(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).double()]))
    model[0].weight.grad.zero_()
    model[0].bias.grad.zero_()
    before, grads, moved = there(model, asam := ASAM(model, rho=0.3, compile=True))
    e = asam.geometry.maximizer(before, grads, 0.3)
    for name, w in before.items():
        torch.testing.assert_close(moved[name], w + e[name])
    assert moves == [2]


class Shy(nn.Parameter):
    """One that does not tell where what torch holds of it is."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function == Shy._cdata.__get__:
            raise TypeError("not this")
        return super().__torch_function__(function, types, arguments, options or {})


def test_a_kind_of_tensor_that_has_its_own_ideas_is_not_asked_for_its_memory(moves):
    model = nn.Linear(40, 40)
    model.weight = Shy(torch.randn(40, 40))
    there(with_gradients(model), ASAM(model, compile=True))
    assert not moves


def test_weights_come_back_into_a_kind_of_tensor_that_has_its_own_ideas(moves):
    model = with_gradients(network())
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        torch.utils.swap_tensors(model[0].weight, Shy(torch.zeros(40, 40)))
    assert_same(weights(model), before)
    assert moves


def test_who_answers_for_all_tensors_is_not_asked_for_their_memory(moves):
    class Refusing(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function == torch.Tensor._cdata.__get__:
                raise TypeError("not this")
            return function(*arguments, **(options or {}))

    model = with_gradients(network())
    with Refusing():
        there(model, ASAM(model, compile=True))
    assert moves


def test_a_tensor_without_contents_is_not_asked_for_them(capfd):
    with FakeTensorMode():
        fakes = [torch.randn(4, 3)], [torch.randn(4, 3)]
    assert block_of([True], *fakes, 0.0)[0] is None
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_tensor_that_tells_no_shape_goes_the_other_way(moves):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 3))
    model.nested = nn.Parameter(torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)]))
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError):  # as without compile=True: torch does not compute with it what is needed
        ASAM(model, compile=True).backward(lambda: model.weight.sum() + model.nested.to_padded_tensor(0.0).sum())
    assert torch.equal(model.weight, before)
    assert not moves


def product_of(one, other):
    """Their inner product, whose gradients are the factors themselves and no copies."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(context, a, b):
            context.save_for_backward(a.detach(), b.detach())
            return (a * b).sum()

        @staticmethod
        def backward(context, unit):
            return context.saved_tensors[::-1]

    return Product.apply(one, other)


@pytest.mark.parametrize(("fast", "size"), [(False, 10), (False, 200_000), (True, 10)])
def test_a_gradient_may_be_another_parameter(fast, size):
    model = nn.ParameterList([torch.randn(size), torch.randn(size)])
    before = weights(model)
    e = Geometry().maximizer(before, {"0": before["1"], "1": before["0"]}, 0.3)
    found = []

    def closure():
        found.append(weights(model))
        return product_of(*model)

    ASAM(model, rho=0.3, compile=fast).backward(closure)
    for name, w in before.items():
        torch.testing.assert_close(found[1][name], w + e[name], rtol=1e-6, atol=1e-6)
    assert_same(weights(model), before)


def test_memory_that_two_parameters_share_may_have_a_gradient_that_does_not_fit(moves):
    memory, ends = torch.randn(8), []
    for execution in (Execution(), Execution(compile=True)):
        params = [memory.clone()]
        params.append(params[0].view(8))
        grads = [torch.ones(()).expand(8), torch.arange(8.0)]
        blocks = list(Geometry().blocks(["0", "1"], params, grads, 0.3, execution=execution))
        for block in blocks:
            block.keep()
            block.move()
        ends.append(params[0])
    assert torch.equal(*ends)
    assert not moves


def test_under_a_transform_of_functions_it_goes_the_other_way(moves):
    model = with_gradients(nn.Linear(4, 1))
    asam = ASAM(model, compile=True)

    def output(inputs):
        with asam.perturbed():
            return model(inputs).sum()

    torch.func.grad(output)(torch.ones(3, 4))
    assert not moves


def test_who_counts_operations_sees_them(moves):
    model = with_gradients(network())
    with FlopCounterMode(display=False):
        there(model, ASAM(model, compile=True))
    assert not moves


def test_a_graph_that_needs_the_old_weights_raises():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    kept = model(torch.randn(4, 3)).square().mean()
    with pytest.raises(RuntimeError, match=r"^part of the loss's graph was made outside the closure, at w, or"):
        ASAM(model, compile=True).backward(lambda: kept.clone(), backward=lambda loss: loss.backward(retain_graph=True))


def test_nothing_is_put_back_before_anything_has_moved():
    params, grads = [torch.ones(3)], [torch.ones(3)]
    block, others = block_of([True], params, grads, 0.0)
    assert not others
    assert block.put_back() == []
    block.keep()  # room of whatever it holds
    assert block.put_back() == []
    assert torch.equal(params[0], torch.ones(3))


@pytest.mark.parametrize("width", [40, LARGE])
@pytest.mark.parametrize("failing", [False, True])
def test_weights_come_back_into_other_memory(failing, width):
    model = with_gradients(network(width))
    before, old = weights(model), model[0].weight.data
    new = torch.full_like(old, 7.0)

    def visit():
        with ASAM(model, compile=True).perturbed():
            model[0].weight.data = new
            if failing:
                raise ValueError("boom")

    if failing:
        with pytest.raises(ValueError, match="boom"):
            visit()
    else:
        visit()
    assert model[0].weight.data_ptr() == new.data_ptr()
    assert_same(weights(model), before)
    if width == LARGE:
        assert torch.equal(old, before["0.weight"])


@pytest.mark.parametrize("width", [40, LARGE])
def test_weights_come_back_in_another_dtype(width):
    model = with_gradients(network(width))
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        model.zero_grad()
        model.double()
    floating = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    assert_same(weights(model), floating)


@pytest.mark.parametrize("width", [40, LARGE])
def test_a_change_of_shape_is_refused_and_undone(width):
    model = with_gradients(network(width))
    before = weights(model)

    def visit():
        with ASAM(model, compile=True).perturbed():
            model[0].weight.data = torch.zeros(3, 2)

    with pytest.raises(RuntimeError, match=r"shape of a parameter changed .* 0\.weight\. Change the model between"):
        visit()
    assert_same(weights(model), before)


def test_memory_that_two_parameters_share_goes_the_other_way_and_comes_back(moves):
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight.data = model[0].weight.data
    with_gradients(model)
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert_same(weights(model), before)
    assert not moves


@pytest.mark.parametrize("width", [40, LARGE])
def test_weights_come_back_to_where_their_memory_went(width):
    model = with_gradients(network(width))
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        model.share_memory()  # copies all of it, and lets go what it was in
    assert_same(weights(model), before)


def test_weights_come_back_into_a_parameter_that_holds_another_tensor_now():
    model = with_gradients(network())
    before = weights(model)
    other = torch.zeros(40, 40)
    with ASAM(model, compile=True).perturbed():
        torch.utils.swap_tensors(model[0].weight, nn.Parameter(other))
    assert_same(weights(model), before)
    assert torch.equal(other, before["0.weight"])


def test_another_way_to_read_the_same_memory_is_not_what_it_was():
    model = with_gradients(network())
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        model[0].weight.data = model[0].weight.data.T
    assert_same(weights(model), before)


def test_another_dtype_at_the_same_place_is_not_written_over():
    model = with_gradients(network())
    before = weights(model)
    memory = model[0].weight.data
    with ASAM(model, compile=True).perturbed():
        model[0].weight.data = memory.view(torch.float16).as_strided((40, 40), (40, 1))
        assert model[0].weight.data_ptr() == memory.data_ptr()
    assert torch.equal(model[0].weight, before["0.weight"].half())


@pytest.mark.parametrize("fast", [False, True])
def test_a_parameter_that_cannot_be_written_to_keeps_no_other_from_coming_back(fast):
    model = with_gradients(network())
    before = weights(model)

    def visit():
        with ASAM(model, compile=fast).perturbed():
            model[0].weight.data = torch.zeros(()).expand(40, 40)

    with pytest.raises(RuntimeError, match="the shape of a parameter changed"):
        visit()
    assert_same(weights(model), before)


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


@pytest.mark.parametrize(
    "other",
    [
        torch.Tensor.double,
        torch._neg_view,
        lambda grad: torch._efficientzerotensor(grad.shape),
        lambda grad: torch._efficientzerotensor((2, *grad.shape))[1],
    ],
    ids=["dtype", "negative", "zero", "half of zero"],
)
def test_a_direction_that_is_not_plain_memory_goes_the_other_way(other, moves):
    w, grad, ends = torch.randn(40, 40), other(torch.randn(40, 40)), []
    for execution in (Execution(), Execution(compile=True)):
        moved = [w.clone()]
        for block in Geometry().blocks(["0.weight"], moved, [grad], 0.3, execution=execution):
            block.keep()
            block.move()
        ends.append(moved[0])
    assert torch.equal(*ends)
    assert not moves


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "true", "", "'", "c++ -fvisibility=hidden"])
def test_without_a_compiler_it_goes_the_other_way(compiler, monkeypatch):
    library.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    try:
        assert library() is None
        (block,) = Geometry().blocks(["w"], [torch.ones(3)], [torch.ones(3)], 0.1, execution=Execution(compile=True))
    finally:
        library.cache_clear()
    assert not isinstance(block, NativeBlock)


def test_where_a_second_openmp_may_end_the_process_it_goes_the_other_way(monkeypatch):
    library.cache_clear()
    monkeypatch.setattr("sys.platform", "darwin")
    try:
        assert library() is None
    finally:
        library.cache_clear()


def test_without_a_temporary_folder_it_goes_the_other_way(monkeypatch):
    def no_folder(*arguments, **options):
        raise FileNotFoundError("no usable temporary directory")

    library.cache_clear()
    monkeypatch.setattr("tempfile.TemporaryDirectory", no_folder)
    try:
        assert library() is None
    finally:
        library.cache_clear()


def test_it_is_small_and_compiles_in_seconds():
    assert len(Path(asam.native.SOURCE).read_text().splitlines()) < 150
    library.cache_clear()
    start = time.monotonic()
    assert library() is not None
    assert time.monotonic() - start < 30
