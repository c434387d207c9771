"""What ``sne-fast info`` shows: versions, devices, which backends were built for what, and where they have run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__, explain
from ..backends import gpu_runs
from ..backends.cpu import library
from ..backends.cuda import library as cuda_library

# What a backend that has not run on a GPU rests on.
ONLY = {
    "triton": "checked in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100",
    "cuda": "checked in an emulator on the host, and compiled for sm_80, sm_90a and sm_100",
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> list[tuple[str, str]]:
    """Names and values: versions, processor, GPUs."""
    rows = [("sne_fast", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, _version(name)) for name in ("torch", "triton", "numpy", "safetensors")]
    capability = torch.backends.cpu.get_cpu_capability()
    rows.append(("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"))
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "no device")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows


def backends() -> list[tuple[str, str]]:
    """For each backend: whether and for what it was built, and which GPUs it has run on."""
    cpu = library.reasons() or [f"built for {', '.join(library.supported_isas())}; runs {library.isa()}"]
    if reasons := cuda_library.reasons():
        cuda = f"not here: {reasons[0].splitlines()[0]}"
    else:
        cuda = f"built for {' '.join(cuda_library.architectures())}"
    return [
        ("backend cpu", cpu[0]),
        ("backend triton", f"compiles at the first call; {_on_gpus('triton')}"),
        ("backend cuda", f"{cuda}; {_on_gpus('cuda')}"),
    ]


def _on_gpus(backend: str) -> str:
    said = gpu_runs.sentence(backend)
    return f"{said}: {ONLY[backend]} only" if said == gpu_runs.NOT_YET else said


def text() -> str:
    rows = [*machine(), *backends()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", str(explain())])
