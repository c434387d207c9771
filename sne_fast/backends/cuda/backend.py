"""The CUDA C++ backend: kernels of csrc/cuda, built when asked for, NVIDIA GPUs from compute capability 8.0.

With ``SNE_FAST_CUDA_EMULATED`` a host build of the same kernels takes CPU tensors, for tests: never by ``auto``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from ...ops.schema import REQUIRED_OPS
from . import library, winners

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cpu",) if library.EMULATED else ("cuda",)
AUTO_DEVICES: tuple[str, ...] = ("cuda",)
PRIORITY = 100  # below Triton, but for calls that a committed measurement names: preferred()
SELF_TEST = True
SOURCES = ("backends/cuda", "backends/gpu_plans", library.LIBRARY_FILE.name)

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


def preferred(op: str, args: tuple[Any, ...]) -> bool:
    """Where a committed measurement on such a GPU says that this backend was faster than Triton's."""
    return winners.preferred(op, args)


def _kernel(op: str, *args: Any) -> Any:
    return getattr(_module(op.removesuffix("_backward")), op)(*args)


KERNELS = {op: functools.partial(_kernel, op) for name in REQUIRED_OPS for op in (name, f"{name}_backward")}
