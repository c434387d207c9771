"""Executed warp instructions of a kernel per 32 weights, by class, and the rates that a GPU allows them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .flow import Flow
from .kernels import Config, Kernel, branches, loops, training_kernels
from .machine_code import Function, Instruction, read_kernels

CLASSES = {
    "matrix": "HGMMA HMMA IMMA QGMMA UTCHMMA",
    "tensor memory": "LDTM STTM UTCBAR UTCATOMSWS UTCCP UTCSHIFT",
    "exponential": "MUFU",
    "conversion": "F2F F2FP F2I F2IP I2F I2FP I2IP FRND",
    "float": "FADD FMUL FFMA FMNMX FMNMX3 FSETP FSEL FCHK HADD2 HFMA2 HMUL2 HMNMX2 HSETP2 HSET2 FADD2 FFMA2 FMUL2",
    "shared memory": "LDS STS LDSM STSM ATOMS SHFL MOVM REDUX",
    "global memory": "LDG STG LDGSTS LDGDEPBAR RED REDG ATOM ATOMG LD ST CCTL UBLKCP",
    "local memory": "LDL STL",
    "barrier": "BAR BSSY BSYNC BREAK WARPSYNC DEPBAR MEMBAR FENCE WARPGROUP SYNCS WARPGROUPSET ERRBAR YIELD NANOSLEEP",
    "branch": "BRA EXIT CALL RET NOP BPT",
}
"""Classes by the names of their instructions; all others are integers, addresses and moves."""
INTEGER = "integer"
_CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor of a GPU does in a clock; rates of the datasheets, to compare kernels by."""

    name: str
    multiprocessors: int
    gigahertz: float
    issued: int = 4  # warp instructions
    exponentials: int = 16
    matrix_operations: int = 4096  # of 16-bit operands, dense
    shared_bytes: int = 128
    shared_memory: int = 228 << 10
    registers: int = 65536
    warps: int = 64


CHIPS = {
    "h100": Chip("H100 SXM", 132, 1.755),
    "h200": Chip("H200", 132, 1.755),
    "b200": Chip("B200", 148, 1.85, matrix_operations=8192),
    "a100": Chip("A100 SXM", 108, 1.41, matrix_operations=2048, shared_memory=164 << 10),
}
CHIP_OF = {80: "a100", 90: "h100", 100: "b200"}
"""The chip that code for an architecture is compared on."""


@dataclass
class Count:
    """Executed warp instructions of one kernel per 32 weights, and the resources of one launch."""

    kernel: str
    launches: int
    instructions: float
    classes: dict[str, float]
    matrix_operations: float
    shared_bytes: float
    registers: int
    stack_bytes: int
    spills: int
    static_shared_bytes: int
    warps_per_multiprocessor: int
    float_atomics: int


def class_of(instruction: Instruction) -> str:
    """Return the class of an instruction."""
    return _CLASS_OF.get(instruction.name, INTEGER)


def tensor_memory_product(function: Function, at: int) -> tuple[int, int, int]:
    """Return rows, columns and depth of a product whose result goes to tensor memory, from its descriptor.

    Raises:
        RuntimeError: if the descriptor is not a constant that is set just ahead of it.
    """
    instruction = function.instructions[at]
    register = re.search(r"idesc\[(UR\d+)\]", instruction.operands)
    start = max(first for first, _ in function.blocks if first <= at)
    for before in reversed(function.instructions[start:at]):
        if register and before.operands.startswith(f"{register[1]},"):
            constant = re.fullmatch(r"UR\d+, (0x[0-9a-f]+)", before.operands)
            if before.name == "UMOV" and constant and not before.guard:
                # "Instruction descriptor" of tcgen05.mma in the PTX manual: operands of type 2 are TF32
                bits = int(constant[1], 16)
                return 16 * (bits >> 24 & 31), 8 * (bits >> 17 & 63), 8 if bits >> 7 & 7 == 2 else 16
            break
    raise RuntimeError(f"{function.name}: the shape of a product is not in its machine code: {instruction}")


def matrix_operations(function: Function, at: int) -> float:
    """Return the operations of a matrix instruction: those of one warp, or with tensor memory all of them."""
    instruction = function.instructions[at]
    if instruction.name == "UTCHMMA":
        rows, columns, depth = tensor_memory_product(function, at)
        return 2 * rows * columns * depth
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode):  # 64 rows of a warpgroup
        rows, columns, depth = map(int, shape.groups())
        return 2 * rows * columns * depth / 4
    if shape := re.search(r"\.(16)(8)(\d+)\b", instruction.opcode):
        rows, columns, depth = map(int, shape.groups())
        return 2 * rows * columns * depth
    return 0


