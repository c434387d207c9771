"""Number of threads that torch, and with it the CPU backend, uses for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run the `with` block with `count` threads of torch, or with those there are if it is None.

    The setting is that of the whole process, not of the calling thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
