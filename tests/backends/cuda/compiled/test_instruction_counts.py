"""Executed instructions per 32 weights in the machine code for sm_90a, and no atomic sums of floats."""

from __future__ import annotations

import pytest

from helpers.cuda_compiled import compiled, cuobjdump, needs_nvcc
from sne_fast.benchmark.instructions import CHIPS, Config, Count, count, read_kernels, training_kernels

pytestmark = [pytest.mark.build, needs_nvcc, pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")]

FULL = "chunk_encode/full_backward_bfloat"
FILES = {
    (32, "forward"): "chunk_encode/forward_sm90",
    (32, "forward of the backward"): "chunk_encode/forward_sm90",
    (32, "pool backward"): FULL,
    (32, "block backward"): FULL,
    (32, "sums of codes"): FULL,
    (32, "scalar backward"): FULL,
    (64, "pool backward"): "chunk_encode/pool_backward",
    (64, "block backward"): "chunk_encode/operands_bfloat",
    (64, "weight gradients"): "chunk_encode/weight_grad",
    (64, "sums of elements"): "chunk_encode/pool_backward",
}
"""Files by the size of chunks and the name of the kernel: chunks of 32 have kernels of their own."""
LIMITS = {
    (32, "forward"): 8_150,
    (32, "forward of the backward"): 8_100,
    (32, "pool backward"): 560,
    (32, "block backward"): 4_880,
    (32, "sums of codes"): 430,
    (32, "scalar backward"): 3_350,
    (64, "pool backward"): 10_650,
    (64, "block backward"): 27_000,
    (64, "weight gradients"): 1_050,
    (64, "sums of elements"): 240,
}
"""Warp instructions per 32 weights at width 64, 4 heads, bfloat16: what they are, and 2 % on top."""
STEP_LIMIT = 35_200
"""Of a whole training step with chunks of 32."""


def counted(chunk_size: int, title: str, file: str) -> Count:
    config = Config(chunk_size=chunk_size)
    kernel = next(kernel for kernel in training_kernels(config, "bfloat16", True) if kernel.title == title)
    (function,) = read_kernels(compiled(file).path, "90a", kernel.pattern)
    return count(function, kernel, config, CHIPS["h100"])


@pytest.mark.parametrize(
    ("chunk_size", "title", "file"), [(size, title, file) for (size, title), file in FILES.items()]
)
def test_instructions_stay_below_their_limit(chunk_size: int, title: str, file: str) -> None:
    found = counted(chunk_size, title, file)
    print(title, found)
    assert found.instructions <= LIMITS[chunk_size, title], found
    assert found.float_atomics == 0 and found.spills == 0, found


def test_a_training_step_stays_below_its_limit() -> None:
    kernels = training_kernels(Config(), "bfloat16", True)
    files = {title: file for (size, title), file in FILES.items() if size == Config().chunk_size}
    total = sum(kernel.launches * counted(32, kernel.title, files[kernel.title]).instructions for kernel in kernels)
    print(total)
    assert total <= STEP_LIMIT
