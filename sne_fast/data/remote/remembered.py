"""Answers that several threads ask for and that are found once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["Remembered"]

T = TypeVar("T")
_PATIENCE = 20  # times as long as it took to find an answer, it counts at least


class Remembered(Generic[T]):
    """Answers by key: the first thread that asks finds one, others wait for it. Errors are not kept.

    Args:
        most: the number of answers that are kept.
        seconds: how long an answer counts, longer for one that took long to find; None is for ever.
    """

    def __init__(self, most: int, seconds: float | None = None) -> None:
        self._most, self._seconds = most, seconds
        self._lock = Lock()
        self._held: OrderedDict[Hashable, tuple[float, Future[T]]] = OrderedDict()

    def get(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return the answer, by `find` where there is none or an old one."""
        with self._lock:
            found = self._held.get(key)
            if found is not None and time.monotonic() < found[0]:
                self._held.move_to_end(key)
                future = found[1]
                mine = False
            else:
                future, mine = Future[T](), True
                self._held[key] = float("inf"), future
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
        if mine:
            began = time.monotonic()
            try:
                future.set_result(find())
            except BaseException as error:
                with self._lock:
                    if key in self._held and self._held[key][1] is future:
                        del self._held[key]
                future.set_exception(error)
            else:
                self._keep(key, future, began)
        return future.result()

    def known(self, key: Hashable) -> T | None:
        """Return an answer that was found and still counts, else None."""
        with self._lock:
            found = self._held.get(key)
        if found is None or time.monotonic() >= found[0] or not found[1].done() or found[1].exception() is not None:
            return None
        return found[1].result()

    def put(self, key: Hashable, answer: T) -> None:
        """Keep an answer that was found in another way."""
        future: Future[T] = Future()
        future.set_result(answer)
        with self._lock:
            self._held[key] = float("inf"), future
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        self._keep(key, future, time.monotonic())

    def forget(self) -> None:
        """Forget all answers, also those that are being found."""
        self._lock = Lock()
        self._held = OrderedDict()

    def _keep(self, key: Hashable, future: Future[T], began: float) -> None:
        if self._seconds is None:
            return
        now = time.monotonic()
        with self._lock:
            if key in self._held and self._held[key][1] is future:
                self._held[key] = now + max(self._seconds, _PATIENCE * (now - began)), future
