"""Ranges of files in memory, as many as a limit of bytes allows, and the threads that fetch them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import TypeVar

__all__ = ["IN_FLIGHT", "RANGES", "RangeCache", "fetched"]

T = TypeVar("T")

IN_FLIGHT = 16
"""Requests of a process at the same time."""
_MOST_BYTES = 2**27


def fetched(work: Callable[[], T]) -> Future[T]:
    """Return what `work` will return, in a thread that waits for a store; work must not wait for other such work."""
    return _pool(os.getpid()).submit(work)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; one that was forked has none of its parent's."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="sne_fast-remote")


class RangeCache:
    """Ranges by key, of which those used last are kept.

    Args:
        most_bytes: of all ranges together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._lock = Lock()
        self._held: OrderedDict[Hashable, tuple[int, Future[bytes]]] = OrderedDict()

    def get(self, key: Hashable, count: int, work: Callable[[], bytes]) -> Future[bytes]:
        """Return the range of a key, of `count` bytes, which a thread fetches by `work` unless it is there.

        A range that failed is fetched again.
        """
        with self._lock:
            found = self._held.get(key)
            if found is not None and not (found[1].done() and found[1].exception() is not None):
                self._held.move_to_end(key)
                return found[1]
            return self._keep(key, count, fetched(work))

    def put(self, key: Hashable, content: bytes) -> None:
        """Keep a range that was fetched in another way."""
        future: Future[bytes] = Future()
        future.set_result(content)
        with self._lock:
            self._keep(key, len(content), future)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def forget(self) -> None:
        """Forget all, also what is being fetched."""
        self._lock = Lock()
        self._held, self._bytes = OrderedDict(), 0

    def _keep(self, key: Hashable, count: int, future: Future[bytes]) -> Future[bytes]:
        before = self._held.pop(key, None)
        self._bytes += count - (before[0] if before is not None else 0)
        self._held[key] = count, future
        while self._bytes > self._most and len(self._held) > 1:
            _, (dropped, _) = self._held.popitem(last=False)
            self._bytes -= dropped
        return future


RANGES = RangeCache(_MOST_BYTES)
"""Those of this process."""
