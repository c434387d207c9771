"""Limits of the machine: the rate of its matrix products, and the operations that the chunk stage needs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from ..backends.cpu import library
from ..data.batch import WeightBatch

ROWS, INNER, COLUMNS = 8192, 64, 192
"""The product of a full block's projections: 8192 x 64 by 64 x 192."""
FORWARDS_PER_STEP = 4
"""A training step is counted as four forwards: one, its recomputation, and two forwards' worth of products."""


def chunk_operations(batch: WeightBatch, width: int) -> float:
    """Count the operations of the chunk stage's three full blocks, forward: ``8 h^2 + 4 n h`` per weight.

    n is the length of the weight's own chunk; everything else (scalar block, pools, later stages) is not counted.
    """
    length = batch.chunk_ptr_host.diff().double()
    return 3 * float((length * (8 * width**2 + 4 * length * width)).sum())


@functools.cache
def _products() -> dict[str, Callable[[], float]]:
    """Return by name a function that runs one burst and returns its rate in operations per second."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(ROWS, INNER, generator=generator)
    b = torch.randn(INNER, COLUMNS, generator=generator)
    out = torch.empty(ROWS, COLUMNS)
    operations = 2.0 * ROWS * INNER * COLUMNS

    def timed(call: Callable[[], object], products: int) -> float:
        start = time.perf_counter()
        call()
        return products * operations / (time.perf_counter() - start)

    def with_torch() -> float:
        with torch.no_grad():
            return timed(lambda: torch.matmul(a, b, out=out), 1)

    bursts = {"torch": with_torch}
    if not library.reasons():
        rate = library.library().sne_fast_cpu_product_rate

        def own() -> float:
            status: list[int] = []
            found = timed(lambda: status.append(rate(0, ROWS, INNER, COLUMNS, 4, torch.get_num_threads())), 4)
            library.check(status[0], "product_rate")
            return found

        bursts["own"] = own
    return bursts


def product_rate(seconds: float = 0.06) -> float:
    """Measure the best rate of products, torch's and the backend's own, on all threads, for about `seconds`: op/s.

    It falls with whatever else the machine does, so take it right beside the measurement that it limits.
    """
    best = 0.0
    for burst in _products().values():
        end = time.perf_counter() + seconds / len(_products())
        burst()  # wakes the threads
        while time.perf_counter() < end:
            best = max(best, burst())
    return best
