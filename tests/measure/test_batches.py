"""Batches of any structure, counted and cut by examples."""

from collections import namedtuple

import pytest
import torch

from asam.measure.batches import grouped, pieces_of

Pair = namedtuple("Pair", ["x", "y"])


def rows(start, stop):
    return torch.arange(start, stop)


@pytest.mark.parametrize(
    ("sizes", "m", "groups"),
    [
        ((6,), 2, [[2], [2], [2]]),
        ((6,), 4, [[4], [2]]),
        ((6,), 6, [[6]]),
        ((6,), 100, [[6]]),
        ((3, 3), 4, [[3, 1], [2]]),
        ((3, 1, 4), 5, [[3, 1, 1], [3]]),
        ((1, 1, 1), 2, [[1, 1], [1]]),
        ((5, 2), 1, [[1]] * 7),
    ],
)
def test_groups_run_across_the_borders_of_batches(sizes, m, groups):
    pieces = pieces_of(rows(0, sum(sizes)).split(list(sizes)))
    found = grouped(pieces, m)
    assert [[piece.size for piece in group] for group in found] == groups
    assert torch.equal(torch.cat([piece.batch for group in found for piece in group]), rows(0, sum(sizes)))


def test_what_is_not_cut_is_the_batch_itself():
    batch = (rows(0, 4), "a")
    ((piece,),) = grouped(pieces_of([batch]), 4)
    assert piece.batch is batch


def test_every_structure_keeps_its_type():
    scale, weights = torch.tensor(2.0), torch.ones(7)
    batch = {
        "scale": scale,
        "pair": Pair(rows(0, 4), [rows(4, 8), None]),
        "both": (rows(0, 8).view(4, 2), "name"),
        "weights": weights,
    }
    first, last = (group[0].batch for group in grouped(pieces_of([batch]), 3))
    assert first["scale"] is last["scale"] is scale
    assert first["weights"] is last["weights"] is weights
    assert isinstance(first["pair"], Pair)
    assert torch.equal(first["pair"].x, rows(0, 3))
    assert torch.equal(last["pair"].y[0], rows(7, 8))
    assert last["pair"].y[1] is None
    assert torch.equal(last["both"][0], torch.tensor([[6, 7]]))
    assert last["both"][1] == "name"


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (rows(0, 3), 3),
        ((torch.tensor(1.0), rows(0, 3)), 3),
        ({"a": {"b": [rows(0, 5)]}}, 5),
        ((1, "a", None), 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_size_is_that_of_the_first_tensor(batch, size):
    assert [piece.size for piece in pieces_of([batch])] == [size]


def test_empty_batches_are_passed_over():
    assert [piece.size for piece in pieces_of([rows(0, 0), rows(0, 2), rows(0, 0)])] == [2]
