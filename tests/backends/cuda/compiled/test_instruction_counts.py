"""Executed instructions per 32 weights in machine code for sm_80, sm_90a and sm_100, and no atomic sums of floats."""

from __future__ import annotations

import pytest

from helpers.cuda_compiled import compiled, cuobjdump, needs_nvcc
from sne_fast.benchmark.instructions import CHIPS, Config, Count, count, read_kernels, training_kernels

pytestmark = [pytest.mark.build, needs_nvcc, pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")]

LIMITS = {
    ("90a", 32): {
        "forward": 7_920,
        "forward of the backward": 7_700,
        "pool backward": 553,
        "block backward": 4_880,
        "sums of codes": 417,
        "scalar backward": 3_340,
    },
    ("90a", 64): {
        "pool backward": 10_650,
        "block backward": 27_000,
        "weight gradients": 1_050,
        "sums of elements": 230,
    },
    ("80", 32): {
        "forward": 8_450,
        "forward of the backward": 8_225,
        "pool backward": 581,
        "block backward": 5_210,
        "sums of codes": 408,
        "scalar backward": 3_480,
    },
    ("100", 32): {
        "forward": 8_380,
        "forward of the backward": 8_050,
        "pool backward": 484,
        "block backward": 4_660,
        "sums of codes": 404,
        "scalar backward": 3_040,
    },
}
"""Warp instructions per 32 weights at width 64, 4 heads, bfloat16: what they are, and 2 % on top.

Here all architectures are compiled together, so that the forward for sm_100 lacks the instructions newer than sm_80.
"""
STEP_LIMITS = {"90a": 34_550, "80": 36_750, "100": 34_320}
"""Of a whole training step with chunks of 32."""
SPILLING = {("100", "scalar backward")}
"""Kernels that keep a few registers in memory."""


def counted(architecture: str, chunk_size: int, title: str) -> Count:
    config = Config(chunk_size=chunk_size)
    kernel = next(kernel for kernel in training_kernels(config, "bfloat16", architecture) if kernel.title == title)
    (function,) = read_kernels(compiled(kernel.file).path, architecture, kernel.pattern)
    return count(function, kernel, config, CHIPS["h100"])


@pytest.mark.parametrize(
    ("architecture", "chunk_size", "title"), [(*key, title) for key, titles in LIMITS.items() for title in titles]
)
def test_instructions_stay_below_their_limit(architecture: str, chunk_size: int, title: str) -> None:
    found = counted(architecture, chunk_size, title)
    print(title, found)
    assert found.instructions <= LIMITS[architecture, chunk_size][title], found
    assert found.float_atomics == 0, found
    assert not found.spills or (architecture, title) in SPILLING, found


@pytest.mark.parametrize("architecture", STEP_LIMITS)
def test_a_training_step_stays_below_its_limit(architecture: str) -> None:
    kernels = training_kernels(Config(), "bfloat16", architecture)
    total = sum(kernel.launches * counted(architecture, 32, kernel.title).instructions for kernel in kernels)
    print(total)
    assert total <= STEP_LIMITS[architecture]


def test_all_architectures_do_the_same_work() -> None:
    """Each leaves the same products and, but for a few reciprocals, exponentials, so that no loop is counted wrong."""
    for title in LIMITS["80", 32]:
        found = [counted(architecture, 32, title) for architecture in STEP_LIMITS]
        assert len({round(one.matrix_operations) for one in found}) == 1, title
        exponentials = [one.classes.get("exponential", 0) for one in found]
        assert max(exponentials) <= 1.02 * min(exponentials), title
