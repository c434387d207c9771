"""Builds the CUDA engine from csrc/cuda with nvcc: for setup.py, or alone: python csrc/cuda_build.py [OUT.so]

Environment:

- ``SNE_FAST_CUDA_ARCHS``: what to compile for, such as "80 90a 120+ptx compute_120": a cubin each, with "+ptx" also
  code that a driver compiles for newer GPUs, with "compute_" that alone. By default the GPUs of this machine, else
  sm_80, sm_90a, sm_100, and of sm_80 the PTX for all the rest.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = "_cuda_engine.so"
# An sm_100 cubin runs on 10.0 and 10.3, an sm_90a one on 9.0 alone: the PTX is for all that has none. No sm_103.
CUBINS, PTX = ("80", "90a", "100"), "80"
OF_ONE_GENERATION = {"chunk_encode_wgmma": "90a"}
"""Files that use instructions which one architecture alone has."""
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


def code_flags(names: Sequence[str], of_one_generation: str = "") -> list[str]:
    """nvcc's -gencode for ``names``, or for a file with instructions of one generation, of them that one alone.

    All cubins come from one pass of the compiler's front end, which is most of the time, for the lowest architecture.
    """
    if of_one_generation in [name.removesuffix("+ptx") for name in names]:
        return [f"-gencode=arch=compute_{of_one_generation},code=[sm_{of_one_generation}]"]
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
    passes = {str(_number(lowest)): [f"sm_{number}" for number in cubins]} if cubins else {}
    for number in ptx:
        passes.setdefault(number, []).append(f"compute_{number}")
    return [f"-gencode=arch=compute_{number},code=[{','.join(code)}]" for number, code in passes.items()]


# ----------------------------------------------------------------------------------------------------------- build


def sources() -> list[Path]:
    """The longest compilations first, so that they do not run alone at the end."""
    units = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    # Small files that instantiate large templates; products of float32 as three take the longest.
    return sorted(units, key=lambda path: (path.stem != "chunk_operands_float", "chunk_operands" not in path.stem))


def compiler(nvcc: str, names: Sequence[str], source: Path, out: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command that compiles ``source`` into the object ``out``."""
    command = [nvcc, *FLAGS, *code_flags(names, OF_ONE_GENERATION.get(source.stem, "")),
               f"-DSNE_CUDA_ARCHS={' '.join(names)}", *extra]  # fmt: skip
    host = shlex.split(os.environ.get("CXX", ""))
    if host:
        command += ["-ccbin", host[0]]
    if os.environ.get("SNE_FAST_WERROR"):
        command += ["-Werror", "all-warnings"]
    return [*command, "-c", str(source), "-o", str(out)]


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
    objects = [folder / f"{source.stem}.o" for source in sources()]
    commands = {str(out): compiler(nvcc, names, source, out) for source, out in zip(sources(), objects, strict=True)}
    new = target.with_name(f"{target.name}.{os.getpid()}")  # whoever has the old one loaded keeps it
    try:
        if ninja := find_ninja():
            _write_ninja(folder / "build.ninja", commands)
            _run([ninja, "-C", str(folder), "-j", str(jobs())])
        else:
            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(_run, commands.values()))
        _run(linker(nvcc, names, [str(path) for path in objects], new))
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
    return names


def _write_ninja(file: Path, commands: Mapping[str, Sequence[str]]) -> None:
    def escaped(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5", "rule nvcc", "  depfile = $out.d", "  deps = gcc",
             "  command = $nvcc -MD -MF $out.d", "  description = $out"]  # fmt: skip
    for out, command in commands.items():
        source = command[command.index("-c") + 1]
        lines += [f"build {escaped(out)}: nvcc {escaped(source)}", f"  nvcc = {shlex.join(command).replace('$', '$$')}"]
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
