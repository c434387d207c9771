"""What ``sne-fast info`` shows: versions, devices, which backends were built for what, and where they have run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__, explain
from ..ops.found_backends import BACKENDS


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
    described = {name: backend.describe() for name, backend in BACKENDS.items()}
    return [(f"backend {name}", line) for name, line in described.items() if line]


def text() -> str:
    rows = [*machine(), *backends()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", str(explain())])
