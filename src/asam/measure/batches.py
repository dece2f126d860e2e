"""The data of a measurement: batches of any structure, counted and cut by examples."""

import copy
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A batch, or a run of consecutive examples out of one, and how many examples it holds."""

    batch: Any
    size: int


def pieces_of(data: Iterable[Any]) -> list[Piece]:
    """Every batch of the data with its number of examples.

    Raises:
        TypeError, ValueError: ``data`` is not an iterable of batches, or holds no example.
    """
    _check_iterable(data)
    pieces = [Piece(batch, size) for batch in data if (size := _size(batch)) > 0]
    if not pieces:
        raise ValueError("data holds no examples")
    return pieces


def grouped(pieces: list[Piece], m: int) -> list[list[Piece]]:
    """Groups of m consecutive examples each, the last of what is left, across the borders of the batches."""
    groups: list[list[Piece]] = [[]]
    room = m
    for piece in pieces:
        start = 0
        while start < piece.size:
            if room == 0:
                groups.append([])
                room = m
            stop = min(piece.size, start + room)
            part = piece.batch if stop - start == piece.size else _cut(piece.batch, start, stop, piece.size)
            groups[-1].append(Piece(part, stop - start))
            room -= stop - start
            start = stop
    return groups


def _check_iterable(data: object) -> None:
    if isinstance(data, Tensor | str | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, such as [(inputs, targets)], got {type(data).__name__}")


def _size(batch: Any) -> int:
    """The length that all tensors and arrays of a batch share; 1 for a batch without any, such as None.

    Of a list of strings, its length.

    Raises:
        TypeError, ValueError: the batch is of a type that cannot be looked into, or they do not share one length.
    """
    lengths = list(dict.fromkeys(_lengths(batch)))
    if len(lengths) > 1:
        raise ValueError(
            f"the tensors of a batch have different lengths, {lengths}, so its examples cannot be counted: put what is "
            "not one row an example into loss_fn"
        )
    if not lengths and not isinstance(batch, None | bool | Real | str | Tensor | Mapping | tuple | list):
        raise TypeError(
            f"the examples of a batch of type {type(batch).__name__} cannot be counted: a batch must be a tensor, or a "
            "tuple, list or mapping of them"
        )
    if isinstance(batch, list) and all(isinstance(text, str) for text in batch):
        return len(batch)
    return lengths[0] if lengths else 1


def _lengths(batch: Any) -> Iterable[int]:
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lengths(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _lengths(value)
    elif _is_array(batch):
        yield batch.shape[0]


def _is_array(value: Any) -> bool:
    """Whether it is a tensor, or an array of another library, of at least one dimension."""
    return len(getattr(value, "shape", ())) > 0


def _cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Examples ``start`` to ``stop``: arrays are cut, and lists of that length without any, and tuples of strings.

    All else is shared.
    """
    if isinstance(batch, Mapping):
        return _with(batch, {key: _cut(value, start, stop, size) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(value, start, stop, size) for value in batch))
    texts = isinstance(batch, tuple) and all(isinstance(text, str) for text in batch)  # as a DataLoader puts them
    if (texts or isinstance(batch, list)) and len(batch) == size and not list(_lengths(batch)):
        return batch[start:stop]
    if isinstance(batch, tuple | list):
        return type(batch)(_cut(value, start, stop, size) for value in batch)
    return batch[start:stop] if _is_array(batch) else batch


def _with(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of that type, whose values may be its attributes too, with other values."""
    if not isinstance(mapping, dict | UserDict):  # a copy might share what it keeps with the original
        return values
    changed = copy.copy(mapping)
    try:
        changed.update(values)
    except Exception:  # it takes no other values, or not one by one
        return values
    return changed


def first(data: Iterable[Any], examples: int) -> list[Any]:
    """The batches of the first so many examples, the last of them cut; no more of the data is read."""
    _check_iterable(data)
    batches: list[Any] = []
    for batch in data:
        size = _size(batch)
        if size >= examples:
            return [*batches, batch if size == examples else _cut(batch, 0, examples, size)]
        batches.append(batch)
        examples -= size
    return batches
