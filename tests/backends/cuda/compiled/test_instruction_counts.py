"""Executed instructions per 32 weights in the machine code for sm_90a, and no atomic sums of floats."""

from __future__ import annotations

import pytest

from helpers.cuda_compiled import compiled, cuobjdump, needs_nvcc
from sne_fast.benchmark.instructions import CHIPS, Config, Count, count, read_kernels, training_kernels

pytestmark = [pytest.mark.build, needs_nvcc, pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")]

FILES = {
    "sums of elements": "chunk_encode/pool_backward",
    "forward": "chunk_encode/forward_sm90",
    "block backward": "chunk_encode/operands_bfloat",
    "pool backward": "chunk_encode/pool_backward",
    "weight gradients": "chunk_encode/weight_grad",
}
LIMITS = {
    "sums of elements": 240,
    "forward": 8_050,
    "block backward": 18_300,
    "pool backward": 8_650,
    "weight gradients": 1_050,
}
"""Warp instructions per 32 weights at width 64, 4 heads, chunks of 32, bfloat16: what they are, and 2 % on top."""


def counted(title: str, file: str) -> Count:
    config = Config()
    kernel = next(kernel for kernel in training_kernels(config, "bfloat16", True) if kernel.title == title)
    (function,) = read_kernels(compiled(file).path, "90a", kernel.pattern)
    return count(function, kernel, config, CHIPS["h100"])


@pytest.mark.parametrize(("title", "file"), FILES.items())
def test_instructions_stay_below_their_limit(title: str, file: str) -> None:
    found = counted(title, file)
    print(title, found)
    assert found.instructions <= LIMITS[title], found
    assert found.float_atomics == 0 and found.spills == 0, found
