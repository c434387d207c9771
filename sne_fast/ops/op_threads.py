"""Threads of the ops on a CPU, beside those of the ordinary operations of torch between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Before(threading.local):
    """Threads of torch before the outermost block of the calling thread, for which torch keeps their number."""

    threads: int | None = None


_before = _Before()


def threads_of_ops() -> int:
    """Return how many threads an op may use: those of torch, inside `one_thread_between_ops` those before it."""
    return torch.get_num_threads() if _before.threads is None else _before.threads


@contextmanager
def one_thread_between_ops() -> Iterator[None]:
    """Run ordinary operations of torch on one thread inside the ``with`` block, and ops on as many as before.

    Where tensors are small, to wake threads for every operation costs more than they save. Blocks may be nested. Python
    threads that have used torch before keep their number, except that products by MKL run on one thread in the whole
    process; a Python thread that uses torch for the first time during a block of another one is left with one thread.
    """
    if _before.threads is not None:
        yield
        return
    _before.threads = before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _before.threads = None
        torch.set_num_threads(before)
