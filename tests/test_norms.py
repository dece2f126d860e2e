"""Norms of whole tensors and of their rows: of any size, of any magnitude, of no elements."""

import pytest
import torch

from asam import Geometry
from asam.norms import norms, vector_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_magnitude(dtype):
    """Each row in units of its own largest number: of a larger one's, a small row would be 0."""
    tiny, huge = float(torch.finfo(dtype).tiny) * 8, float(torch.finfo(dtype).max) / 8
    rows = torch.tensor([[3 * tiny, 4 * tiny], [3 * huge, -4 * huge], [0.0, 0.0]], dtype=dtype)
    found = norms(rows, keep_first=True)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.tensor([[5 * tiny], [5 * huge], [0.0]], dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert norms(rows, keep_first=False).shape == (1, 1)


@pytest.mark.parametrize(
    ("shape", "keep_first", "expected"),
    [((0, 3), True, (0, 1)), ((0, 3), False, (1, 1)), ((2, 0, 4), True, (2, 1, 1)), ((0,), False, (1,))],
)
def test_tensors_of_no_elements(shape, keep_first, expected):
    found = norms(torch.empty(shape), keep_first=keep_first)
    assert found.shape == expected
    assert not found.any()


@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise", "none"])
def test_a_parameter_of_no_elements_changes_nothing(normalization):
    geometry = Geometry(normalization)
    params, grads = {"weight": torch.tensor([[1.0, 2.0]])}, {"weight": torch.tensor([[3.0, -1.0]])}
    alone = geometry.maximizer(params, grads, 0.5)
    empty = torch.empty(0, 3)
    beside = geometry.maximizer({"empty": empty, **params}, {"empty": empty, **grads}, 0.5)
    assert beside["empty"].shape == (0, 3)
    assert torch.equal(beside["weight"], alone["weight"])
    assert geometry.maximizer({"empty": empty}, {"empty": empty}, 0.5)["empty"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise"])
def test_small_numbers_in_half_precision_do_not_vanish(normalization, dtype):
    """T g is 1e-8 here, less than the smallest number of float16."""
    torch.manual_seed(0)
    params, grads = (
        {"weight": (0.01 * torch.randn(20, 30)).to(dtype)},
        {"weight": (1e-5 * torch.randn(20, 30)).to(dtype)},
    )
    geometry = Geometry(normalization, eta=0.0)
    e = geometry.maximizer(params, grads, 0.5)["weight"]
    exact = geometry.maximizer({"weight": params["weight"].double()}, {"weight": grads["weight"].double()}, 0.5)[
        "weight"
    ]
    assert e.dtype == dtype
    # a last digit; the scales of rows are of half precision themselves
    torch.testing.assert_close(e.double(), exact, rtol=3 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_norm_of_no_elements():
    nothing = {"a": torch.empty(0, 3)}
    assert Geometry().norm(nothing, nothing) == 0


@pytest.mark.parametrize("size", [1000, 2**16, 3_000_000])
def test_of_a_vector_in_single_precision(size):
    """Squares added up one after the other would be off by 1e-5 and more."""
    for vector in (torch.full((size,), 1.1), torch.rand(size, generator=torch.Generator().manual_seed(0)) + 1):
        assert vector_norm(vector).item() == pytest.approx(vector.double().norm().item(), rel=5e-7)
