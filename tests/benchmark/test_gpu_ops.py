"""Ops measured for `bench/gpu_suite.py`, tried on the CPU: which backend runs what is timed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sne_fast.benchmark import gpu_ops
from sne_fast.benchmark.gpu_ops import Row
from sne_fast.ops import found_backends
from sne_fast.ops.backend import Kernel

CPU = torch.device("cpu")
MEASURES: dict[str, Callable[[], Iterator[Row]]] = {
    "chunk_encode": lambda: gpu_ops.chunk_encode(CPU, torch.float32, 2000, 1e9, "reference"),
    "set_attention": lambda: gpu_ops.set_attention(CPU, torch.float32, 200, 16, 2, 1e9, "reference"),
    "set_block": lambda: gpu_ops.set_block(CPU, torch.float32, 200, 16, 2, 1e9, "reference"),
    "segment_pool": lambda: gpu_ops.segment_pool(CPU, torch.float32, 256, 32, 1e9, "reference"),
    "feed_forward": lambda: gpu_ops.feed_forward(CPU, torch.float32, 64, 1e9, "reference"),
}


@pytest.mark.parametrize("op", MEASURES)
def test_the_step_that_is_timed_runs_backward_on_the_same_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[tuple[str, str]] = Counter()

    def counted(backend: str, name: str, kernel: Kernel) -> Kernel:
        def run(*args: Any) -> Any:
            calls[backend, name] += 1
            return kernel(*args)

        return run

    for name, backend in found_backends.BACKENDS.items():
        kernels = {each: counted(name, each, kernel) for each, kernel in backend.kernels.items()}
        monkeypatch.setitem(found_backends.BACKENDS, name, dataclasses.replace(backend, kernels=kernels))
    [row] = MEASURES[op]()
    assert row["backend"] == "reference" and row["step_seconds"] > 0
    packing = "gather_chunks"  # of the networks, before anything is timed
    assert {backend for backend, name in calls if name != packing} == {"reference"}
    assert calls["reference", op] > 0 and calls["reference", f"{op}_backward"] > 0


def test_without_a_measured_limit_a_row_has_no_share_of_it() -> None:
    [row] = gpu_ops.segment_pool(CPU, torch.float32, 256, 32, None, "reference")
    assert row["forward_seconds"] > 0 and row["forward_fraction_of_copy"] is None
    [row] = gpu_ops.segment_pool(CPU, torch.float32, 256, 32, 1e9, "reference")
    assert row["forward_fraction_of_copy"] > 0