def shared_bytes(function: Function, at: int) -> float:
    """Return how much of the bandwidth of shared memory an instruction of a warp takes, without bank conflicts."""
    instruction = function.instructions[at]
    if instruction.name == "UTCHMMA":  # 32 bytes of a row and of a column; rows may be in tensor memory
        rows, columns, _ = tensor_memory_product(function, at)
        return 32 * (columns + (rows if instruction.operands.startswith("gdesc") else 0))
    if shape := re.search(r"HGMMA\.64x(\d+)x(\d+)", instruction.opcode):  # the right operand, once for four warps
        return int(shape[1]) * int(shape[2]) * 2 / 4
    if instruction.name in ("LDSM", "STSM"):
        matrices = re.search(r"M88\.(\d)", instruction.opcode)
        return 128 * int(matrices[1]) if matrices else 128
    if instruction.name in ("LDS", "STS"):
        bits = re.search(r"\.(64|128)\b", instruction.opcode)
        return 4 * int(bits[1]) if bits else 128
    return 128 if instruction.name in ("SHFL", "MOVM", "ATOMS") else 0


def float_atomics(function: Function) -> int:
    """Return the number of atomic sums of floats, whose order and so whose bits differ from run to run."""
    return sum(i.name in ("RED", "REDG", "ATOM", "ATOMG", "ATOMS") and bool(re.search(r"\.F(16|32|64)|BF16", i.opcode))
               for i in function.instructions)  # fmt: skip


def totals(function: Function, runs: Mapping[int, float], units: float) -> tuple[dict[str, float], float, float]:
    """Return the executed instructions by class, their matrix operations and bytes of shared memory.

    Args:
        function: the kernel.
        runs: how often each instruction runs.
        units: number of runs to count.
    """
    classes: dict[str, float] = defaultdict(float)
    operations = shared = 0.0
    for at, times in runs.items():
        instruction = function.instructions[at]
        classes[class_of(instruction)] += times * units
        operations += times * units * matrix_operations(function, at)
        shared += times * units * shared_bytes(function, at)
    return dict(classes), operations, shared


def count(function: Function, kernel: Kernel, config: Config, chip: Chip) -> Count:
    """Count one kernel for chunks of ``config``.

    Raises:
        RuntimeError: for a loop without a trip count in the table.
    """
    pieces = re.search(r"ChunkShape<[^>]*?, \d+, \d+, (\d+), ", function.name)
    kernel = replace(kernel, rows=16 * int(pieces[1])) if pieces else kernel
    runs = Flow(function, loops(config, kernel), branches(kernel)).per_run_of(kernel.per_unit)
    classes, operations, shared = totals(function, runs, kernel.units(config, kernel.rows))
    if kernel.threads:
        blocks = chip.registers // (-(-function.registers // 8) * 8 * kernel.threads)
        warps = kernel.threads // 32 * min(blocks, chip.warps * 32 // kernel.threads)
    else:
        threads = re.search(r", (\d+)>\(", function.name)
        warps = int(threads[1]) // 32 if threads else 0
    return Count(kernel.title, kernel.launches, sum(classes.values()), classes, operations, shared,
                 function.registers, function.stack_bytes, function.spills, function.shared_bytes, warps,
                 float_atomics(function))  # fmt: skip


def count_library(
    library: Path, architecture: str, config: Config, dtype: str, chip: Chip, only: Sequence[str] = ()
) -> list[Count]:
    """Count the kernels of a training step of ``chunk_encode`` in a library or an object file.

    Raises:
        RuntimeError: if a kernel is missing, a tool is, or a loop has no trip count.
    """
    found = []
    for kernel in training_kernels(config, dtype, architecture):
        if not only or kernel.title in only:
            functions = read_kernels(library, architecture, kernel.pattern)
            if len(functions) != 1:
                raise RuntimeError(f"{len(functions)} kernels match {kernel.pattern!r}")
            found.append(count(functions[0], kernel, config, chip))
    return found


def bounds(counts: Sequence[Count], chip: Chip) -> dict[str, float]:
    """Return 1e9 weights per second that each unit of a chip allows, all of them fully used."""
    clocks = chip.multiprocessors * chip.gigahertz
    totals = {name: sum(c.launches * getattr(c, name) for c in counts)
              for name in ("instructions", "matrix_operations", "shared_bytes")}  # fmt: skip
    exponentials = sum(c.launches * c.classes.get("exponential", 0) for c in counts)
    rates = {
        "issue": (chip.issued, totals["instructions"]),
        "exponential": (chip.exponentials / 32, exponentials),
        "matrix": (chip.matrix_operations, totals["matrix_operations"]),
        "shared memory": (chip.shared_bytes, totals["shared_bytes"]),
    }
    return {name: 32 * clocks * rate / total for name, (rate, total) in rates.items() if total}


def as_row(found: Count) -> dict[str, object]:
    """Return a count as JSON, numbers rounded to whole instructions."""
    row = asdict(found)
    row["classes"] = {kind: round(value) for kind, value in sorted(found.classes.items())}
    return {name: round(value) if isinstance(value, float) else value for name, value in row.items()}
