"""What every launch needs: sizes from the committed tables, dtypes of operands and sums, the device.

``tables/OP.json`` holds rules ``{"when": {...}, "num_warps": 4, "num_stages": 2, "blocks": {"BLOCK": 64}}``; the first
whose ``when`` matches is taken (a value or a list of values per key; a key left out matches all). ``python -m
sne_fast.backends.triton.tune`` puts measured rules in front of the general ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.precision import product_precision
from ...ops.schema import accumulate_dtype

__all__ = ["Launch", "architecture", "launch", "next_power_of_2", "on_device", "product_precision", "programs_of",
           "sum_dtype", "table", "trial", "triton_dtype"]  # fmt: skip

TABLES = Path(__file__).with_name("tables")
INTERPRETED = bool(triton.knobs.runtime.interpret)
TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES}


_trials: dict[str, list[dict[str, Any]]] = {}


@dataclass(frozen=True)
class Launch:
    """Sizes of one launch; ``blocks`` are constexpr arguments of the kernel."""

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.blocks[name]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch that are not the kernel's; Triton 3.10 flips the default of the last."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def _matches(when: Mapping[str, Any], query: Mapping[str, Any]) -> bool:
    return all(query.get(key) in (want if isinstance(want, list) else [want]) for key, want in when.items())


@functools.cache
def table(op: str) -> tuple[dict[str, Any], ...]:
    """The rules of ``tables/OP.json``, first match first."""
    return tuple(json.loads((TABLES / f"{op}.json").read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=4096)
def launch(
    op: str,
    *,
    kernel: str | None = None,
    h: int | None = None,
    heads: int | None = None,
    length: int | str | None = None,
    dtype: torch.dtype | None = None,
    arch: int | None = None,
) -> Launch:
    """Sizes of ``op`` by kernel (where it has several), width, heads, length class, dtype and :func:`architecture`.

    Raises:
        KeyError: where no rule matches.
    """
    name = DTYPE_NAMES[dtype] if dtype is not None else None
    d = h // heads if h and heads else None
    query = {"kernel": kernel, "h": h, "heads": heads, "d": d, "length": length, "dtype": name, "arch": arch}
    for rule in (*_trials.get(op, ()), *table(op)):
        if _matches(rule.get("when", {}), query):
            return Launch(rule["num_warps"], rule["num_stages"], rule.get("blocks", {}))
    raise KeyError(f"{op}: no launch sizes for {query} in {TABLES / f'{op}.json'}")


@contextmanager
def trial(op: str, rule: dict[str, Any]) -> Iterator[None]:
    """Inside the ``with`` block ``rule`` stands before those of the table (for the tuner)."""
    _trials.setdefault(op, []).insert(0, rule)
    launch.cache_clear()
    try:
        yield
    finally:
        _trials[op].remove(rule)
        launch.cache_clear()


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """80, 90, 100, ... for a CUDA device; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_of(device: torch.device) -> int:
    """Programs that share out tiles and sum parameter gradients: one per multiprocessor, or a small multiple."""
    if device.type != "cuda":
        return 1  # the interpreter: few programs, each with several tiles
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return TRITON_DTYPES[dtype]


def sum_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of :func:`accumulate_dtype`: what softmax, norms and sums are computed in."""
    return TRITON_DTYPES[accumulate_dtype(dtype)]


def on_device(tensor: Tensor) -> Any:
    """Context in which ``tensor``'s GPU is the current one, as Triton launches on that; nothing for CPU tensors."""
    return torch.cuda.device_of(tensor)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
