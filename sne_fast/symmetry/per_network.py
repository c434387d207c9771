"""Batches in which every network has a symmetry of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..data.batch import WeightBatch
from .boxes import SymmetryError
from .core import Symmetry

Item = TypeVar("Item")


def one_per_network(symmetries: Symmetry | Sequence[Symmetry], count: int, where: str) -> Sequence[Symmetry]:
    """Return `count` symmetries, one symmetry repeated where there is only one for all.

    Raises:
        SymmetryError: another number of symmetries; the message starts with `where`.
        TypeError: anything else.
    """
    if isinstance(symmetries, Symmetry):
        return [symmetries] * count
    if not isinstance(symmetries, Sequence) or not all(isinstance(one, Symmetry) for one in symmetries):
        raise TypeError(
            f"{where}: symmetries must be one Symmetry, or one per network, got {type(symmetries).__name__}"
        )
    if len(symmetries) != count:
        raise SymmetryError(
            f"{where}: symmetries must be one Symmetry, or one per network ({count}), got {len(symmetries)}"
        )
    return symmetries


def group_by_identity(items: Sequence[Item]) -> list[tuple[Item, list[int]]]:
    """Return every object once, in the order in which they first occur, with its places in the sequence."""
    places: dict[int, tuple[Item, list[int]]] = {}
    for i, item in enumerate(items):
        places.setdefault(id(item), (item, []))[1].append(i)
    return list(places.values())


def check_named(batch: WeightBatch, where: str) -> None:
    """Check that the tensors of a batch can be told apart.

    Raises:
        SymmetryError: no names or shapes; the message starts with `where`.
        TypeError: no batch.
    """
    if not isinstance(batch, WeightBatch):
        raise TypeError(f"{where}: batch must be a WeightBatch, got {type(batch).__name__}; use sne_fast.pack")
    if len(batch) == 0:
        return
    if not batch.names or not batch.shapes:
        raise SymmetryError(f"{where}: the batch must have names and shapes, as those that pack makes have")


def kernels_of(batch: WeightBatch, b: int) -> tuple[bool, ...]:
    """Return which tensors of network b were cut with kernel dimensions."""
    first, last = batch.layer_ptr_host[batch.network_ptr_host[b : b + 2]].tolist()
    return tuple(batch.kernels[first:last].tolist())


def for_network(batch: WeightBatch, b: int, where: str, make: Callable[[], Item]) -> Item:
    """Return `make()`, and name network b in the message of a `SymmetryError`."""
    try:
        return make()
    except SymmetryError as error:
        raise SymmetryError(f"{where}: {batch.network_name(b)}: {error}") from None
