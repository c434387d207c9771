"""The CUDA C++ backend: kernels of csrc/cuda, built when asked for, NVIDIA GPUs from compute capability 8.0.

With ``SNE_FAST_CUDA_EMULATED`` a host build of the same kernels takes CPU tensors, for tests, and only when the backend
is chosen by name.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ...ops import devices
from ...ops.backend import Arguments, Backend
from ...ops.schema import REQUIRED_OPS
from .. import gpu_runs, native_library
from ..gpu_plans.op_modules import OpModules, computed_in
from . import library, winners

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FOLDER = Path(__file__).parent
OPS = OpModules(__package__)
FUSIONS = ("set_block",)
VERIFIED_WITHOUT_A_GPU = "checked in an emulator on the host, and compiled for sm_80, sm_90a and sm_100"


@functools.cache
def unavailable() -> list[str]:
    """Return why the backend cannot run on this machine; empty if it can."""
    reasons = list(library.reasons())
    if library.EMULATED:
        return reasons
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return [*reasons, "torch finds no NVIDIA GPU here"]
    if reasons:
        return reasons
    # It is enough that one GPU of several can run it: why_not asks about the one of the call.
    of_devices = [library.device_reasons(index) for index in range(torch.cuda.device_count())]
    return [] if not all(of_devices) else list(dict.fromkeys(reason for found in of_devices for reason in found))


@functools.cache
def device_reasons(index: int) -> list[str]:
    """Return why the backend cannot run on ``cuda:index``; empty if it can."""
    return library.device_reasons(index)


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why the backend cannot run a call; empty if it can."""
    dtype, device = computed_in(op, args)
    reasons = []
    if device.type == "cuda":
        reasons += device_reasons(devices.index(device))
    if dtype not in DTYPES and not op.startswith("gather_chunks"):  # which has no products and takes any dtype
        reasons.append(f"computes float32, float16 and bfloat16, got {dtype}")
    return reasons or OPS.why_not(op, args)


def describe() -> str:
    """Return what the library was built for, or why there is none, and which GPUs have run it."""
    reasons = library.reasons()
    built = f"not here: {reasons[0].splitlines()[0]}" if reasons else f"built for {' '.join(library.architectures())}"
    return f"{built}; {gpu_runs.sentence('cuda', VERIFIED_WITHOUT_A_GPU)}"


BACKEND = Backend(
    name="cuda",
    kernels=OPS.kernels(op for name in (*REQUIRED_OPS, *FUSIONS) for op in (name, f"{name}_backward")),
    devices=("cpu",) if library.EMULATED else ("cuda",),
    priority=100,  # below Triton, except for calls that a committed measurement names
    unavailable=unavailable,
    why_not=why_not,
    auto_devices=("cuda",),
    self_test=True,
    sources=(FOLDER, FOLDER.parent / "gpu_plans", Path(native_library.__file__)),
    preferred=winners.preferred,
    fusions=FUSIONS,
    describe=describe,
)
