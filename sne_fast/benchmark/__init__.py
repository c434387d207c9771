"""Benchmark cases, baselines, limits and memory, shared by the suite in `bench/` and the command `sne-fast bench`."""

from .cases import CASES, GPU_CASES, Case, find_case, scaling_case
from .checks import Check, CheckFailed, check_agreement, run_check
from .contenders import BASELINES, Contender, DoesNotFit, contender
from .limits import FORWARDS_PER_STEP, chunk_operations, product_rate
from .memory import probe
from .padded_memory import available_bytes, default_memory_limit, padded_bytes
from .pairs import Pairs

__all__ = [
    "BASELINES",
    "CASES",
    "FORWARDS_PER_STEP",
    "GPU_CASES",
    "Case",
    "Check",
    "CheckFailed",
    "Contender",
    "DoesNotFit",
    "Pairs",
    "available_bytes",
    "check_agreement",
    "chunk_operations",
    "contender",
    "default_memory_limit",
    "find_case",
    "padded_bytes",
    "probe",
    "product_rate",
    "run_check",
    "scaling_case",
]
