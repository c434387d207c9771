"""What nvcc makes of csrc/cuda, kernel by kernel: resources from ptxas, machine code from cuobjdump.

    from helpers.cuda_compiled import kernels, needs_nvcc

    @needs_nvcc
    def test_forward_spills_nothing() -> None:
        for kernel in kernels("set_attention/forward", "forward<.*, 64", arch="90a"):
            assert kernel.spilled_bytes == 0 and kernel.count("HMMA")

A file is compiled once per session, for all of ARCHITECTURES; files that tests have as parameter ``file`` several at a
time. Of kernels that exist for many widths of heads a representative one each, unless pytest has --all-variants.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cuda_build
import native_build
import pytest

ARCHITECTURES = cuda_build.CUBINS
SHARED_LIMIT = {"80": 163 << 10, "90a": 227 << 10, "100": 227 << 10}  # of one block, in bytes

needs_nvcc = pytest.mark.skipif(cuda_build.find_nvcc() is None, reason="needs nvcc")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. ``shared_bytes`` is without what a launch asks for."""

    name: str  # such as "void sne::forward<sne::OpBfloat, 64>(sne::Arguments)"
    arch: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int
    sass: str = field(repr=False)

    def count(self, instruction: str) -> int:
        """How often an instruction (``HGMMA``, ``HMMA``, ``LDSM``, ...) stands in the machine code."""
        assert self.sass, "needs cuobjdump, which comes with Triton and with a CUDA toolkit"
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def matrix_instruction(self) -> str:
        """The widest kind of matrix instruction in the machine code, "" for none."""
        return next((kind for kind in ("HGMMA", "UTCHMMA", "HMMA") if self.count(kind)), "")

    def __str__(self) -> str:
        return (
            f"{self.name} for sm_{self.arch}: {self.registers} registers, {self.stack_bytes} bytes of stack, "
            f"{self.spilled_bytes} spilled, {self.shared_bytes} shared"
        )


@dataclass(frozen=True)
class Object:
    """A compiled file."""

    path: Path
    kernels: tuple[Kernel, ...]
    seconds: float


@functools.cache
def cuobjdump() -> str | None:
    """Triton's, as it knows all architectures, else the toolkit's."""
    spec = importlib.util.find_spec("triton")
    places = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec and spec.origin else []
    nvcc = cuda_build.find_nvcc()
    places += [Path(nvcc).resolve().parent] if nvcc else []
    for place in places:
        if found := shutil.which("cuobjdump", path=str(place)):
            return found
    return shutil.which("cuobjdump")


def kernels(file: str, name: str = "", arch: str | None = None) -> list[Kernel]:
    """Kernels of ``csrc/cuda/FILE.cu`` whose name matches a regular expression; at least one, or it fails."""
    found = [k for k in compiled(file).kernels if re.search(name, k.name) and arch in (None, k.arch)]
    assert found, f"no kernel of {file}.cu is called like {name!r}: {sorted({k.name for k in compiled(file).kernels})}"
    return found


def compiled(file: str) -> Object:
    """``csrc/cuda/FILE.cu`` for all architectures, warnings being errors."""
    start([file])
    return _futures[file].result()


def all_compiled() -> dict[str, Object]:
    files = [cuda_build.name_of(source) for source in cuda_build.sources()]
    start(files)
    return {file: compiled(file) for file in files}


_futures: dict[str, Future[Object]] = {}
all_variants = False


def start(files: Collection[str]) -> None:
    """Begin to compile several at a time, each once per session."""
    pool, folder = _workers()
    for source in cuda_build.sources():
        file = cuda_build.name_of(source)
        if file in files and file not in _futures:
            _futures[file] = pool.submit(compile_file, source, Path(folder.name))


@functools.cache
def _workers() -> tuple[ThreadPoolExecutor, tempfile.TemporaryDirectory[str]]:
    return ThreadPoolExecutor(native_build.jobs()), tempfile.TemporaryDirectory(prefix="sne_fast_cuda")


def compile_file(source: Path, folder: Path, architectures: Sequence[str] = ARCHITECTURES) -> Object:
    """Compile any .cu file as the library's are, warnings being errors, into ``folder``."""
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    out, begin = folder / f"{source.parent.name}_{source.stem}.o", time.monotonic()
    strict = ["-Xptxas=-v", "-Werror", "all-warnings", *([] if all_variants else ["-DSNE_REPRESENTATIVE"])]
    unit = native_build.Unit(source, out.name, cuda_build.compiler(nvcc, architectures, source, strict))
    done = subprocess.run(unit.line(folder), capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name}:\n{(done.stdout + done.stderr)[:8000]}"
    # What ptxas calls information: registers of a running wgmma are touched, and it has to wait.
    assert not re.search(r"\(C75\d\d\)", done.stdout + done.stderr), f"{source.name}: {done.stdout + done.stderr}"
    seconds = time.monotonic() - begin
    sass = _machine_code(out)
    found = _resources(done.stdout + done.stderr)
    plain = _demangled([name for name, _ in found])
    made = [
        Kernel(plain[name], arch, **values, sass=sass.get((name, arch), "")) for (name, arch), values in found.items()
    ]
    return Object(out, tuple(made), seconds)


def _resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """By mangled name and architecture, from what ptxas prints about every kernel."""
    found = {}
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", log)[1:]:
        name, arch = re.findall(r"entry function '(\S+)' for 'sm_(\w+)'", entry)[0]

        def number(pattern: str, text: str = entry) -> int:
            return sum(map(int, re.findall(pattern, text)))

        # Functions that were not inlined have properties of their own: they count as the kernel's.
        found[name, arch] = {
            "registers": number(r"Used (\d+) registers"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "spilled_bytes": number(r"(\d+) bytes spill (?:stores|loads)"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return found


def _machine_code(path: Path) -> dict[tuple[str, str], str]:
    tool = cuobjdump()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"(?=\bcode for sm_)", text)[1:]:
        arch = re.match(r"code for sm_(\w+)", part)
        assert arch is not None
        for function in re.split(r"(?=\bFunction : )", part)[1:]:
            head, _, body = function.partition("\n")
            found[head.removeprefix("Function : ").strip(), arch[1]] = body
    return found


def _demangled(names: Sequence[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.replace("(anonymous namespace)::", "").splitlines(), strict=True))
