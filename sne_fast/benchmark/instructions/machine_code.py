"""Machine code of CUDA kernels as instructions with their lines of source, read from the output of ``nvdisasm -gi``."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

Frame = tuple[str, int]
"""A file and a line in it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``frames`` are its line of source and the lines from which that was inlined, innermost first."""

    guard: str  # such as "@!P0", "" for none
    opcode: str  # such as "LDS.128"
    operands: str
    frames: tuple[Frame, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass
class Function:
    """One kernel: its instructions in order, and the labels as indices of instructions."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    spills: int = 0

    def target(self, at: int) -> int | None:
        """Return where the branch ``at`` leads, None if that is no label of this function."""
        match = re.search(r"`\(([^)]+)\)", self.instructions[at].operands)
        return self.labels.get(match[1]) if match else None

    def jumps(self, at: int) -> bool:
        """Return whether an instruction goes on elsewhere for good: a branch, or a call of a label, for sm_80.

        By such a call of a label of its own, a kernel leaves a loop and does not come back.
        """
        instruction = self.instructions[at]
        return instruction.name == "BRA" or (instruction.name == "CALL" and "`(.L_" in instruction.operands)

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First instruction and the one behind the last, of each basic block."""
        starts = {0, *(i for i in self.labels.values() if i < len(self.instructions))}
        for at, instruction in enumerate(self.instructions):
            if instruction.name in ("BRA", "EXIT", "RET", "CALL") and at + 1 < len(self.instructions):
                starts.add(at + 1)
        ordered = [*sorted(starts), len(self.instructions)]
        return list(itertools.pairwise(ordered))


def tool(name: str) -> str:
    """Return the path of ``nvdisasm`` or ``cuobjdump``, as Triton or a CUDA toolkit brings it.

    Raises:
        RuntimeError: if neither is installed.
    """
    spec = importlib.util.find_spec("triton")
    places = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")] if spec and spec.origin else []
    places += [os.path.join(os.environ[home], "bin") for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent))
    for place in [*places, None]:
        if found := shutil.which(name, path=place):
            return found
    raise RuntimeError(f"{name} is not installed: it comes with Triton and with a CUDA toolkit")


def _said(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[:500]}")
    return done.stdout


def read_kernels(binary: Path, architecture: str, pattern: str = "") -> list[Function]:
    """Read the kernels in a library, object or cubin whose demangled names match a regular expression.

    Args:
        binary: A shared library, an object file or a cubin.
        architecture: Such as ``"90a"``; machine code for others is left out.
        pattern: Regular expression for the names.

    Raises:
        RuntimeError: if a tool is missing or fails, or if there is no such kernel.
    """
    found: list[Function] = []
    with TemporaryDirectory() as folder:
        if binary.suffix == ".cubin":
            cubins = [binary.resolve()]
        else:
            _said(tool("cuobjdump"), "-xelf", f"sm_{architecture}.cubin", str(binary.resolve()), cwd=folder)
            cubins = sorted(Path(folder).glob(f"*.sm_{architecture}.cubin"))
        for cubin in cubins:
            symbols = _kernel_symbols(cubin)
            names = demangled(list(symbols.values()))
            wanted = {index for index, name in symbols.items() if re.search(pattern, names[name])}
            if not wanted:
                continue
            resources = _resources(_said(tool("cuobjdump"), "-res-usage", str(cubin)))
            text = _said(tool("nvdisasm"), "-c", "-gi", "-fun", ",".join(map(str, sorted(wanted))), str(cubin))
            for function in parse(text):
                function.registers, function.stack_bytes, function.shared_bytes = resources[function.name]
                function.name = names[function.name]
                found.append(function)
    if not found:
        raise RuntimeError(f"{binary} has no kernel for sm_{architecture} whose name matches {pattern!r}")
    return found


def _kernel_symbols(cubin: Path) -> dict[int, str]:
    """Return the mangled names of the kernels in a cubin (ELF) by their index in its table of symbols."""
    data = cubin.read_bytes()
    (at,), (size, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<2H", data, 58)
    sections = [struct.unpack_from("<2I4Q2I2Q", data, at + size * i) for i in range(count)]
    table = next(section for section in sections if section[1] == 2)  # SHT_SYMTAB
    strings = sections[table[6]][4]
    found = {}
    for index in range(table[5] // 24):
        name, info, other = struct.unpack_from("<I2B", data, table[4] + 24 * index)
        if info & 15 == 2 and other & 0x10:  # a function that can be launched
            found[index] = data[strings + name : data.index(b"\0", strings + name)].decode()
    return found


def _resources(text: str) -> dict[str, tuple[int, int, int]]:
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {name: (int(reg), int(stack), int(shared)) for name, reg, stack, shared in re.findall(pattern, text)}


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Return the names of functions as C++ writes them, by their mangled names; those themselves without c++filt."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return {name: name for name in names}
    text = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.replace("(anonymous namespace)::", "").splitlines(), strict=True))


_LINE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
_LABEL = re.compile(r"(\.?[\w$.]+):\s*$")
_CODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def parse(text: str) -> list[Function]:
    """Parse what ``nvdisasm -c -gi`` prints; names stay mangled."""
    functions: list[Function] = []
    frames: list[Frame] = []
    fresh = True
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            functions.append(Function(match[1]))
            frames, fresh = [], True
        elif not functions:
            continue
        elif match := _LINE.match(line):
            if fresh:
                frames, fresh = [], False
            frames.append((match[1], int(match[2])))
        elif match := _CODE.match(line):
            function = functions[-1]
            function.instructions.append(Instruction((match[1] or "").strip(), match[2], match[3], tuple(frames)))
            function.spills += match[2].startswith(("LDL", "STL"))
            fresh = True
        elif match := _LABEL.match(line):
            functions[-1].labels[match[1]] = len(functions[-1].instructions)
    return functions
