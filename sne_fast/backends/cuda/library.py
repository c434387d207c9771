"""Native library of the CUDA backend: its structs and functions in ctypes, and calls on a device's current stream.

``libsne_fast_cuda.so`` is built by ``SNE_FAST_BUILD=cuda pip install .``. With ``SNE_FAST_CUDA_EMULATED`` naming a
host build of the same kernels (``python csrc/tests/emulate.py OUT``), calls run on CPU tensors, for tests.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ops import devices
from ...ops.precision import product_precision
from ..native_library import INT, INT64, POINTER, TEXT, NativeLibrary, NotLoaded, Symbols, open_checked, struct
from . import compatibility

ABI = 4
EMULATED_ENVIRONMENT_VARIABLE = "SNE_FAST_CUDA_EMULATED"
EMULATED = bool(os.environ.get(EMULATED_ENVIRONMENT_VARIABLE))
EMULATED_SHARED = 227 << 10
"""Shared memory of the emulated GPU, an H100's."""
LIBRARY_FILE = Path(__file__).with_name("libsne_fast_cuda.so")
ERROR_FILE = Path(__file__).with_name("libsne_fast_cuda_build_error.txt")


# Field by field as the structs of csrc/include/sne_fast/cuda_abi.h.
ChunkWeightsArgs = struct("ChunkWeightsArgs", "hidden heads backward", "w_qkv w_o pool_query prepared")
ChunkArgs = struct(
    "ChunkArgs",
    "hidden heads layer_norm slots min_length max_length multi_chunk bins first_bin count multiprocessors shared_limit "
    "wgmma",
    "chunk_ptr order owner table values row_code element_code logit basis b_qkv b_o norm pool_query prepared",
)
ChunkSpace = struct("ChunkSpace", "", "saved rows_grad products")
ChunkBlockGrads = struct("ChunkBlockGrads", "", "norm_part w_qkv_part b_qkv_part w_o_part b_o_part")
ChunkScalarGrads = struct("ChunkScalarGrads", "", "values logit_part basis_part norm_part w_o_part b_o_part")
ChunkWeightGradArgs = struct(
    "ChunkWeightGradArgs",
    "hidden rows block multiprocessors",
    "saved products w_qkv_part b_qkv_part w_o_part b_o_part",
)
SegmentSumArgs = struct("SegmentSumArgs", "rows segments width", "ptr x partial out")
SetAttention = struct(
    "SetAttention",
    "sets width heads precision warps one_tile_per_set split_rows pieces aligned_splits max_own_rows",
    "q k v q_ptr k_ptr out lse grad mean grad_q grad_k grad_v partial partial_second partial_rows",
)
SetBlock = struct(
    "SetBlock",
    "rows width heads layer_norm multiprocessors shared_limit",
    "x ptr owner w_q b_q w_k w_v b_v w_o b_o norm out grad factors sum_grad numbers norm_part x_grad",
)
Table = struct("Table", "rows stride size", "part out")
GatherChunks = struct(
    "GatherChunks", "type wide_scale tensors stride tiles", "table scale values grad parts grad_scale"
)
SegmentPool = struct(
    "SegmentPool",
    "rows sets width queries precision per_block blocks",
    "x logits ptr out lse part part_state grad grad_x grad_logits weights_grad part_mean",
)

