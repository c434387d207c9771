"""The CUDA C++ engine: kernels of csrc/cuda, built when asked for, NVIDIA GPUs from compute capability 8.0.

With ``SNE_FAST_CUDA_EMULATED`` a host build of the same kernels takes CPU tensors, for tests: never by ``auto``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .._cuda import library
from .._schema import FORWARD_OPS, SCHEMAS

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cpu",) if library.EMULATED else ("cuda",)
AUTO_DEVICES: tuple[str, ...] = ("cuda",)
PRIORITY = 100  # below Triton until a committed measurement says otherwise
SELF_TEST = True

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def unavailable() -> list[str]:
    reasons = list(library.reasons())
    if not library.EMULATED and (not torch.cuda.is_available() or torch.version.cuda is None):
        reasons.append("torch finds no NVIDIA GPU here")
    return reasons


@functools.cache
def _module(op: str) -> Any:
    return importlib.import_module(f".._cuda.{op}", __package__)


def _computed_in(op: str, args: tuple[Any, ...]) -> tuple[torch.dtype, torch.device]:
    if op == "gather_chunks":
        return args[3], args[1].device
    return args[1 if op.endswith("_backward") else 0].dtype, args[0].device


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    dtype, device = _computed_in(op, args)
    forward = op.removesuffix("_backward")
    reasons = []
    if dtype not in DTYPES and forward != "gather_chunks":
        reasons.append(f"computes float32, float16 and bfloat16, got {dtype}")
    return reasons or _module(forward).why_not(op, args)


def _kernel(op: str, *args: Any) -> Any:
    return getattr(_module(op.removesuffix("_backward")), op)(*args)


KERNELS = {op: functools.partial(_kernel, op) for op in SCHEMAS if op.removesuffix("_backward") in FORWARD_OPS}
