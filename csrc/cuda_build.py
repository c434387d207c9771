"""Build the CUDA library from csrc/cuda with nvcc.

Used by setup.py, and alone: python csrc/cuda_build.py [OUT.so [FILE ...]]; with files such as chunk_encode/weights it
holds those alone, to look at.

Environment:

- ``SNE_FAST_CUDA_ARCHS``: what to compile for, such as "80 90a 120+ptx compute_120": a cubin each, with "+ptx" also
  code that a driver compiles for newer GPUs, with "compute_" that alone. By default the GPUs of this machine, else
  sm_80, sm_90a, sm_100, and of sm_80 the PTX for all the rest.
- ``CUDA_HOME`` (or nvcc on the PATH), ``CXX`` (nvcc's host compiler), ``MAX_JOBS``.
- ``SNE_FAST_WERROR=1`` (developers): warnings are errors.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import native_build
from native_build import CSRC, INCLUDES, Unit

# An sm_100 cubin runs on 10.0 and 10.3, an sm_90a one on 9.0 alone: the PTX is for all that has none. No sm_103.
CUBINS, PTX = ("80", "90a", "100"), "80"
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", *INCLUDES]


def find_nvcc() -> str | None:
    """Return nvcc, of CUDA_HOME before PATH, as a machine may have several toolkits."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            return shutil.which("nvcc", path=os.path.join(folder, "bin"))
    return shutil.which("nvcc")


def gpu_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia/version") or bool(_nvidia_smi("--list-gpus"))


