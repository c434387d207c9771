"""Runs compilers and linkers with ninja, for both libraries, the emulated kernels and the C++ tests.

Objects stay in a build folder. ninja compiles a file again when the file, a header it includes, its flags or the
compiler has changed. Without ninja every file is compiled each time.

Environment: ``MAX_JOBS`` limits how many compilers run at the same time.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
CPU_LIBRARY = "sne_fast/backends/cpu/libsne_fast_cpu.so"
CUDA_LIBRARY = "sne_fast/backends/cuda/libsne_fast_cuda.so"
"""The libraries inside the repository and inside the wheel."""
BUILD_FOLDER = ROOT / "build" / "native"
INCLUDES = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]


@dataclass(frozen=True)
class Unit:
    """One object file: ``command`` compiles ``source`` once ``-c source -o object`` is appended."""

    source: Path
    object: str
    command: Sequence[str]

    def line(self, folder: Path) -> list[str]:
        return [*self.command, "-c", str(self.source), "-o", str(folder / self.object)]


def host_compiler() -> list[str]:
    """Return the C++ compiler and its flags from ``CXX``, by default g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def jobs() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("MAX_JOBS", available))


def find_ninja() -> str | None:
    """Return ninja from the Python package of that name, from beside this Python, or from the PATH.

    The package comes first because pip's isolated builds have it: another version of ninja may not read the log of this
    one, and would compile everything again.
    """
    places = [os.path.dirname(sys.executable), None]
    with suppress(ImportError, AttributeError):
        places.insert(0, importlib.import_module("ninja").BIN_DIR)
    return next((found for place in places if (found := shutil.which("ninja", path=place))), None)


def build(target: Path, folder: Path, units: Sequence[Unit], link: Sequence[str]) -> None:
    """Compile ``units`` into ``folder`` and link them into ``target`` with ``link``, doing only what has changed.

    Raises:
        RuntimeError: with the command that failed and what it printed.
    """
    folder, target = folder.resolve(), target.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    linked = folder / target.name
    link = [*link, *(str(folder / unit.object) for unit in units), "-o", str(linked)]
    with _locked(folder):
        if ninja := find_ninja():
            _write_if_changed(folder / "compiler.txt", _versions({unit.command[0] for unit in units}))
            _write_if_changed(folder / "build.ninja", _ninja_file(folder, units, link, linked))
            _run([ninja, "-C", str(folder), "-j", str(jobs())])
        else:
            for unit in units:
                (folder / unit.object).parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(_run, [unit.line(folder) for unit in units]))
            _run(link)
        # A process that has the old library loaded keeps it, as renaming does not write into the old file.
        new = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            shutil.copy(linked, new)
            os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)


def _ninja_file(folder: Path, units: Sequence[Unit], link: Sequence[str], linked: Path) -> str:
    def path(file: Path) -> str:
        return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def shell(command: Sequence[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        "rule compile\n  command = $line -MD -MF $out.d\n  depfile = $out.d\n  deps = gcc\n  description = $out",
        "rule link\n  command = $line\n  description = $out",
    ]
    for unit in units:
        # ninja knows a changed command, but not a changed compiler behind it.
        lines += [
            f"build {path(folder / unit.object)}: compile {path(unit.source)} | {path(folder / 'compiler.txt')}",
            f"  line = {shell(unit.line(folder))}",
        ]
    objects = " ".join(path(folder / unit.object) for unit in units)
    lines += [f"build {path(linked)}: link {objects}", f"  line = {shell(link)}"]
    return "\n".join(lines) + "\n"


def _versions(programs: set[str]) -> str:
    """Return what the compilers, and the host compiler that nvcc calls, say of their version."""
    found = []
    for program in sorted(programs | {host_compiler()[0]}):
        path = shutil.which(program)
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout if path else ""
        found.append(f"{path}\n{said}")
    return "\n".join(found)


def _write_if_changed(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


@contextmanager
def _locked(folder: Path):
    """Let one process at a time build in ``folder``."""
    with open(folder / "lock", "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return
    said = (done.stdout + done.stderr).strip()
    if "unsupported GNU version" in said or "unsupported clang version" in said:
        raise RuntimeError(
            "nvcc refuses the host compiler: set CXX to an older one, as its message says: "
            + next(line for line in said.splitlines() if "unsupported" in line)
        )
    # ninja lists first what it has built, and then what failed.
    said = said[max(said.find("FAILED:"), 0) :]
    raise RuntimeError(f"{shlex.join(command)} failed:\n" + "\n".join(said.splitlines()[:30]))
