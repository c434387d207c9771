"""Work on many items in order, that of items in stores elsewhere done ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..data.remote.failures import interruptible

__all__ = ["THREADS", "in_order"]

T = TypeVar("T")
R = TypeVar("R")

THREADS = 16
"""Threads that wait for stores, most of the time for one request each."""
_MOST = 64


def in_order(
    work: Callable[[T], R], items: Iterable[T], elsewhere: Callable[[T], bool], most: int = _MOST
) -> Iterator[R]:
    """Yield what `work` makes of each item, in order of the items; an error of it is raised in its place.

    Args:
        work: is called by this thread or another.
        items: of any number; not many more of them are taken than were yielded.
        elsewhere: whether an item is to be worked on by another thread, ahead of its turn.
        most: items that are worked on or wait at the same time.
    """
    waiting: deque[tuple[T, Future[R] | None]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="sne_fast-ahead")  # starts threads when they are needed

    def first() -> R:
        item, future = waiting.popleft()
        return work(item) if future is None else future.result()

    try:
        with interruptible():
            for item in items:
                waiting.append((item, pool.submit(work, item) if elsewhere(item) else None))
                while waiting and (len(waiting) >= most or waiting[0][1] is None):
                    yield first()
            while waiting:
                yield first()
    finally:
        pool.shutdown(cancel_futures=True)
