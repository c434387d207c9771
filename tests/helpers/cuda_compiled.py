"""Kernels of csrc/cuda as nvcc compiles them: resources from ptxas, machine code from cuobjdump.

    from helpers.cuda_compiled import kernels, needs_nvcc

    @needs_nvcc
    def test_forward_spills_nothing() -> None:
        for kernel in kernels("set_attention/forward", "forward<.*, 64", arch="90a"):
            assert kernel.spilled_bytes == 0 and kernel.count("HMMA")

A file is compiled for all of ARCHITECTURES, once for all sessions with the same sources; several at a time. Of kernels
that exist for many widths of heads a representative one each, unless pytest has --all-variants.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cuda_build
import native_build
import pytest

from helpers import artefacts
from sne_fast.benchmark.instructions.machine_code import demangled, tool

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
    words: dict[str, int] = field(repr=False)  # of its machine code, with how often they stand there

    def count(self, instruction: str) -> int:
        """Return how often an instruction (``HGMMA``, ``HMMA``, ``LDSM``, ...) stands in the machine code."""
        assert self.words, "needs cuobjdump, which comes with Triton and with a CUDA toolkit"
        return self.words.get(instruction, 0)

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
    """Return the path of Triton's cuobjdump, which knows all architectures, else of the toolkit's."""
    try:
        return tool("cuobjdump")
    except RuntimeError:
        return None


def kernels(file: str, name: str = "", arch: str | None = None) -> list[Kernel]:
    """Return the kernels of ``csrc/cuda/FILE.cu`` whose name matches a regular expression; there must be one."""
    found = [k for k in compiled(file).kernels if re.search(name, k.name) and arch in (None, k.arch)]
    assert found, f"no kernel of {file}.cu is called like {name!r}: {sorted({k.name for k in compiled(file).kernels})}"
    return found


def compiled(file: str) -> Object:
    """Compile ``csrc/cuda/FILE.cu`` for all architectures, warnings being errors."""
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
    for source in cuda_build.sources():
        file = cuda_build.name_of(source)
        if file in files and file not in _futures:
            _futures[file] = _workers().submit(compile_file, source)


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(native_build.jobs())


def compile_file(source: Path, architectures: Sequence[str] = ARCHITECTURES) -> Object:
    """Compile any .cu file of the repository as the library's are, warnings being errors."""
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    strict = ["-Xptxas=-v", "-Werror", "all-warnings", *([] if all_variants else ["-DSNE_REPRESENTATIVE"])]
    command = cuda_build.compiler(nvcc, architectures, source, strict)
    dump = cuobjdump() or ""
    parts = [*command, artefacts.version(nvcc), dump and artefacts.version(dump), Path(__file__).read_text()]
    headers = [path for path in artefacts.native_sources("cuda", "include") if path.suffix != ".cu"]

    def make(folder: Path) -> None:
        out, begin = folder / "object.o", time.monotonic()
        done = subprocess.run([*command, "-c", str(source), "-o", str(out)], capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{source.name}:\n{said[:8000]}"
        # ptxas only calls it information: registers of a running wgmma are touched, and it has to wait.
        assert not re.search(r"\(C75\d\d\)", said), f"{source.name}: {said}"
        seconds = time.monotonic() - begin
        words, found = _machine_code(out), _resources(said)
        plain = demangled([name for name, _ in found])
        made = [
            {"name": plain[name], "arch": arch, **values, "words": words.get((name, arch), {})}
            for (name, arch), values in found.items()
        ]
        (folder / "kernels.json").write_text(json.dumps({"seconds": seconds, "kernels": made}))

    folder = artefacts.kept(
        f"nvcc/{source.parent.name}_{source.stem}", artefacts.digest(parts, [source, *headers]), make
    )
    found = json.loads((folder / "kernels.json").read_text())
    return Object(folder / "object.o", tuple(Kernel(**kernel) for kernel in found["kernels"]), found["seconds"])


def _resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """Return resources by mangled name and architecture, from what ptxas prints about every kernel."""
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


def _machine_code(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Return the words of the machine code with their counts, by mangled name and architecture."""
    dump = cuobjdump()
    if dump is None:
        return {}
    text = subprocess.run([dump, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"(?=\bcode for sm_)", text)[1:]:
        arch = re.match(r"code for sm_(\w+)", part)
        assert arch is not None
        for function in re.split(r"(?=\bFunction : )", part)[1:]:
            head, _, body = function.partition("\n")
            found[head.removeprefix("Function : ").strip(), arch[1]] = Counter(re.findall(r"\b[A-Z]\w+", body))
    return found
