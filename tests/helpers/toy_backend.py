"""A backend made up in a test, put beside those of the package."""

from __future__ import annotations

import types

import torch

from helpers.op_cases import pool_case
from sne_fast import functional


def backend(name: str = "triton", **changes: object) -> types.ModuleType:
    """A backend module that pools by returning sevens."""
    module = types.ModuleType(name)

    def segment_pool(x, logits, ptr, ptr_host):
        segments, queries = ptr.shape[0] - 1, logits.shape[1]
        return x.new_full((segments, queries, x.shape[1]), 7), x.new_zeros((segments, queries))

    module.NAME, module.DEVICES, module.PRIORITY = name, ("cpu",), 1000  # type: ignore[attr-defined]
    module.KERNELS = {"segment_pool": segment_pool}  # type: ignore[attr-defined]
    module.unavailable = lambda: []  # type: ignore[attr-defined]
    module.why_not = lambda op, args: []  # type: ignore[attr-defined]
    for key, value in changes.items():
        setattr(module, key, value)
    return module


def pooled() -> float:
    x, logits, ptr = pool_case([2, 3], 8, 3, torch.float32)
    return float(functional.segment_pool(x, logits, ptr).flatten()[0])
