"""Memory that can be had without swapping."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["MemoryNeeded", "available_bytes", "parse_bytes", "shown_bytes", "total_bytes"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


class MemoryNeeded(MemoryError):
    """More memory is needed than may be used, which was known before any work; the message says what would help."""


def available_bytes() -> float:
    """Return the bytes of memory that can be had without swapping, by the system and by the limit of its container."""
    return min(_of_system(), _of_group())


def total_bytes() -> float:
    """Return the bytes of memory that the machine or the container of this process has."""
    limits = [_from_meminfo("MemTotal") or 2 * _of_system()]
    for limit, _ in _GROUPS:
        try:
            limits.append(float(int(_read(limit))))
        except (OSError, ValueError):
            continue
    return min(limits)


def shown_bytes(number: float) -> str:
    """Return a number of bytes for a message, such as 1.5 GiB."""
    unit = min(max(0, int(number).bit_length() - 1) // 10, 4)
    return f"{number / 1024**unit:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text such as 8G, 1.5 GiB or 500M means; units are powers of 1024.

    Raises:
        ValueError: another text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2].upper()])
    if found is None or size == 0:
        raise ValueError(f"--max-memory must be a number of bytes such as 8G or 500M, got {text!r}")
    return size


def _of_system() -> float:
    available = _from_meminfo("MemAvailable")
    if available is not None:
        return available
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


def _from_meminfo(key: str) -> float | None:
    """Return the bytes that Linux tells under a name; None elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
    except OSError:
        return None