def _nvidia_smi(*arguments: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def gpu_capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the GPUs here, as the driver lists them."""
    found = (re.fullmatch(r"\s*(\d+)\.(\d+)\s*", line) for line in
             _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader"))  # fmt: skip
    return sorted({(int(match[1]), int(match[2])) for match in found if match})


# ---------------------------------------------------------------------------------------------------- architectures


@functools.cache
def known_architectures(nvcc: str) -> tuple[int, ...]:
    """Return what this nvcc compiles for: 80, 86, ..."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return tuple(sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed)))


def architectures(nvcc: str) -> list[str]:
    """Return the list of ``SNE_FAST_CUDA_ARCHS``, or the default for this machine."""
    if asked := os.environ.get("SNE_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split():
        return asked
    known = known_architectures(nvcc)
    if here := [c for c in gpu_capabilities() if c >= (8, 0)]:
        return list(dict.fromkeys(_best(capability, known) for capability in here))
    return [f"{cubin}+ptx" if cubin == PTX else cubin for cubin in CUBINS if _number(cubin) in known]


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def _best(capability: tuple[int, int], known: Sequence[int]) -> str:
    number = 10 * capability[0] + capability[1]
    if number == 103 and 100 in known:
        return "100"
    if number not in known:
        return f"compute_{max(k for k in known if 80 <= k <= number)}"
    return "90a" if number == 90 else str(number)


def only_architecture(source: Path) -> str:
    """Return "90a" for a file named ``*_sm90.cu``, which has instructions of that architecture alone, else ""."""
    match = re.search(r"_sm(\d+)$", source.stem)
    return f"{match[1]}a" if match else ""


def has_newer_instructions(source: Path) -> bool:
    """Return True for files whose inner loops have instructions of sm_90 (stmatrix) that the lowest one lacks."""
    return source.stem.startswith("full_")


def code_flags(names: Sequence[str], only: str = "", apart: bool = False) -> list[str]:
    """Return nvcc's -gencode flags for ``names``, or for ``only`` if that is one of them.

    All cubins come from one pass of the compiler's front end, which is most of the time, for the lowest architecture;
    with ``apart`` each comes from one of its own.
    """
    if only in [name.removesuffix("+ptx") for name in names]:
        return [f"-gencode=arch=compute_{only},code=[sm_{only}]"]
    cubins, ptx = [], []
    for name in names:
        match = re.fullmatch(r"(compute_)?(\d{2,3})([af]?)(\+ptx)?", name)
        if match is None or (match[1] and match[4]):
            raise RuntimeError(f"SNE_FAST_CUDA_ARCHS: {name!r} is not like 80, 90a, 120+ptx or compute_120")
        number = match[2] + match[3]
        if int(match[2]) < 80:
            raise RuntimeError(f"SNE_FAST_CUDA_ARCHS: {name}: the kernels need compute capability 8.0 or more")
        if not match[1]:
            cubins.append(number)
        if match[1] or match[4]:
            ptx.append(number)
    lowest = min(cubins, key=_number, default="")
    passes: dict[str, list[str]] = {}
    for number in cubins:
        passes.setdefault(number if apart else str(_number(lowest)), []).append(f"sm_{number}")
    for number in ptx:
        passes.setdefault(number, []).append(f"compute_{number}")
    return [f"-gencode=arch=compute_{number},code=[{','.join(code)}]" for number, code in passes.items()]


# ----------------------------------------------------------------------------------------------------------- build


def sources() -> list[Path]:
    """Return the sources, the longest compilations first, so that they do not run alone at the end."""
    files = sorted((CSRC / "cuda").rglob("*.cu"), key=lambda path: -path.stat().st_size)
    # Small files that instantiate large templates; float32 products, each of three TF32 ones, take the longest.
    return sorted(files, key=lambda path: (path.stem != "operands_float", "operands" not in path.stem))


def name_of(source: Path) -> str:
    """Return the path of a source below csrc/cuda without its suffix, such as "chunk_encode/weights"."""
    return source.relative_to(CSRC / "cuda").with_suffix("").as_posix()


def host_compiler_flags() -> list[str]:
    return ["-ccbin", native_build.host_compiler()[0]] if os.environ.get("CXX") else []


def compiler(nvcc: str, names: Sequence[str], source: Path, extra: Sequence[str] = ()) -> list[str]:
    """Return nvcc with all flags for ``source``."""
    strict = ["-Werror", "all-warnings"] if os.environ.get("SNE_FAST_WERROR") else []
    return [nvcc, *FLAGS, *code_flags(names, only_architecture(source), has_newer_instructions(source)),
            f"-DSNE_CUDA_ARCHS={' '.join(names)}", *extra, *host_compiler_flags(), *strict]  # fmt: skip


def units(nvcc: str, names: Sequence[str], files: Sequence[str] = ()) -> list[Unit]:
    """Return the files to compile, all or those named, each with its command."""
    if unknown := set(files) - {name_of(source) for source in sources()}:
        raise RuntimeError(f"csrc/cuda has no file {', '.join(sorted(unknown))}")
    return [Unit(source, f"{name_of(source)}.o", compiler(nvcc, names, source))
            for source in sources() if not files or name_of(source) in files]  # fmt: skip


def linker(nvcc: str, names: Sequence[str]) -> list[str]:
    return [nvcc, "-shared", "-cudart=static", *code_flags(names), "-Xlinker=--exclude-libs=ALL",
            *host_compiler_flags()]  # fmt: skip


def build(
    target: Path,
    folder: Path = native_build.BUILD_FOLDER / "cuda",
    names: Sequence[str] | None = None,
    files: Sequence[str] = (),
) -> list[str]:
    """Compile csrc/cuda, or some of its files, into ``target``, and return the architectures it is built for.

    Objects stay in ``folder``.

    Raises:
        RuntimeError: saying what is missing, or what the compiler said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc: put it on the PATH or set CUDA_HOME")
    names = list(names or architectures(nvcc))
    native_build.build(target, folder, units(nvcc, names, files), linker(nvcc, names))
    return names


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else native_build.ROOT / native_build.CUDA_LIBRARY
    try:
        print(f"{out}: {' '.join(build(out, files=sys.argv[2:]))}")
    except RuntimeError as error:
        sys.exit(f"cuda_build: {error}")
