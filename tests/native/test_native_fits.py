"""compile=True on the CPU: what does not go through the loops in C++ goes the other way, to the same end."""

import pytest
import torch
from layers import Shy, network, there, with_gradients
from slow_reference import assert_same, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from asam import ASAM, Geometry
from asam.blocks import Execution
from asam.native import DIMENSIONS, NativeBlock, block_of, library


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


def as_without_it(model, **options):
    """What is at w + e with compile=True, after a look that it is what is there without."""
    _, grads, plain = there(model, ASAM(model, **options))
    for name, param in model.named_parameters():
        param.grad = grads[name]
    _, _, moved = there(model, ASAM(model, compile=True, **options))
    for name, w in plain.items():
        torch.testing.assert_close(moved[name], w, rtol=1e-6, atol=1e-6)


def test_biases_go_this_way_where_weights_have_other_scales(moves):
    as_without_it(with_gradients(network()), normalization="filterwise")
    assert moves == [5]  # the weight of a normalization layer has one dimension: |w| + eta


def test_strides_of_a_dimension_of_one_do_not_matter(moves):
    model = nn.Conv2d(8, 6, 1, bias=False)
    model.weight.grad = torch.randn(6, 8, 1, 1).to(memory_format=torch.channels_last)
    assert model.weight.stride() != model.weight.grad.stride()
    as_without_it(model)
    assert moves == [1]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_in_the_other_order_of_an_image_goes_the_other_way(order, moves):
    model = nn.Conv2d(8, 6, 3, bias=False).to(memory_format=order)
    (other,) = {torch.contiguous_format, torch.channels_last} - {order}
    model.weight.grad = torch.randn(6, 8, 3, 3).contiguous(memory_format=other)
    as_without_it(model)
    assert not moves


def test_a_gradient_may_be_some_of_another_parameter(moves):
    model = with_gradients(nn.ParameterList([torch.randn(8), torch.randn(10)]))
    model[0].grad = model[1].detach()[2:]
    as_without_it(model)
    assert not moves


def test_two_parameters_may_have_one_gradient(moves):
    model = nn.ParameterList([torch.randn(40), torch.randn(40)])
    model[0].grad = model[1].grad = torch.randn(40)
    as_without_it(model)
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


def test_a_kind_of_tensor_that_has_its_own_ideas_is_not_asked_for_its_memory(moves):
    model = nn.Linear(40, 40)
    model.weight = Shy(torch.randn(40, 40))
    there(with_gradients(model), ASAM(model, compile=True))
    assert not moves


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


def test_memory_that_two_parameters_share_goes_the_other_way_and_comes_back(moves):
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight.data = model[0].weight.data
    with_gradients(model)
    before = weights(model)
    with ASAM(model, compile=True).perturbed():
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert_same(weights(model), before)
    assert not moves


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
