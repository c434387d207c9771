"""Files elsewhere fetched before their turn, while the ones before them are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .failures import interruptible
from .paths import RemotePath, is_remote, place

__all__ = ["fetched_ahead"]

T = TypeVar("T")

_THREADS = 16
_FILES_AHEAD = 48  # of at most 2 MiB each in memory


def fetched_ahead(items: Iterable[T], urls: Callable[[T], Iterable[str]]) -> Iterator[T]:
    """Yield items, while threads fetch the beginnings of the files of those that follow, and all of small files.

    Errors are left to who reads the files.

    Args:
        items: of any kind.
        urls: returns the paths and URLs of the files of an item.
    """
    waiting: deque[tuple[T, list[Future[None]]]] = deque()
    in_flight = 0
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sne_fast-ahead")  # starts threads when they are needed
    try:
        with interruptible():
            for item in items:
                futures = [pool.submit(_fetch, url) for url in urls(item) if is_remote(url)]
                waiting.append((item, futures))
                in_flight += len(futures)
                while waiting and (in_flight > _FILES_AHEAD or not waiting[0][1]):
                    item, futures = waiting.popleft()
                    in_flight -= len(futures)
                    _wait(futures)
                    yield item
            for item, futures in waiting:
                _wait(futures)
                yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


def _fetch(url: str) -> None:
    try:
        path = place(url)
        if isinstance(path, RemotePath):
            path.fetch_small()
    except Exception:  # which reading it raises again
        return
