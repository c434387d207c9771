"""The Triton backend: nothing to compile at installation, any NVIDIA GPU from compute capability 8.0.

Triton itself is imported at the first call. With ``TRITON_INTERPRET=1`` the kernels also take CPU tensors, for tests:
never by ``auto``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ...ops.backend import Backend
from ...ops.schema import SCHEMAS
from .. import gpu_runs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def unavailable() -> list[str]:
    if INTERPRETED:
        return [] if importlib.util.find_spec("triton") else ["Triton is not installed"]
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return ["torch finds no NVIDIA GPU here"]
    reasons = [] if importlib.util.find_spec("triton") else ["Triton is not installed: pip install triton"]
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < CAPABILITY:
        reasons.append(f"needs a GPU of compute capability 8.0 or more, the best here has {best[0]}.{best[1]}")
    return reasons


@functools.cache
def _module(op: str) -> Any:
    return importlib.import_module(f"{__package__}.{op}")


@functools.cache
def _device_reasons(index: int) -> list[str]:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= CAPABILITY:
        return []
    return [f"needs a GPU of compute capability 8.0 or more, cuda:{index} has {major}.{minor}"]


def _computed_in(op: str, args: tuple[Any, ...]) -> tuple[torch.dtype, torch.device]:
    if op == "gather_chunks":
        return args[3], args[1].device
    return args[1 if op.endswith("_backward") else 0].dtype, args[0].device


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    dtype, device = _computed_in(op, args)
    reasons = []
    if device.type == "cuda":
        reasons += _device_reasons(torch.cuda.current_device() if device.index is None else device.index)
        # Cutting and casting is for any dtype; products are not.
        if dtype not in DTYPES and not op.startswith("gather_chunks"):
            reasons.append(f"computes float32, float16 and bfloat16, got {dtype}")
    elif dtype == torch.bfloat16:
        reasons.append("Triton's interpreter does not compute bfloat16")
    forward = op.removesuffix("_backward")
    return reasons or _module(forward).why_not(op, args)


def _kernel(op: str, *args: Any) -> Any:
    return getattr(_module(op.removesuffix("_backward")), op)(*args)


FOLDER = Path(__file__).parent
VERIFIED_WITHOUT_A_GPU = "checked in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100"

BACKEND = Backend(
    name="triton",
    kernels={op: functools.partial(_kernel, op) for op in SCHEMAS},
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    priority=200,
    unavailable=unavailable,
    why_not=why_not,
    auto_devices=("cuda",),
    self_test=True,
    sources=(FOLDER, FOLDER.parent / "gpu_plans"),
    fusions=("feed_forward",),
    packages=("triton",),
    describe=lambda: f"compiles at the first call; {gpu_runs.sentence('triton', VERIFIED_WITHOUT_A_GPU)}",
)
