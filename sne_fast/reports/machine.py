"""The machine and the code that results come from: versions, revision, processor and GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..backends.cpu import library
from ..version import __version__


@dataclass(frozen=True)
class Revision:
    """A commit, and the files that differ from it as `git status --porcelain` lists them."""

    commit: str
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.commit}-dirty" if self.changes else self.commit


def checkout() -> Path:
    """Return the folder that holds this package, the root of the checkout if it is imported from one."""
    return Path(__file__).resolve().parents[2]


def revision(root: Path | None = None, *, excluding: Sequence[str] = (), untracked: bool = False) -> Revision | None:
    """Return the revision of a checkout; None where there is no checkout or no git.

    Args:
        root: the root of the checkout; by default that of this package.
        excluding: files and folders, relative to `root`, whose changes do not count.
        untracked: count files that git does not track.
    """
    root = root or checkout()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()

    try:
        # An installed package may lie in a virtual environment inside somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        paths = [".", *(f":!{path}" for path in excluding)]
        changes = git("status", "--porcelain", f"--untracked-files={'normal' if untracked else 'no'}", "--", *paths)
        return Revision(git("rev-parse", "HEAD"), tuple(changes.splitlines()))
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """Return the commit of the checkout that this package is imported from; None elsewhere.

    It ends in "-dirty" where tracked files have changes.
    """
    found = revision()
    return None if found is None else str(found)


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, of this package and of installed packages; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sne_fast": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """Return the name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="ascii") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu(device: int | torch.device) -> dict[str, Any]:
    """Return the name, multiprocessors, bytes of memory and compute capability of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "capability": torch.cuda.get_device_capability(device),
    }


def nvidia_smi() -> str | None:
    """Return driver, memory, clocks and power limit of the GPUs as `nvidia-smi` prints them; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    """Return versions, revision, cores, threads and the CPU backend in use, for files of results."""
    return {
        "sne_fast": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_backend": "; ".join(library.reasons()) or library.isa(),
    }
