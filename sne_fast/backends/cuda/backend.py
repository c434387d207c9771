"""The CUDA C++ backend: kernels of csrc/cuda, built when asked for, NVIDIA GPUs from compute capability 8.0.

With ``SNE_FAST_CUDA_EMULATED`` a host build of the same kernels takes CPU tensors, for tests: never by ``auto``.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from ...ops.backend import Backend
from ...ops.schema import REQUIRED_OPS
from .. import gpu_runs
from . import library, winners

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def unavailable() -> list[str]:
    reasons = list(library.reasons())
    if library.EMULATED:
        return reasons
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return [*reasons, "torch finds no NVIDIA GPU here"]
    if reasons:
        return reasons
    # One GPU of several that can run it is enough; why_not asks about the one at hand.
    of_devices = [library.device_reasons(index) for index in range(torch.cuda.device_count())]
    return [] if not all(of_devices) else list(dict.fromkeys(reason for found in of_devices for reason in found))


@functools.cache
def _device_reasons(index: int) -> list[str]:
    return library.device_reasons(index)


@functools.cache
def _module(op: str) -> Any:
    return importlib.import_module(f"{__package__}.{op}")


def _computed_in(op: str, args: tuple[Any, ...]) -> tuple[torch.dtype, torch.device]:
    if op == "gather_chunks":
        return args[3], args[1].device
    return args[1 if op.endswith("_backward") else 0].dtype, args[0].device


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    dtype, device = _computed_in(op, args)
    forward = op.removesuffix("_backward")
    reasons = []
    if device.type == "cuda":
        reasons += _device_reasons(torch.cuda.current_device() if device.index is None else device.index)
    if dtype not in DTYPES and forward != "gather_chunks":
        reasons.append(f"computes float32, float16 and bfloat16, got {dtype}")
    return reasons or _module(forward).why_not(op, args)


def _kernel(op: str, *args: Any) -> Any:
    return getattr(_module(op.removesuffix("_backward")), op)(*args)


def describe() -> str:
    """Return what the library was built for, or why there is none, and which GPUs have run it."""
    reasons = library.reasons()
    built = f"not here: {reasons[0].splitlines()[0]}" if reasons else f"built for {' '.join(library.architectures())}"
    return f"{built}; {gpu_runs.sentence('cuda', VERIFIED_WITHOUT_A_GPU)}"


FOLDER = Path(__file__).parent
VERIFIED_WITHOUT_A_GPU = "checked in an emulator on the host, and compiled for sm_80, sm_90a and sm_100"

BACKEND = Backend(
    name="cuda",
    kernels={op: functools.partial(_kernel, op) for name in REQUIRED_OPS for op in (name, f"{name}_backward")},
    devices=("cpu",) if library.EMULATED else ("cuda",),
    priority=100,  # below Triton, except for calls that a committed measurement names
    unavailable=unavailable,
    why_not=why_not,
    auto_devices=("cuda",),
    self_test=True,
    sources=(FOLDER, FOLDER.parent / "gpu_plans", library.LIBRARY_FILE),
    preferred=winners.preferred,
    describe=describe,
)
