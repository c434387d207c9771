"""``chunk_encode`` on the CUDA engine: workspaces and launches; kernels in csrc/cuda/chunk_*."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._plans.chunks import LONGEST_CHUNK, ChunkPlan, SlotClass, count_lengths, owners, plan_chunks
from . import library

WIDTHS = (32, 64, 128, 256)
NAMES = ("row_code", "element_code", "logit", "basis", "w_qkv", "b_qkv", "w_o", "b_o", "norm", "pool_query")
EMULATED_SHARED = 227 << 10


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may have."""
    if device.type != "cuda":
        return EMULATED_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@dataclass
class ChunkCall:
    """What all launches of one call share. ``weights``: the op's parameters by name, contiguous."""

    values: Tensor
    chunk_ptr: Tensor
    owner: Tensor
    plan: ChunkPlan
    weights: dict[str, Tensor]
    prepared: Tensor

    @classmethod
    def make(
        cls, values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor,
        parameters: Sequence[Tensor], backward: bool,
    ) -> ChunkCall:  # fmt: skip
        weights = {name: t.contiguous() for name, t in zip(NAMES, parameters, strict=True)}
        heads, h = weights["pool_query"].shape
        plan = plan_chunks(chunk_ptr, count_lengths(chunk_ptr_host))
        size = library.library().sne_fast_cuda_chunk_weights_size(h, heads)
        prepared = values.new_empty(size)
        args = library.ChunkWeightsArgs(
            h, heads, backward, *library.pointers(weights["w_qkv"], weights["w_o"], weights["pool_query"], prepared)
        )
        library.run("chunk_weights", values.device, library.precision(values.dtype), ctypes.byref(args))
        return cls(values, chunk_ptr, owners(tensor_ptr, chunk_ptr.shape[0] - 1), plan, weights, prepared)

    @property
    def heads(self) -> int:
        return self.weights["pool_query"].shape[0]

    @property
    def width(self) -> int:
        return self.weights["pool_query"].shape[1]

    def args(self, slot_class: SlotClass, blocks: int, first_block: int, count: int) -> Any:
        """The struct of a launch on blocks ``first_block .. first_block + count`` of a class of ``blocks``."""
        w, device = self.weights, self.values.device
        return library.ChunkArgs(
            self.width, self.heads, w["norm"].shape[0] > 0, slot_class.slots, slot_class.lowest, slot_class.shared,
            blocks, first_block, count, library.multiprocessors(device), shared_limit(device),
            *library.pointers(
                self.chunk_ptr, self.plan.order, self.owner, self.plan.table, self.values, w["row_code"],
                w["element_code"], w["logit"], w["basis"], w["b_qkv"], w["b_o"], w["norm"], w["pool_query"],
                self.prepared,
            ),
        )  # fmt: skip

    def run(self, name: str, *args: Any) -> None:
        library.run(name, self.values.device, library.precision(self.values.dtype), *args)


def chunk_encode(
    values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor, tensor_ptr_host: Tensor,
    *parameters: Tensor,
) -> Tensor:  # fmt: skip
    """The op ``chunk_encode``: arguments and result as in :mod:`sne_fast._schema`."""
    values, chunk_ptr, tensor_ptr = (t.contiguous() for t in (values, chunk_ptr, tensor_ptr))
    chunks = chunk_ptr.shape[0] - 1
    out = values.new_empty((chunks, *parameters[-1].shape))
    if not chunks:
        return out
    call = ChunkCall.make(values, chunk_ptr, tensor_ptr, chunk_ptr_host, parameters, backward=False)
    for slot_class, blocks in call.plan.classes():
        args = call.args(slot_class, blocks, 0, blocks)
        call.run("chunk_encode", ctypes.byref(args), out.data_ptr(), None)
    return out


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    """Why these kernels cannot run ``op`` ("chunk_encode" or its backward) on its arguments; empty if they can."""
    if op.endswith("_backward"):
        args = args[1:]
    (heads, h), codes, reasons = args[14].shape, args[6].shape[0], []
    if h not in WIDTHS:
        reasons.append(f"width must be one of {', '.join(map(str, WIDTHS))}, got {h}")
    elif heads < 1 or heads & (heads - 1) or h % heads or not 8 <= h // heads <= 64:
        reasons.append(f"num_heads must be a power of two with {h}/num_heads in 8..64, got {heads}")
    if codes > LONGEST_CHUNK:
        reasons.append(f"chunk size must be at most {LONGEST_CHUNK}, got {codes}")
    return reasons
