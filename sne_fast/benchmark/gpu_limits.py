"""Limits of a GPU, measured on it: copy bandwidth, matrix products, exponentials."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median

import torch

from .contenders import now

COPIED_BYTES = 1 << 31
PRODUCT_SIZE = 8192
EXPONENTIALS_PER_ELEMENT = 256
EXPONENTIAL_BLOCK = 1024
LEAST_RUNS = 5


def median_seconds(call: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Return the median time of a call, by device events on a GPU: two to warm up, then at least five in `budget` s."""
    call()
    start = now(device)
    call()
    runs = max(LEAST_RUNS, min(100, int(budget / max(1e-6, now(device) - start))))
    if device.type != "cuda":
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return median(seconds)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return median(begin.elapsed_time(end) / 1e3 for begin, end in marks)


def copy_bandwidth(device: torch.device, nbytes: int = COPIED_BYTES) -> float:
    """Measure the bytes read plus written per second by a large copy inside the device's memory."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), device)


def product_rates(device: torch.device, size: int = PRODUCT_SIZE) -> dict[str, float]:
    """Measure the operations per second of a square product of random numbers: bfloat16, float16, tf32, float32."""
    rates: dict[str, float] = {}
    before = torch.get_float32_matmul_precision()
    try:
        for name, dtype, precision in (
            ("bfloat16", torch.bfloat16, before), ("float16", torch.float16, before),
            ("tf32", torch.float32, "high"), ("float32", torch.float32, "highest"),
        ):  # fmt: skip
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            product = functools.partial(torch.matmul, a, b, out=torch.empty_like(a))
            rates[name] = 2.0 * size**3 / median_seconds(product, device)
    finally:
        torch.set_float32_matmul_precision(before)
    return rates


def exponential_rate(device: torch.device, elements: int = 1 << 26) -> float:
    """Measure the exponentials per second in registers, by a Triton kernel that chains them.

    Raises:
        ImportError: Triton is not installed.
    """
    from .exponential_kernels import exponential_chain_kernel

    x, out = torch.rand(elements, device=device), torch.empty(elements, device=device)
    grid = (elements // EXPONENTIAL_BLOCK,)
    seconds = median_seconds(
        lambda: exponential_chain_kernel[grid](x, out, EXPONENTIALS_PER_ELEMENT, EXPONENTIAL_BLOCK), device
    )
    return grid[0] * EXPONENTIAL_BLOCK * EXPONENTIALS_PER_ELEMENT / seconds
