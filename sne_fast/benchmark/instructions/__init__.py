"""Executed instructions of the CUDA and Triton kernels, counted from their machine code: a benchmark that needs no GPU.

python -m sne_fast.benchmark.instructions [LIBRARY]
python -m sne_fast.benchmark.instructions --backend triton --architecture 90
"""

from .counting import CHIP_OF, CHIPS, Chip, Count, bounds, count, count_library, float_atomics
from .flow import Flow, Loop
from .kernels import Config, Kernel, training_kernels
from .machine_code import Function, Instruction, parse, read_kernels
from .triton_kernels import compile_kernel, count_triton

__all__ = [
    "CHIPS",
    "CHIP_OF",
    "Chip",
    "Config",
    "Count",
    "Flow",
    "Function",
    "Instruction",
    "Kernel",
    "Loop",
    "bounds",
    "compile_kernel",
    "count",
    "count_library",
    "count_triton",
    "float_atomics",
    "parse",
    "read_kernels",
    "training_kernels",
]  # fmt: skip
