"""The plain PyTorch backend: every op, any device and dtype, in tiles."""

from __future__ import annotations

import functools
from typing import Any

from ...ops import direct_checks, reference
from ...ops.backend import Backend
from ...ops.schema import SCHEMAS


def _run(op: str, *args: Any) -> Any:
    direct_checks.direct_call(op, args)
    return getattr(reference, op)(*args)


BACKEND = Backend(name="reference", kernels={op: functools.partial(_run, op) for op in SCHEMAS})
