"""Many networks encoded: small ones together, in groups that threads read and pack ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.checkpoints import Checkpoint
from ..data.layer_stream import LayerStream

__all__ = ["PACKED_WEIGHTS", "are_several", "groups_of", "packed_ahead"]

PACKED_WEIGHTS = 200_000
"""Weights that are encoded in one call, of networks that are smaller."""
LEAST_BYTES = 2
"""Bytes of a weight in a file, by which its size bounds the number of its weights; quantised ones have fewer."""

Group = TypeVar("Group")
Packed = TypeVar("Packed")


def are_several(source: Any) -> bool:
    """Return whether a source of networks is an iterable of networks, and not one."""
    one = (nn.Module, Mapping, str, bytes, os.PathLike, Tensor, Checkpoint, LayerStream)
    return isinstance(source, Iterable) and not isinstance(source, one)


def groups_of(sources: Iterable[Any], most: int) -> Iterator[list[tuple[int, Any]]]:
    """Yield sources with their places: neighbours that have at most `most` weights together, or any other one alone.

    Modules, state_dicts and files are grouped; the size of a file bounds its weights, so that it need not be read.
    """
    held: list[tuple[int, Any]] = []
    weights = 0
    for place, source in enumerate(sources):
        size = _most_weights(source)
        if held and (size is None or weights + size > most):
            yield held
            held, weights = [], 0
        if size is None or size > most:
            yield [(place, source)]
        else:
            held.append((place, source))
            weights += size
    if held:
        yield held


def _most_weights(source: Any) -> int | None:
    """Return a bound of the number of weights; None where it is not known without reading."""
    if isinstance(source, nn.Module):
        return sum(tensor.numel() for tensor in (*source.parameters(), *source.buffers()))
    if isinstance(source, Mapping):
        values = list(source.values())
        return sum(v.numel() for v in values) if all(isinstance(v, Tensor) for v in values) else None
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        return os.path.getsize(source) // LEAST_BYTES
    return None


def packed_ahead(
    groups: Iterable[Group], pack: Callable[[Group], Packed], workers: int = 1
) -> Iterator[tuple[Group, Packed | Exception]]:
    """Yield groups with what `pack` returns for them, without gradients, or with its error.

    Groups are taken and packed by threads while others are used; as many are held as there are threads, and one.

    Args:
        groups: of any kind. With one thread they are yielded in order.
        pack: reads and packs a group.
        workers: threads.
    """
    taken, lock = iter(groups), threading.Lock()

    def take() -> tuple[Group, Packed | Exception] | None:
        with lock:
            try:
                group = next(taken)
            except StopIteration:
                return None
        try:
            with torch.no_grad():  # threads have modes of their own
                return group, pack(group)
        except Exception as error:
            return group, error

    with ThreadPoolExecutor(workers, thread_name_prefix="sne_fast-packing") as threads:
        waiting: deque[Future[tuple[Group, Packed | Exception] | None]] = deque(
            threads.submit(take) for _ in range(workers)
        )
        while waiting:
            found = waiting.popleft().result()
            if found is None:
                continue
            waiting.append(threads.submit(take))
            yield found
            del found  # before the next one is waited for
