"""What torch records or transforms: a number that was read back would be a constant of it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from asam import ASAM, Geometry

RHO = 0.5

# torch's own, and that vmap runs a few operations in a loop
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning",
    "ignore:.torch.jit:FutureWarning",  # since 2.14
    "ignore::torch.jit.TracerWarning",
    "ignore:There is a performance drop:UserWarning",
)


def maximizer(weight, grad):
    return Geometry(eta=0.01).maximizer({"w": weight}, {"w": grad}, RHO)["w"]


def by_hand(weight, grad):
    scale = weight.abs() + 0.01
    return RHO * scale * scale * grad / (scale * grad).norm()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 10, generator=generator, dtype=torch.float64)


def derivative_by_level(function, weight, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(weight, tangent))).tangent


@pytest.fixture
def derivative_of_aminmax():
    try:
        torch.func.jvp(lambda w: torch.aminmax(w).max, (torch.ones(2),), (torch.ones(2),))
    except NotImplementedError:
        pytest.skip("this torch has no forward derivative of aminmax")


@pytest.mark.usefixtures("derivative_of_aminmax")
@pytest.mark.parametrize(
    "derivative",
    [
        lambda function, weight, tangent: torch.func.jvp(function, (weight,), (tangent,))[1],
        lambda function, weight, tangent: torch.func.jacfwd(function)(weight) @ tangent,
        derivative_by_level,
    ],
    ids=["jvp", "jacfwd", "dual_level"],
)
def test_forward_mode(derivative, rows):
    weight, grad, tangent = rows
    ours, expected = (derivative(lambda w, f=f: f(w, grad), weight, tangent) for f in (maximizer, by_hand))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_vmap(rows):
    weights, grads = rows, rows.flip(0)
    ours = torch.func.vmap(maximizer)(weights, grads)
    torch.testing.assert_close(ours, torch.stack(list(map(by_hand, weights, grads))))


@pytest.mark.parametrize(
    "traced",
    [
        torch.jit.trace,
        lambda function, inputs: make_fx(function)(*inputs),
        lambda function, inputs: make_fx(function, tracing_mode="symbolic")(*inputs),
    ],
    ids=["jit.trace", "make_fx", "make_fx of any shape"],
)
def test_traced_once_it_serves_for_other_numbers(traced, rows):
    weight, grad, other = rows
    recorded = traced(maximizer, (weight, grad))
    torch.testing.assert_close(recorded(1000 * other, weight), by_hand(1000 * other, weight))


def test_a_tensor_without_contents_has_no_numbers_to_read():
    with FakeTensorMode():
        weight, grad = torch.randn(3, 4), torch.randn(3, 4)
    assert maximizer(weight, grad).shape == (3, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning", "ignore:The .grad attribute:UserWarning")
def test_a_compiled_step_whose_scalars_are_captured():
    model, inputs = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    asam = ASAM(model)

    def step(factor):
        model.zero_grad()
        asam.backward(lambda: (model(inputs) * factor).square().mean())
        return model.weight.grad.clone()

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(step)
        for factor in map(torch.tensor, (1.0, 10.0, 0.1)):
            torch.testing.assert_close(compiled(factor), step(factor))
    torch.compiler.reset()


class Wrapped(torch.Tensor):
    """A tensor around another, which says that it is contiguous when the other is not."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


def test_a_tensor_that_wraps_another():
    weight, grad = torch.randn(60, 50).T, torch.randn(60, 50).T
    torch.testing.assert_close(maximizer(Wrapped(weight), Wrapped(grad)).inner, by_hand(weight, grad))
