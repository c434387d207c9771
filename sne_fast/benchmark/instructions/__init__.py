"""Executed instructions of the CUDA kernels, counted from their machine code: a benchmark that needs no GPU.

python -m sne_fast.benchmark.instructions [LIBRARY]
"""

from .counting import CHIPS, Chip, Count, bounds, count, count_library, float_atomics
from .flow import Flow, Loop
from .kernels import Config, Kernel, training_kernels
from .machine_code import Function, Instruction, parse, read_kernels

__all__ = [
    "CHIPS", "Chip", "Config", "Count", "Flow", "Function", "Instruction", "Kernel", "Loop", "bounds", "count",
    "count_library", "float_atomics", "parse", "read_kernels", "training_kernels",
]  # fmt: skip
