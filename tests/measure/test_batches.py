"""Batches of any structure, counted and cut by examples."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import MutableMapping
from types import MappingProxyType

import numpy as np
import pytest
import torch

from asam.measure.batches import first, grouped, pieces_of

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
    scale, model = torch.tensor(2.0), object()
    batch = {
        "scale": scale,
        "pair": Pair(rows(0, 4), [rows(4, 8), None]),
        "both": (rows(0, 8).view(4, 2), "name"),
        "array": np.arange(4),
        "names": ["a", "b", "c", "d"],
        "size": (4, 4, 4, 4),  # of each
        "collated": ("a", "b", "c", "d"),  # as a DataLoader does it
        "one": ["a"],
        "model": model,
    }
    head, last = (group[0].batch for group in grouped(pieces_of([batch]), 3))
    assert head["scale"] is last["scale"] is scale
    assert head["model"] is last["model"] is model
    assert head["array"].tolist() == [0, 1, 2]
    assert last["names"] == ["d"]
    assert last["collated"] == ("d",)
    assert last["size"] == (4, 4, 4, 4)
    assert head["one"] == last["one"] == ["a"]
    assert isinstance(head["pair"], Pair)
    assert torch.equal(head["pair"].x, rows(0, 3))
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
        (np.arange(4), 4),
        (None, 1),
        (3.5, 1),
        ((1, "a", None), 1),
        (["a", "b", "c"], 3),
        ("a", 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_size_is_the_length_of_the_tensors(batch, size):
    assert [piece.size for piece in pieces_of([batch])] == [size]


class Attributes(UserDict):
    """Its values are its attributes too, as those of a tokenizer's output are."""

    def __getattr__(self, name):
        return self.data[name]


class Keeping(MutableMapping):
    """A mapping that a shallow copy shares its contents with."""

    def __init__(self, values):
        self.values_ = values

    __getitem__, __setitem__ = (
        (lambda self, key: self.values_[key]),
        (lambda self, key, v: self.values_.update({key: v})),
    )
    __delitem__, __iter__ = (lambda self, key: self.values_.pop(key)), (lambda self: iter(self.values_))
    __len__ = lambda self: len(self.values_)  # noqa: E731


class Frozen(dict):
    def update(self, values):
        raise RuntimeError("frozen")


@pytest.mark.parametrize("kind", [dict, OrderedDict, Attributes, MappingProxyType, Keeping, Frozen])
def test_a_mapping_keeps_its_type_where_it_can(kind):
    batch = kind({"x": rows(0, 4), "y": rows(4, 8)})
    head, last = (group[0].batch for group in grouped(pieces_of([batch]), 3))
    assert type(head) is type(last) is (kind if kind in (dict, OrderedDict, Attributes) else dict)
    assert head["x"].tolist() == [0, 1, 2]
    assert last["y"].tolist() == [7]
    assert batch["x"].tolist() == [0, 1, 2, 3]
    if kind is Attributes:
        assert last.y.tolist() == [7]


def test_texts_of_a_loader_are_cut_with_their_labels():
    loader = torch.utils.data.DataLoader([("one", 1), ("two", 2), ("three", 3), ("four", 4)], batch_size=3)
    groups = grouped(pieces_of(loader), 2)
    assert [[(list(p.batch[0]), p.batch[1].tolist()) for p in group] for group in groups] == [
        [(["one", "two"], [1, 2])],
        [(["three"], [3]), (["four"], [4])],
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_lengths_that_differ_are_refused(order):
    entries = [("class_weights", rows(0, 3)), ("x", rows(0, 4))][::order]
    with pytest.raises(ValueError, match=r"tensors of a batch have different lengths, \[[34], [34]\]"):
        pieces_of([dict(entries)])


@pytest.mark.parametrize("batch", [dataclasses.make_dataclass("Custom", ["x"])(rows(0, 3)), object(), {1, 2}])
def test_a_batch_that_cannot_be_looked_into_is_refused(batch):
    with pytest.raises(TypeError, match=f"examples of a batch of type {type(batch).__name__} cannot be counted"):
        pieces_of([batch])


@pytest.mark.parametrize("data", [rows(0, 3), {"x": rows(0, 3)}, "digits", 3])
def test_what_is_no_iterable_of_batches(data):
    for read in (pieces_of, lambda data: first(data, 2)):
        with pytest.raises(TypeError, match="data must be an iterable of batches"):
            read(data)


def test_first_reads_no_more_than_it_needs():
    def data():
        yield rows(0, 3)
        yield rows(3, 8)
        raise AssertionError("read on")

    assert [batch.tolist() for batch in first(data(), 5)] == [[0, 1, 2], [3, 4]]
    assert [batch.tolist() for batch in first([rows(0, 3)], 5)] == [[0, 1, 2]]


def test_empty_batches_are_passed_over():
    assert [piece.size for piece in pieces_of([rows(0, 0), rows(0, 2), rows(0, 0)])] == [2]