SYMBOLS: Symbols = {
    "sne_fast_cuda_abi": (INT, []),
    "sne_fast_cuda_status": (TEXT, [INT]),
    "sne_fast_cuda_architectures": (TEXT, []),
    "sne_fast_cuda_runtime_version": (INT, []),
    "sne_fast_cuda_driver_version": (INT, []),
    "sne_fast_cuda_emulated_schedule": (None, [ctypes.c_uint64]),
    "sne_fast_cuda_chunk_weights_size": (INT64, [INT64, INT64]),
    "sne_fast_cuda_chunk_weights": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cuda_chunk_encode": (INT, [INT, POINTER, POINTER, POINTER, POINTER]),
    "sne_fast_cuda_chunk_pool_backward": (INT, [INT, POINTER, POINTER, POINTER, POINTER, POINTER]),
    "sne_fast_cuda_chunk_block_backward": (INT, [INT, POINTER, POINTER, INT64, POINTER, POINTER]),
    "sne_fast_cuda_chunk_codes_backward": (INT, [INT, POINTER, POINTER, INT64, POINTER, POINTER, POINTER]),
    "sne_fast_cuda_chunk_scalar_backward": (INT, [INT, POINTER, POINTER, POINTER, POINTER]),
    "sne_fast_cuda_chunk_weight_grad": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cuda_segment_sum": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_set_attention": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_set_attention_query_grad": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_set_attention_key_grad": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_set_block": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cuda_set_block_query_grad": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cuda_set_block_key_grad": (INT, [INT, POINTER, POINTER]),
    "sne_fast_cuda_sum_tables": (INT, [INT, INT64, POINTER, POINTER]),
    "sne_fast_cuda_gather_chunks": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_gather_chunks_backward": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_segment_pool": (INT, [POINTER, POINTER]),
    "sne_fast_cuda_segment_pool_backward": (INT, [POINTER, POINTER]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Open a build of the CUDA backend and check it; OSError says what is wrong with it."""
    lib = open_checked(path, SYMBOLS, "sne_fast_cuda_abi", ABI)
    if (lib.sne_fast_cuda_architectures() == b"emulated") != EMULATED:
        raise OSError(f"{path} is {'no' if EMULATED else 'an'} emulated build, see {EMULATED_ENVIRONMENT_VARIABLE}")
    return lib


def _load() -> ctypes.CDLL:
    file = Path(os.environ[EMULATED_ENVIRONMENT_VARIABLE]) if EMULATED else LIBRARY_FILE
    if not file.exists():
        if EMULATED:
            raise NotLoaded(f"{EMULATED_ENVIRONMENT_VARIABLE} names {file}, which does not exist")
        why = ERROR_FILE.read_text(encoding="utf-8").strip() if ERROR_FILE.exists() else ""
        raise NotLoaded(why or "this installation has no CUDA backend: reinstall with SNE_FAST_BUILD=cuda (needs nvcc)")
    try:
        return open_library(file)
    except OSError as error:
        raise NotLoaded(f"the CUDA library does not load: {error}") from error


NATIVE = NativeLibrary(_load)
reasons, library = NATIVE.reasons, NATIVE.get


def architectures() -> list[str]:
    """Return the architectures that the library was compiled for, such as ``["80+ptx", "90a", "100"]``."""
    names: bytes = library().sne_fast_cuda_architectures()
    return names.decode().split()


def device_reasons(index: int) -> list[str]:
    """Return why the loaded library cannot run on ``cuda:index``; empty if it can."""
    lib = library()
    return compatibility.device_reasons(
        f"cuda:{index}", torch.cuda.get_device_capability(index), architectures(),
        lib.sne_fast_cuda_driver_version(), lib.sne_fast_cuda_runtime_version(),
    )  # fmt: skip


def precision(dtype: torch.dtype) -> int:
    """Return the ``sne_fast_precision`` of operands of ``dtype``; float32 matmul precision is as set in torch."""
    if dtype == torch.float32:
        return 1 if product_precision(dtype) == "tf32" else 0
    return {torch.float16: 2, torch.bfloat16: 3}[dtype]


def run(name: str, device: torch.device, *args: Any) -> None:
    """Call ``sne_fast_cuda_NAME(*args, stream)`` on the current stream of ``device``; a failure is a RuntimeError."""
    call = getattr(library(), f"sne_fast_cuda_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = call(*args, torch.cuda.current_stream(device).cuda_stream)
    else:
        status = call(*args, None)
    if status:
        raise RuntimeError(f"{name}: {library().sne_fast_cuda_status(status).decode()}")


def pointers(*tensors: Tensor) -> list[int]:
    """Return the addresses of tensors."""
    return [t.data_ptr() for t in tensors]


def aligned(t: Tensor) -> Tensor:
    """Return ``t`` contiguous and starting at a multiple of 16 bytes, which vector loads need."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessor count of a GPU; 2 in the emulator, so that several blocks share out the work."""
    return devices.multiprocessors(device) if device.type == "cuda" else 2


def shared_limit(device: torch.device) -> int:
    """Return the bytes of shared memory that one block of threads may have."""
    if device.type != "cuda":
        return EMULATED_SHARED
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
