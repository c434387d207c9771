"""What a WeightBatch must satisfy, checked wherever a user makes one."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batch import WeightBatch

CHUNKINGS = ("flat", "neuron", "kernel")
NUM_TENSOR_TYPES = 64

POINTERS = ("chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr")
TENSORS = ("values", *POINTERS, "tensor_type", "layer_level", "tensor_scale")
_LETTER = {"chunk_ptr": "N", "tensor_ptr": "T", "layer_ptr": "L", "network_ptr": "B"}
_PART = {"chunk_ptr": "chunk", "tensor_ptr": "tensor", "layer_ptr": "layer", "network_ptr": "network"}
_INSIDE = {"chunk_ptr": "values", "tensor_ptr": "chunks", "layer_ptr": "tensors", "network_ptr": "layers"}


def check_fields(batch: WeightBatch) -> None:
    """Types, dtypes, shapes and devices."""
    for field in TENSORS:
        tensor = getattr(batch, field)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"WeightBatch: {field} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != batch.values.device:
            raise ValueError(f"WeightBatch: {field} must be on {batch.values.device} like values, got {tensor.device}")
        floating = field in ("values", "tensor_scale")
        if (not tensor.dtype.is_floating_point) if floating else tensor.dtype != torch.int64:
            size = f"{_LETTER[field]}+1" if field in POINTERS else {"values": "V", "layer_level": "L"}.get(field, "T")
            wanted = "floating" if floating else "int64"
            raise ValueError(
                f"WeightBatch: {field} must be {wanted} of shape ({size},), got {tensor.dtype} {tuple(tensor.shape)}"
            )
    for field in ("values", *POINTERS):
        tensor = getattr(batch, field)
        if tensor.ndim != 1 or (field != "values" and tensor.shape[0] == 0):
            size = "V" if field == "values" else f"{_LETTER[field]}+1"
            raise ValueError(f"WeightBatch: {field} must have shape ({size},), got {tuple(tensor.shape)}")
    for field, pointer in (("tensor_type", "tensor_ptr"), ("tensor_scale", "tensor_ptr"), ("layer_level", "layer_ptr")):
        shape, count = tuple(getattr(batch, field).shape), getattr(batch, pointer).shape[0] - 1
        if shape != (count,):
            raise ValueError(
                f"WeightBatch: {field} must have one entry per {_PART[pointer]}, "
                f"shape ({count},) by {pointer}, got {shape}"
            )
    try:
        if isinstance(batch.chunk_size, bool) or operator.index(batch.chunk_size) < 1:
            raise TypeError
    except TypeError:
        got = repr(batch.chunk_size)
        raise ValueError(f"WeightBatch: chunk_size must be an integer of at least 1, got {got}") from None
    if batch.chunking not in CHUNKINGS:
        raise ValueError(f"WeightBatch: chunking must be one of {', '.join(CHUNKINGS)}, got {batch.chunking!r}")


def check_contents(batch: WeightBatch) -> None:
    """Pointers that fit each other, ids and levels in range, names and shapes for every tensor."""
    ends = {"network_ptr": batch.num_layers, "layer_ptr": batch.num_tensors, "tensor_ptr": batch.num_chunks}
    ends["chunk_ptr"] = batch.num_weights
    lengths = {}
    for field in reversed(POINTERS):
        host = getattr(batch, f"{field}_host")
        if int(host[0]) != 0:
            raise ValueError(f"WeightBatch: {field} must start at 0, got {int(host[0])}")
        lengths[field] = host.diff()
        short = (lengths[field] < 1).nonzero()
        if len(short):
            row = int(short[0])
            raise ValueError(
                f"WeightBatch: {field} must increase, every {_PART[field]} holds at least one, "
                f"got {int(host[row])} then {int(host[row + 1])} for {_PART[field]} {row}"
            )
        if int(host[-1]) != ends[field]:
            end = f"the {ends[field]} {_INSIDE[field]}"
            raise ValueError(f"WeightBatch: {field} must end at {end}, got {int(host[-1])}")
    _check_names(batch)
    if batch.num_chunks and int(lengths["chunk_ptr"].max()) > batch.chunk_size:
        chunk = int(lengths["chunk_ptr"].argmax())
        tensor = int(torch.searchsorted(batch.tensor_ptr_host, chunk, right=True)) - 1
        raise ValueError(
            f"WeightBatch: chunk_ptr must cut chunks of 1..{batch.chunk_size} values, "
            f"got {int(lengths['chunk_ptr'][chunk])} in chunk {chunk} of {batch.tensor_name(tensor)}"
        )
    wrong = ((batch.tensor_type < 0) | (batch.tensor_type >= NUM_TENSOR_TYPES)).nonzero()
    if len(wrong):
        s = int(wrong[0])
        got = f"{int(batch.tensor_type[s])} for {batch.tensor_name(s)}"
        raise ValueError(f"WeightBatch: tensor_type must be 8 * kind + role in 0..{NUM_TENSOR_TYPES - 1}, got {got}")
    wrong = (~(batch.tensor_scale > 0) | batch.tensor_scale.isinf()).nonzero()
    if len(wrong):
        s = int(wrong[0])
        got = f"{float(batch.tensor_scale[s])} for {batch.tensor_name(s)}"
        raise ValueError(f"WeightBatch: tensor_scale must be finite and above 0 (1 if nothing was divided), got {got}")
    wrong = (batch.layer_level < 0).nonzero()
    if len(wrong):
        row = int(wrong[0])
        b = int(torch.searchsorted(batch.network_ptr_host, row, right=True)) - 1
        got = f"{int(batch.layer_level[row])} for layer {row} in {batch.network_name(b)}"
        raise ValueError(f"WeightBatch: layer_level must be at least 0, got {got}")


def _check_names(batch: WeightBatch) -> None:
    firsts = batch.layer_ptr_host[batch.network_ptr_host].tolist()
    weights = batch.chunk_ptr_host[batch.tensor_ptr_host].tolist()
    for field in ("names", "shapes"):
        entries = getattr(batch, field)
        if not entries:
            continue
        if len(entries) != len(batch):
            got = f"{len(entries)} for {len(batch)}"
            raise ValueError(f"WeightBatch: {field} must have one entry per network, got {got}")
        for b, entry in enumerate(entries):
            count, given = firsts[b + 1] - firsts[b], len(entry[1] if field == "names" else entry)
            if given != count:
                raise ValueError(
                    f"WeightBatch: {field} must list the {count} tensors of {batch.network_name(b)}, got {given}"
                )
            if field == "shapes":
                for i, shape in enumerate(entry):
                    s = firsts[b] + i
                    held = weights[s + 1] - weights[s]
                    if int(np.prod(shape, dtype=np.int64)) != held:
                        got = f"{shape} for the {held} of {batch.tensor_name(s)}"
                        raise ValueError(f"WeightBatch: shapes must fit the values, got {got}")
