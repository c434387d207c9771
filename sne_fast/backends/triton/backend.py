"""The Triton backend: nothing to compile at installation, any NVIDIA GPU from compute capability 8.0.

Triton itself is imported at the first call. With ``TRITON_INTERPRET=1`` the kernels also take CPU tensors, for tests,
and only when the backend is chosen by name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch

from ...ops import devices
from ...ops.backend import Arguments, Backend
from ...ops.schema import OPTIONAL_OPS, REQUIRED_OPS
from .. import gpu_runs
from ..gpu_plans.op_modules import OpModules, computed_in

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FOLDER = Path(__file__).parent
OPS = OpModules(__package__)
VERIFIED_WITHOUT_A_GPU = "checked in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100"


@functools.cache
def unavailable() -> list[str]:
    """Return why the backend cannot run on this machine; empty if it can."""
    if INTERPRETED:
        return [] if importlib.util.find_spec("triton") else ["Triton is not installed"]
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return ["torch finds no NVIDIA GPU here"]
    reasons = [] if importlib.util.find_spec("triton") else ["Triton is not installed: pip install triton"]
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < MIN_CAPABILITY:
        reasons.append(f"needs a GPU of compute capability 8.0 or more, the best here has {best[0]}.{best[1]}")
    return reasons


def _device_reasons(device: torch.device) -> list[str]:
    major, minor = devices.capability(device)
    if (major, minor) >= MIN_CAPABILITY:
        return []
    return [f"needs a GPU of compute capability 8.0 or more, cuda:{devices.index(device)} has {major}.{minor}"]


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why the backend cannot run a call; empty if it can."""
    dtype, device = computed_in(op, args)
    reasons = []
    if device.type == "cuda":
        reasons += _device_reasons(device)
        if dtype not in DTYPES and not op.startswith("gather_chunks"):  # which has no products and takes any dtype
            reasons.append(f"computes float32, float16 and bfloat16, got {dtype}")
    elif dtype == torch.bfloat16:
        reasons.append("Triton's interpreter does not compute bfloat16")
    return reasons or OPS.why_not(op, args)


BACKEND = Backend(
    name="triton",
    kernels=OPS.kernels(op for name in (*REQUIRED_OPS, *OPTIONAL_OPS) for op in (name, f"{name}_backward")),
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    priority=200,
    unavailable=unavailable,
    why_not=why_not,
    auto_devices=("cuda",),
    self_test=True,
    sources=(FOLDER, FOLDER.parent / "gpu_plans"),
    fusions=OPTIONAL_OPS,
    packages=("triton",),
    describe=lambda: f"compiles at the first call; {gpu_runs.sentence('triton', VERIFIED_WITHOUT_A_GPU)}",
)
