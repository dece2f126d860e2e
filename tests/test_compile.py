"""compile=True: the same perturbation by code that torch's compiler makes, where there is no other (tests/native)."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.flop_counter import FlopCounterMode

from asam import ASAM, EconomicalASAM
from asam.blocks import COMPILED_FROM
from asam.kernels import _tell, compiled

WIDE = 600
BLOCK, ALONE = 2**18, 16  # of compiled code here: the largest tensor is cut in two, and small ones are laid end to end
assert WIDE**2 > BLOCK > 2 * COMPILED_FROM
assert BLOCK // ALONE > 100**2


def network():
    """Tensors that are compiled for: large ones, a large one with its channels last, and many small ones together.

    The first that is compiled for, as blocks are moved from the last on, is a slice of the largest.
    """
    layers = nn.ModuleList([nn.Conv2d(64, 256, 3).to(memory_format=torch.channels_last)])
    layers.extend(nn.Linear(100, 100) for _ in range(16))
    return layers.append(nn.Linear(WIDE, WIDE))


def there(model, **options):
    """The weights at w + e, after a look that they come back."""
    asam = ASAM(model, **options)
    generator = torch.Generator().manual_seed(1)
    before = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.empty_like(param).copy_(torch.randn(param.shape, generator=generator))
    with asam.perturbed():
        moved = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return {name: value - before[name] for name, value in moved.items()}


def assert_compiled_is_eager(model, **options):
    slow, fast = there(model, **options), there(model, compile=True, **options)
    for name, e in slow.items():
        torch.testing.assert_close(fast[name], e, rtol=1e-4, atol=1e-6, msg=name)


# torch's own, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Skipping serialization:UserWarning")


@pytest.fixture(autouse=True)
def start(monkeypatch):
    monkeypatch.setattr("asam.native.library", lambda: None)
    monkeypatch.setattr("asam.blocks.COMPILED_BLOCK", BLOCK)
    monkeypatch.setattr("asam.blocks.COMPILED_ALONE", ALONE)
    compiled.cache_clear()
    _tell.cache_clear()
    torch.compiler.reset()
    yield
    compiled.cache_clear()
    _tell.cache_clear()
    torch.compiler.reset()


def test_it_is_the_same_and_another_rho_compiles_nothing():
    model = network()
    assert_compiled_is_eager(model, rho=0.5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rho in (0.05, 0.7, 2):
            assert_compiled_is_eager(model, rho=rho)
        with FlopCounterMode(display=False):  # which compiled code would make fail
            assert_compiled_is_eager(model, rho=rho)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.0},
        {"bias": "scaled"},
        {"normalization": "none"},
        {"normalization": "filterwise"},
        {"normalization": "layerwise"},
        {"p": float("inf")},
        {"p": 1.5},
    ],
    ids=str,
)
def test_it_is_the_same_for_every_geometry(options):
    assert_compiled_is_eager(network(), rho=0.5, **options)


@pytest.mark.slow
def test_it_is_the_same_in_other_dtypes():
    assert_compiled_is_eager(network().double(), rho=0.5)
    model = network().bfloat16()
    with pytest.warns(UserWarning, match="lose part"):
        slow, fast = there(model, rho=5), there(model, rho=5, compile=True)
    # both round to the nearest what may lie on either side of the middle
    different = sum(int((fast[name] != e).sum()) for name, e in slow.items())
    assert different < 1e-3 * sum(e.numel() for e in slow.values())


@pytest.mark.slow
def test_against_the_momentum():
    inputs, grads = torch.randn(8, WIDE), []
    for fast in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(WIDE, WIDE)
        asam = EconomicalASAM(model, steps=4, exact=0.5, compile=fast)
        for _ in range(4):
            asam.backward(partial(lambda layer: layer(inputs).square().mean(), model))
        grads.append(model.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_more_geometries_than_torch_allows_code_for_run_as_they_are(monkeypatch):
    monkeypatch.setattr("asam.blocks.COMPILED_BLOCK", WIDE**2)  # of a second slice there would be a second code
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 1}):
        assert_compiled_is_eager(network()[-1:], bias="fixed")
        with pytest.warns(UserWarning, match="compile=True has no effect"):
            assert_compiled_is_eager(network()[-1:], bias="fixed", p=3)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_compiled_is_eager(network()[-1:], bias="fixed")


@pytest.mark.parametrize(
    ("name", "tries", "reason"),
    [("BackendCompilerFailed", 1, "no"), ("FailOnRecompileLimitHit", 3, r"torch\._dynamo\.config\.recompile_limit")],
)
def test_it_is_tried_again_where_torch_had_code_enough(name, tries, reason, monkeypatch):
    error, tried = type(name, (Exception,), {"__module__": "torch._dynamo.exc"}), []

    def fast(value):
        tried.append(value)
        raise error("no")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fast)
    run = compiled(lambda value: value + 1)
    with pytest.warns(UserWarning, match=f"compile=True has no effect, torch.compile failed: {reason}"):
        assert [run(value) for value in range(3)] == [1, 2, 3]
    assert len(tried) == tries


def test_an_error_of_the_arithmetic_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(ZeroDivisionError):
        compiled(lambda value: 1 / value)(0)


def test_without_a_compiler_it_runs_as_it_is_with_one_warning():
    model = network()[-1:]
    slow = there(model)
    with (
        fresh_inductor_cache(),
        torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/c++")}),
        pytest.warns(UserWarning, match="compile=True has no effect") as told,
    ):
        fast, again = there(model, compile=True), there(model, compile=True)
    assert sum("compile=True has no effect" in str(warning.message) for warning in told) == 1
    for result in (fast, again):
        torch.testing.assert_close(result, slow, rtol=1e-5, atol=1e-7)
