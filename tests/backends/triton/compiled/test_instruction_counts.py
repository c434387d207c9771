"""Executed instructions per 32 weights of the Triton kernels, in machine code for sm_90, and no atomic sums."""

from __future__ import annotations

import pytest

from sne_fast.benchmark.instructions import CHIPS, Config, Count
from sne_fast.benchmark.instructions.triton_kernels import KERNELS, count_kernel

pytestmark = pytest.mark.build

LIMITS = {
    "forward": 13_400,
    "pool backward": 1_090,
    "block backward": 8_780,
    "weight gradients": 537,
    "scalar backward": 9_780,
}
"""Warp instructions per 32 weights at width 64, 4 heads, chunks of 32, bfloat16: what they are, and 2 % on top."""


def counted(title: str) -> Count:
    kernel = next(kernel for kernel in KERNELS if kernel.title == title)
    return count_kernel(kernel, Config(), "bfloat16", 90, CHIPS["h100"])


@pytest.mark.parametrize("title", LIMITS)
def test_instructions_stay_below_their_limit(title: str) -> None:
    found = counted(title)
    print(title, found)
    assert found.instructions <= LIMITS[title], found
    assert found.float_atomics == 0, found
    assert title == "block backward" or not found.spills, found
