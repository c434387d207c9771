"""The largest candidates of the tuner for whole blocks, compiled for a GPU that is not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.op_cases import products
from helpers.triton_compiled import KINDS, SHARED_LIMIT, compile_block
from sne_fast.backends.gpu_plans.lengths import Lengths
from sne_fast.backends.triton import launches, pool_block, pool_block_kernels, set_block, set_block_kernels
from sne_fast.backends.triton.tune_cases import TUNED, Case, Inputs

pytestmark = pytest.mark.build

MODULES = {"set_block": (set_block, set_block_kernels), "pool_block": (pool_block, pool_block_kernels)}
ARCH, SHORT = 90, Lengths(100, 3, 3)


def largest(case: Case) -> dict[str, Any]:
    """Return the candidate with the largest tiles, by the fewest warps."""
    return max(case.candidates, key=lambda c: (sum(c["blocks"].values()), c["num_stages"], -c["num_warps"]))


@pytest.mark.variants(
    "op, h, kind",
    [("set_block", 64, (torch.bfloat16, "highest")), ("pool_block", 64, (torch.bfloat16, "highest"))],
    [(op, h, kind) for op in MODULES for h in (32, 64) for kind in KINDS],
)
def test_the_largest_candidates_fit_into_shared_memory(op: str, h: int, kind: tuple[torch.dtype, str]) -> None:
    dtype, precision = kind
    module, kernels = MODULES[op]
    with products(precision):
        inputs = Inputs(h, 4, dtype, torch.device("cpu"), share=0.0)
        cases = [case for case in TUNED[op].cases(inputs) if case.when["length"] in ("8", "ieee8")]
        rows = torch.empty(1, h, dtype=dtype, device="meta")
        for case in cases:
            kernel, candidate = case.when["kernel"], largest(case)
            with launches.trial(op, {"when": dict(case.when), **candidate}):
                plan = module.Plan.make(kernel, rows, 4, True, SHORT, ARCH)
            assert plan.sizes.blocks == candidate["blocks"]
            result = compile_block(getattr(kernels, f"{kernel}_kernel"), plan, dtype, ARCH)
            print(kernel, candidate, result.registers, result.local_bytes, result.shared_bytes)
            assert result.shared_bytes <= SHARED_LIMIT[ARCH]
    assert cases
