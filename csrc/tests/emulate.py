"""Builds the CUDA kernels for the host, every CUDA thread a fiber: python csrc/tests/emulate.py OUT.so

``SNE_FAST_CUDA_EMULATED=OUT.so python -m pytest tests/backends/cuda/emulated`` runs the kernels' tests on it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSNE_EMULATED", "-Wall",
         "-Wextra", f"-I{CSRC}", f"-I{CSRC / 'include'}"]  # fmt: skip


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def digest() -> str:
    """Of everything that goes into the build."""
    files = [*(CSRC / "cuda").iterdir(), *(CSRC / "include" / "sne_fast").iterdir(), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def build(target: Path, objects: Path) -> None:
    """Compile all kernels into ``target``; objects whose source is unchanged are used again."""
    cxx = compiler()
    objects.mkdir(parents=True, exist_ok=True)
    headers = [*(CSRC / "cuda").glob("*.h"), *(CSRC / "include" / "sne_fast").iterdir()]
    newest = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> Path:
        object_file = objects / f"{source.stem}.o"
        if not object_file.exists() or object_file.stat().st_mtime < max(newest, source.stat().st_mtime):
            kind = ["-x", "c++"] if source.suffix == ".cu" else []
            subprocess.run([*cxx, *FLAGS, *kind, "-c", str(source), "-o", str(object_file)], check=True)
        return object_file

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        files = list(pool.map(compile_one, [*sources(), CSRC / "cuda" / "emulator.cpp"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run([*cxx, "-shared", *map(str, files), "-o", str(new)], check=True)
    os.replace(new, target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1]).resolve()
    build(out, out.with_suffix(".objects"))
