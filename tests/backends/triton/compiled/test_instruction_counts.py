"""Executed instructions per 32 weights of the Triton kernels, for sm_90 and sm_80, and no atomic sums."""

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


LIMITS_OF_SM80 = {"pool backward": 1_110, "weight gradients": 605}


def counted(title: str, architecture: int = 90) -> Count:
    kernel = next(kernel for kernel in KERNELS if kernel.title == title)
    return count_kernel(kernel, Config(), "bfloat16", architecture, CHIPS["h100"])


@pytest.mark.parametrize("title", LIMITS_OF_SM80)
def test_instructions_for_sm80_stay_below_their_limit(title: str) -> None:
    """Their loops end by a call of a label."""
    found = counted(title, 80)
    print(title, found)
    assert found.instructions <= LIMITS_OF_SM80[title], found
    assert found.float_atomics == 0 and not found.spills, found


@pytest.mark.parametrize("title", LIMITS)
def test_instructions_stay_below_their_limit(title: str) -> None:
    found = counted(title)
    print(title, found)
    assert found.instructions <= LIMITS[title], found
    assert found.float_atomics == 0, found
    assert title == "block backward" or not found.spills, found
