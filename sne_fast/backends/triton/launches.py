"""Launches: sizes from the committed tables, dtypes of operands and sums, and the device.

``tables/OP.json`` holds rules ``{"when": {...}, "num_warps": 4, "num_stages": 2, "blocks": {"BLOCK": 64}}``; the first
whose ``when`` matches is taken (a value or a list of values per key; a key left out matches all). A rule may also hold
``maxnreg``, the most registers of a thread. ``python -m sne_fast.backends.triton.tune`` puts measured rules in front of
the general ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops import devices
from ...ops.schema import accumulate_dtype
from ...regular_files import read_json

TABLES = Path(__file__).with_name("tables")
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
    maxnreg: int | None = None

    def __getitem__(self, name: str) -> int:
        return self.blocks[name]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch that are not the kernel's. Triton 3.10 flips the default of the last one."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def _matches(when: Mapping[str, Any], query: Mapping[str, Any]) -> bool:
    return all(query.get(key) in (want if isinstance(want, list) else [want]) for key, want in when.items())


@functools.cache
def table(op: str) -> tuple[dict[str, Any], ...]:
    """Return the rules of ``tables/OP.json``, of which the first match counts."""
    return tuple(read_json(TABLES / f"{op}.json", list))


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
    """Return the sizes of ``op`` by kernel (if it has several), width, heads, length class, dtype and architecture.

    Raises:
        KeyError: if no rule matches.
    """
    name = DTYPE_NAMES[dtype] if dtype is not None else None
    d = h // heads if h and heads else None
    query = {"kernel": kernel, "h": h, "heads": heads, "d": d, "length": length, "dtype": name, "arch": arch}
    for rule in (*_trials.get(op, ()), *table(op)):
        if _matches(rule.get("when", {}), query):
            return Launch(rule["num_warps"], rule["num_stages"], rule.get("blocks", {}), rule.get("maxnreg"))
    raise KeyError(f"{op}: no launch sizes for {query} in {TABLES / f'{op}.json'}")


@contextmanager
def trial(op: str, rule: dict[str, Any]) -> Iterator[None]:
    """Put ``rule`` before those of the table inside the ``with`` block, for measurements."""
    _trials.setdefault(op, []).insert(0, rule)
    launch.cache_clear()
    try:
        yield
    finally:
        _trials[op].remove(rule)
        launch.cache_clear()


def architecture(device: torch.device) -> int:
    """Return 80, 90, 100, ... for a CUDA device, 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = devices.capability(device)
    return 10 * major + minor


def programs_of(device: torch.device) -> int:
    """Return the number of programs that share out tiles and sum parameter gradients: the multiprocessor count."""
    return devices.multiprocessors(device) if device.type == "cuda" else 1  # the interpreter: several tiles a program


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a dtype."""
    return TRITON_DTYPES[dtype]


def sum_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of the dtype of softmax, norms and sums."""
    return TRITON_DTYPES[accumulate_dtype(dtype)]


def on_device(tensor: Tensor) -> Any:
    """Make the GPU of ``tensor`` the current one, on which Triton launches; do nothing for CPU tensors."""
    return torch.cuda.device_of(tensor)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
