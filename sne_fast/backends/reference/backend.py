"""The plain PyTorch backend: every op, any device and dtype, in tiles."""

from __future__ import annotations

from ...ops import reference
from ...ops.backend import Backend
from ...ops.schema import SCHEMAS

BACKEND = Backend(name="reference", kernels={op: getattr(reference, op) for op in SCHEMAS})
