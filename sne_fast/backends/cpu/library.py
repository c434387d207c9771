"""The CPU backend's native library: found, loaded and checked once, and its structs in ctypes.

Nothing is loaded at import. A failed load is remembered: :func:`reasons` explains it, :func:`library` raises it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

ABI = 1
ISA_ENVIRONMENT_VARIABLE = "SNE_FAST_CPU_ISA"
ISAS = ("portable", "avx2", "avx512")
LIBRARY_FILE = Path(__file__).parents[2] / "_cpu_engine.so"
ERROR_FILE = Path(__file__).parents[2] / "_cpu_engine_build_error.txt"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def struct(name: str, integers: str, pointers: str) -> type[ctypes.Structure]:
    """A struct of int64 and, behind them, pointers."""
    fields: list[tuple[str, type]] = [(field, ctypes.c_int64) for field in integers.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Field by field the structs of csrc/include/sne_fast/cpu_abi.h.
ChunkEncodeArgs = struct(
    "ChunkEncodeArgs",
    "num_chunks num_tensors num_values hidden heads element_rows layer_norm num_threads",
    "chunk_ptr tensor_ptr values row_code element_code logit basis w_qkv b_qkv w_o b_o norm pool_query",
)
ChunkEncodeGrads = struct(
    "ChunkEncodeGrads", "", "grad values row_code element_code logit basis w_qkv b_qkv w_o b_o norm pool_query"
)
SetAttentionArgs = struct(
    "SetAttentionArgs", "num_sets rows_q rows_k hidden heads num_threads", "q_ptr k_ptr q k v out lse"
)
SetAttentionGrads = struct("SetAttentionGrads", "", "grad q k v")
SegmentPoolArgs = struct("SegmentPoolArgs", "num_segments rows hidden heads num_threads", "ptr x logits out lse")
SegmentPoolGrads = struct("SegmentPoolGrads", "", "grad x logits")
GatherChunksArgs = struct(
    "GatherChunksArgs",
    "num_matrices num_values num_threads",
    "shapes dtypes matrices scale values grad scale_grad",
)

_INT, _I64, _TEXT, _REF = ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
Symbols = Mapping[str, tuple[type | None, list[type]]]
"""Exported functions: results and arguments."""
SYMBOLS: Symbols = {
    "sne_fast_cpu_abi": (_INT, []),
    "sne_fast_cpu_status": (_TEXT, [_INT]),
    "sne_fast_cpu_isa": (_TEXT, []),
    "sne_fast_cpu_select_isa": (_INT, [_TEXT]),
    "sne_fast_cpu_has_isa": (_INT, [_TEXT]),
    "sne_fast_cpu_chunk_encode": (_INT, [_INT, _REF, _REF]),
    "sne_fast_cpu_chunk_encode_backward": (_INT, [_INT, _REF, _REF]),
    "sne_fast_cpu_set_attention": (_INT, [_INT, _REF]),
    "sne_fast_cpu_set_attention_backward": (_INT, [_INT, _REF, _REF]),
    "sne_fast_cpu_segment_pool": (_INT, [_INT, _REF]),
    "sne_fast_cpu_segment_pool_backward": (_INT, [_INT, _REF, _REF]),
    "sne_fast_cpu_gather_chunks": (_INT, [_INT, _REF]),
    "sne_fast_cpu_gather_chunks_backward": (_INT, [_INT, _REF]),
    "sne_fast_cpu_product_rate": (_INT, [_INT, _I64, _I64, _I64, _I64, _I64]),
}


def open_with(path: Path, symbols: Symbols, abi_symbol: str, abi: int) -> ctypes.CDLL:
    """Load a build of a backend, declare its functions and check its ABI number; OSError says what is wrong with it."""
    lib = ctypes.CDLL(str(path))
    missing = [name for name in symbols if not hasattr(lib, name)]
    if missing:
        raise OSError(f"{path} lacks {', '.join(missing)}: it is from another version of sne_fast, reinstall")
    for name, (result, arguments) in symbols.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    found = getattr(lib, abi_symbol)()
    if found != abi:
        raise OSError(f"{path} has ABI {found}, this sne_fast needs {abi}: reinstall sne_fast")
    return lib


def open_library(path: Path) -> ctypes.CDLL:
    """Load a build of the CPU backend, as :func:`open_with` does."""
    return open_with(path, SYMBOLS, "sne_fast_cpu_abi", ABI)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not LIBRARY_FILE.exists():
        why = ERROR_FILE.read_text(encoding="utf-8").strip() if ERROR_FILE.exists() else f"{LIBRARY_FILE} is missing"
        return None, f"the native library was not built: {why}; reinstall with g++"
    try:
        lib = open_library(LIBRARY_FILE)
    except OSError as error:
        return None, f"the native library does not load: {error}"
    wanted = os.environ.get(ISA_ENVIRONMENT_VARIABLE, "")
    if lib.sne_fast_cpu_select_isa(wanted.encode()):
        usable = ", ".join(isa for isa in ISAS if lib.sne_fast_cpu_has_isa(isa.encode()))
        return None, f"{ISA_ENVIRONMENT_VARIABLE}={wanted} must be one that this machine can run: {usable}"
    return lib, ""


def reasons() -> list[str]:
    """Why the native library cannot be used; empty if it can."""
    _, why = _load()
    return [why] if why else []


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: saying why there is none.
    """
    lib, why = _load()
    if lib is None:
        raise RuntimeError(why)
    return lib


def isa() -> str:
    """The instruction set in use: "portable", "avx2" or "avx512"."""
    return library().sne_fast_cpu_isa().decode()


def supported_isas() -> list[str]:
    """Those of :data:`ISAS` that this build holds and this processor runs."""
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
    """Raise what a status code says: MemoryError or RuntimeError."""
    if status:
        text = f"{what}: {library().sne_fast_cpu_status(status).decode()}"
        raise MemoryError(text) if status == 2 else RuntimeError(text)
