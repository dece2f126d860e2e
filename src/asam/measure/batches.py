"""The data of a measurement: batches of any structure, counted and cut by examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    if isinstance(data, Tensor | str | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, such as [(inputs, targets)], got {type(data).__name__}")
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


def _size(batch: Any) -> int:
    """Length of the first dimension of the first tensor in a batch; 1 where there is no such tensor."""
    tensor = next((tensor for tensor in _tensors(batch) if tensor.ndim > 0), None)
    return 1 if tensor is None else tensor.shape[0]


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)


def _cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Examples ``start`` to ``stop``: tensors of that length are cut, everything else is shared."""
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim > 0 and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, start, stop, size) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(value, start, stop, size) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_cut(value, start, stop, size) for value in batch)
    return batch


def first(data: Iterable[Any], examples: int) -> list[Any]:
    """The batches of the first so many examples, the last of them cut; no more of the data is read."""
    batches: list[Any] = []
    for batch in data:
        size = _size(batch)
        if size >= examples:
            return [*batches, batch if size == examples else _cut(batch, 0, examples, size)]
        batches.append(batch)
        examples -= size
    return batches
