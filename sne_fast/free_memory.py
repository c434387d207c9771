"""Memory that can be had without swapping."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["MemoryNeeded", "available_bytes"]

_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


class MemoryNeeded(MemoryError):
    """More memory is needed than may be used, which was known before any work; the message says what would help."""


def available_bytes() -> float:
    """Return the bytes of memory that can be had without swapping, by the system and by the limit of its container."""
    return min(_of_system(), _of_group())


def _of_system() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4.0 * 2**30


def _of_group() -> float:
    """Return what the control group of this process may still take; infinity without a limit."""
    for limit, used in _GROUPS:
        try:
            return float(int(_read(limit)) - int(_read(used)))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return float("inf")


def _read(name: str) -> str:
    return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
