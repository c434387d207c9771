"""The Triton kernel that measures exponentials; importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential_chain_kernel(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Apply ``STEPS`` dependent exponentials to each element of a block, in registers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in range(STEPS):
        x = tl.exp2(-x)  # stays between 0 and 1
    tl.store(out_ptr + at, x)
