"""Builds the CUDA engine from csrc/cuda with nvcc: for setup.py, or alone: python csrc/cuda_build.py [OUT.so]

Environment:

- ``SNE_FAST_CUDA_ARCHS``: what to compile for, such as "80 90a 120+ptx compute_120": a cubin each, with "+ptx" also
  code that a driver compiles for newer GPUs, with "compute_" that alone. By default the GPUs of this machine, else
  sm_80, sm_90a, sm_100a and PTX for the rest.
- ``CUDA_HOME`` (or nvcc on the PATH), ``CXX`` (nvcc's host compiler), ``MAX_JOBS``.
- ``SNE_FAST_WERROR=1`` (developers): warnings are errors.

ninja is used where it is found, and then compiles only what has changed.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = "_cuda_engine.so"
# An sm_100a cubin runs on 10.0 alone and an sm_90a one on 9.0 alone: the PTX is for all that has none. No sm_103.
CUBINS, PTX = ("80", "90a", "100a"), "80"
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}",
         f"-I{CSRC / 'include'}"]  # fmt: skip


def find_nvcc() -> str | None:
    """CUDA_HOME before PATH, as a machine may have several toolkits."""
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
    """Of the GPUs here, as the driver lists them."""
    found = (re.fullmatch(r"\s*(\d+)\.(\d+)\s*", line) for line in
             _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader"))  # fmt: skip
    return sorted({(int(match[1]), int(match[2])) for match in found if match})


# ---------------------------------------------------------------------------------------------------- architectures


@functools.cache
def known_architectures(nvcc: str) -> tuple[int, ...]:
    """What this nvcc compiles for: 80, 86, ..."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return tuple(sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed)))


def architectures(nvcc: str) -> list[str]:
    """The list of ``SNE_FAST_CUDA_ARCHS``, or the default for this machine."""
    if asked := os.environ.get("SNE_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split():
        return asked
    known = known_architectures(nvcc)
    if here := [c for c in gpu_capabilities() if c >= (8, 0)]:
        return list(dict.fromkeys(_best(capability, known) for capability in here))
    cubins = [cubin for cubin in CUBINS if _number(cubin) in known]
    # The newest generation's own PTX, and that of the first one for those between and to come.
    newest = max((number for number in known if number % 10 == 0), default=0)
    first = [f"{cubin}+ptx" if cubin == PTX else cubin for cubin in cubins]
    return [*first, f"compute_{newest}"] if newest > max(map(_number, cubins), default=0) else first


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def _best(capability: tuple[int, int], known: Sequence[int]) -> str:
    number = 10 * capability[0] + capability[1]
    if number == 103 or number not in known:
        most = 100 if number == 103 else number
        return f"compute_{max(k for k in known if 80 <= k <= most)}"
    return f"{number}a" if number in (90, 100) else str(number)


def code_flags(names: Sequence[str]) -> list[str]:
    """nvcc's -gencode for each."""
    flags = []
    for name in names:
        match = re.fullmatch(r"(compute_)?(\d{2,3})([af]?)(\+ptx)?", name)
        if match is None or (match[1] and match[4]):
            raise RuntimeError(f"SNE_FAST_CUDA_ARCHS: {name!r} is not like 80, 90a, 120+ptx or compute_120")
        number = match[2] + match[3]
        if int(match[2]) < 80:
            raise RuntimeError(f"SNE_FAST_CUDA_ARCHS: {name}: the kernels need compute capability 8.0 or more")
        code = [] if match[1] else [f"sm_{number}"]
        if match[1] or match[4]:
            code.append(f"compute_{number}")
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(code)}]")
    return flags


# ----------------------------------------------------------------------------------------------------------- build


def sources() -> list[Path]:
    """The longest compilations first, so that they do not run alone at the end."""
    units = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    # Small files that instantiate large templates; products of float32 as three take the longest.
    return sorted(units, key=lambda path: (path.stem != "chunk_operands_float", "chunk_operands" not in path.stem))


def compiler(nvcc: str, names: Sequence[str], extra: Sequence[str] = ()) -> list[str]:
    """The command that compiles, but for ``-c SOURCE -o OBJECT``."""
    command = [nvcc, *FLAGS, *code_flags(names), f"-DSNE_CUDA_ARCHS={' '.join(names)}", *extra]
    host = shlex.split(os.environ.get("CXX", ""))
    if host:
        command += ["-ccbin", host[0]]
    if os.environ.get("SNE_FAST_WERROR"):
        command += ["-Werror", "all-warnings"]
    return command


def linker(nvcc: str, names: Sequence[str], objects: Sequence[str], target: Path) -> list[str]:
    host = shlex.split(os.environ.get("CXX", ""))
    return [nvcc, "-shared", "-cudart=static", *code_flags(names), "-Xlinker=--exclude-libs=ALL",
            *(["-ccbin", host[0]] if host else []), *objects, "-o", str(target)]  # fmt: skip


def jobs() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("MAX_JOBS", available))


def find_ninja() -> str | None:
    """On the PATH, beside this Python, or in the Python package of that name."""
    found = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    if found:
        return found
    try:
        return shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR)
    except (ImportError, AttributeError):
        return None


def build(target: Path, folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Compile csrc/cuda into ``target``, with objects in ``folder``: the architectures it was built for.

    Raises:
        RuntimeError: saying what is missing, or what the compiler said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc: put it on the PATH or set CUDA_HOME")
    names = list(names or architectures(nvcc))
    folder, target = folder.resolve(), target.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    compile_command = compiler(nvcc, names)
    objects = [folder / f"{source.stem}.o" for source in sources()]
    new = target.with_name(f"{target.name}.{os.getpid()}")  # whoever has the old one loaded keeps it
    try:
        if ninja := find_ninja():
            _write_ninja(folder / "build.ninja", compile_command, objects)
            _run([ninja, "-C", str(folder), "-j", str(jobs())])
        else:
            commands = [
                [*compile_command, "-c", str(source), "-o", str(out)]
                for source, out in zip(sources(), objects, strict=True)
            ]
            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(_run, commands))
        _run(linker(nvcc, names, [str(path) for path in objects], new))
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
    return names


def _write_ninja(file: Path, command: Sequence[str], objects: Sequence[Path]) -> None:
    def escaped(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5", "rule nvcc", "  depfile = $out.d", "  deps = gcc",
             f"  command = {shlex.join(command).replace('$', '$$')} -MD -MF $out.d -c $in -o $out",
             "  description = $out"]  # fmt: skip
    for source, out in zip(sources(), objects, strict=True):
        lines.append(f"build {escaped(str(out))}: nvcc {escaped(str(source))}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return
    said = (done.stdout + done.stderr).strip()
    if "unsupported GNU version" in said or "unsupported clang version" in said:
        raise RuntimeError(
            "nvcc refuses the host compiler: set CXX to an older one, as its message says: "
            + next(line for line in said.splitlines() if "unsupported" in line)
        )
    raise RuntimeError(f"{shlex.join(command)} failed:\n" + "\n".join(said.splitlines()[:30]))


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else CSRC.parent / "sne_fast" / LIBRARY)
    try:
        print(f"{out}: {' '.join(build(out, CSRC.parent / 'build' / 'cuda_engine'))}")
    except RuntimeError as error:
        sys.exit(f"cuda_build: {error}")
