"""Description of an installation, as `sne-fast info` shows it: versions, devices and backends."""

from __future__ import annotations

import os
import platform

import torch

from ..ops.dispatch import explain
from ..ops.found_backends import BACKENDS
from ..reports.machine import gpu, versions


def machine() -> list[tuple[str, str]]:
    """Return versions, processor and GPUs, as names and values."""
    found = versions("torch", "triton", "numpy", "safetensors")
    rows = [("sne_fast", found.pop("sne_fast")), ("python", found.pop("python")), ("platform", platform.platform())]
    lines = [(name, value or "not installed") for name, value in [*rows, *found.items()]]
    capability = torch.backends.cpu.get_cpu_capability()
    lines.append(("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"))
    if not torch.cuda.is_available():
        return [*lines, ("cuda", "no device")]
    for i in range(torch.cuda.device_count()):
        about = gpu(i)
        major, minor = about["capability"]
        memory = about["memory"] / 2**30
        lines.append((f"cuda:{i}", f"{about['device']}, compute {major}.{minor}, {memory:.0f} GiB"))
    return lines


def backends() -> list[tuple[str, str]]:
    """Return for each backend what it was built for and which GPUs it has run on."""
    described = {name: backend.describe() for name, backend in BACKENDS.items()}
    return [(f"backend {name}", line) for name, line in described.items() if line]


def text() -> str:
    """Return the whole description, with the reasons for and against each backend."""
    rows = [*machine(), *backends()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", str(explain())])
