"""Native library of the CPU backend: its structs and functions in ctypes, and the choice of the instruction set.

Nothing is loaded at import. :func:`reasons` explains a failed load, :func:`library` raises it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...ops.op_threads import threads_of_ops
from ...ops.schema import BLOCK_PARAMETERS, CHUNK_PARAMETERS
from ..native_library import INT, INT64, POINTER, TEXT, NativeLibrary, NotLoaded, Symbols, open_checked, struct

ABI = 7
ISA_ENVIRONMENT_VARIABLE = "SNE_FAST_CPU_ISA"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
LIBRARY_FILE = Path(__file__).with_name("libsne_fast_cpu.so")
ERROR_FILE = Path(__file__).with_name("libsne_fast_cpu_build_error.txt")
BAD_ARGUMENT, NO_MEMORY = 1, 2
"""Status codes of the library."""
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


# Field by field as the structs of csrc/include/sne_fast/cpu_abi.h.
ChunkEncodeArgs = struct(
    "ChunkEncodeArgs",
    "num_chunks num_tensors num_values hidden heads element_rows layer_norm num_threads",
    f"chunk_ptr tensor_ptr values {' '.join(CHUNK_PARAMETERS)}",
)
ChunkEncodeGrads = struct("ChunkEncodeGrads", "", f"grad values {' '.join(CHUNK_PARAMETERS)}")
SetAttentionArgs = struct(
    "SetAttentionArgs", "num_sets rows_q rows_k hidden heads num_threads", "q_ptr k_ptr q k v out lse"
)
SetAttentionGrads = struct("SetAttentionGrads", "", "grad q k v")
SegmentPoolArgs = struct("SegmentPoolArgs", "num_segments rows hidden heads num_threads", "ptr x logits out lse")
SegmentPoolGrads = struct("SegmentPoolGrads", "", "grad x logits")
SetBlockArgs = struct(
    "SetBlockArgs",
    "num_sets rows_q rows_k dim_q dim_k hidden heads layer_norm num_threads",
    f"q_ptr k_ptr q k {' '.join(BLOCK_PARAMETERS)} out",
)
SetBlockGrads = struct("SetBlockGrads", "", f"grad q k {' '.join(BLOCK_PARAMETERS)}")
GatherChunksArgs = struct(
    "GatherChunksArgs",
    "num_matrices num_values num_threads",
    "shapes dtypes matrices scale values grad scale_grad",
)
TensorStatisticsArgs = struct(
    "TensorStatisticsArgs", "num_tensors num_values num_threads", "start dims scale values out"
)


class Hooks(ctypes.Structure):
    """The C functions of Python with which a call gives the interpreter's lock back, and runs handlers of signals."""

    _fields_ = (("release", POINTER), ("acquire", POINTER), ("check", POINTER))

    @classmethod
    def of_python(cls) -> Hooks:
        """Return the functions of the running interpreter."""
        api = ctypes.pythonapi
        functions = (api.PyEval_SaveThread, api.PyEval_RestoreThread, api.PyErr_CheckSignals)
        return cls(*(ctypes.cast(function, POINTER) for function in functions))


SYMBOLS: Symbols = {
    "sne_fast_cpu_abi": (INT, []),
    "sne_fast_cpu_status": (TEXT, [INT]),
    "sne_fast_cpu_isa": (TEXT, []),
    "sne_fast_cpu_select_isa": (INT, [TEXT]),
    "sne_fast_cpu_has_isa": (INT, [TEXT]),
    "sne_fast_cpu_set_hooks": (None, [POINTER]),
    "sne_fast_cpu_chunk_encode": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cpu_chunk_encode_backward": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cpu_set_attention": (INT, [INT, POINTER]),
    "sne_fast_cpu_set_attention_backward": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cpu_segment_pool": (INT, [INT, POINTER]),
    "sne_fast_cpu_segment_pool_backward": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cpu_set_block": (INT, [INT, POINTER]),
    "sne_fast_cpu_set_block_backward": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cpu_gather_chunks": (INT, [INT, POINTER]),
    "sne_fast_cpu_gather_chunks_backward": (INT, [INT, POINTER]),
    "sne_fast_cpu_tensor_statistics": (INT, [INT, POINTER]),
    "sne_fast_cpu_product_rate": (INT, [INT, INT64, INT64, INT64, INT64, INT64]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Open a build of the CPU backend and check it; OSError says what is wrong with it.

    Its functions are called with the interpreter locked. Those that compute give the lock back meanwhile, and run
    handlers of signals between tiles: what a handler raises, such as KeyboardInterrupt, ends the call and is raised.
    """
    lib = open_checked(path, SYMBOLS, "sne_fast_cpu_abi", ABI, ctypes.PyDLL)
    hooks = Hooks.of_python()
    lib.sne_fast_cpu_set_hooks(ctypes.addressof(hooks))  # copied by the library
    return lib


def _load() -> ctypes.CDLL:
    if not LIBRARY_FILE.exists():
        why = ERROR_FILE.read_text(encoding="utf-8").strip() if ERROR_FILE.exists() else f"{LIBRARY_FILE} is missing"
        raise NotLoaded(f"the native library was not built: {why}; reinstall with g++")
    try:
        lib = open_library(LIBRARY_FILE)
    except OSError as error:
        raise NotLoaded(f"the native library does not load: {error}") from error
    wanted = os.environ.get(ISA_ENVIRONMENT_VARIABLE, "")
    if lib.sne_fast_cpu_select_isa(wanted.encode(errors="surrogateescape")):
        usable = ", ".join(isa for isa in ISAS if lib.sne_fast_cpu_has_isa(isa.encode()))
        # Not a reason to take another backend: who names an instruction set is not to get the slow reference instead.
        raise ValueError(
            f"{ISA_ENVIRONMENT_VARIABLE}: instruction set must be one that this machine runs, {usable}, or empty for "
            f"the best of them; got {wanted!r}"
        )
    return lib


NATIVE = NativeLibrary(_load)
reasons, library = NATIVE.reasons, NATIVE.get

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def num_threads() -> int:
    """Return how many threads a call may use, see `threads_of_ops`; one in a forked child.

    OpenMP's threads do not survive a fork, and a child that waits for them waits without end.
    """
    return 1 if _forked else threads_of_ops()


def isa() -> str:
    """Return the instruction set in use, one of :data:`ISAS`."""
    name: bytes = library().sne_fast_cpu_isa()
    return name.decode()


def multiplies_bf16() -> bool:
    """Return whether the instruction set in use multiplies bfloat16."""
    return isa().endswith("_bf16")


def supported_isas() -> list[str]:
    """Return those of :data:`ISAS` that this build holds and this processor runs."""
    return [name for name in ISAS if library().sne_fast_cpu_has_isa(name.encode())]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the backend with another instruction set inside the ``with`` block, for the whole process (for tests)."""
    before = isa()
    check(library().sne_fast_cpu_select_isa(name.encode()), f"use_isa({name!r})")
    try:
        yield
    finally:
        library().sne_fast_cpu_select_isa(before.encode())


def check(status: int, what: str) -> None:
    """Raise MemoryError, or ValueError or RuntimeError, for a status code that is an error."""
    if status:
        text = f"{what}: {library().sne_fast_cpu_status(status).decode()}"
        raise {BAD_ARGUMENT: ValueError, NO_MEMORY: MemoryError}.get(status, RuntimeError)(text)
