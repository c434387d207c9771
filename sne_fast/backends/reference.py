"""The plain PyTorch backend: every op, any device and dtype, in tiles."""

from __future__ import annotations

from typing import Any

from ..ops import reference
from ..ops.schema import SCHEMAS

NAME = "reference"
DEVICES: tuple[str, ...] = ()
PRIORITY = 0
KERNELS = {op: getattr(reference, op) for op in SCHEMAS}


def unavailable() -> list[str]:
    return []


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    return []
