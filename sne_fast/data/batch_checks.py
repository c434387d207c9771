"""Checks of the fields of a `WeightBatch`, run wherever a user makes one."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .choices import Chunking, Order, Scale
from .names import network_name, tensor_name

CHUNKINGS = get_args(Chunking)
SCALES = get_args(Scale)
ORDERS = get_args(Order)
NUM_TENSOR_TYPES = 64

POINTERS = ("chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr")
TENSORS = ("values", *POINTERS, "tensor_type", "layer_level", "tensor_scale")
PACKED_BY = ("chunk_size", "chunking", "scale", "order")
"""Fields that say how networks were packed: batches that differ in one are never joined, and no encoder takes both."""
PER_NETWORK = ("names", "shapes", "skipped")
_LETTER = {"chunk_ptr": "N", "tensor_ptr": "T", "layer_ptr": "L", "network_ptr": "B"}
_PART = {"chunk_ptr": "chunk", "tensor_ptr": "tensor", "layer_ptr": "layer", "network_ptr": "network"}
_INSIDE = {"chunk_ptr": "values", "tensor_ptr": "chunks", "layer_ptr": "tensors", "network_ptr": "layers"}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Check types, dtypes, shapes and devices of the constructor's arguments."""
    values = fields["values"]
    for field in TENSORS:
        tensor = fields[field]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"WeightBatch: {field} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != values.device:
            raise ValueError(f"WeightBatch: {field} must be on {values.device} like values, got {tensor.device}")
        floating = field in ("values", "tensor_scale")
        if (not tensor.dtype.is_floating_point) if floating else tensor.dtype != torch.int64:
            size = f"{_LETTER[field]}+1" if field in POINTERS else {"values": "V", "layer_level": "L"}.get(field, "T")
            wanted = "floating" if floating else "int64"
            raise ValueError(
                f"WeightBatch: {field} must be {wanted} of shape ({size},), got {tensor.dtype} {tuple(tensor.shape)}"
            )
    for field in ("values", *POINTERS):
        tensor = fields[field]
        if tensor.ndim != 1 or (field != "values" and tensor.shape[0] == 0):
            size = "V" if field == "values" else f"{_LETTER[field]}+1"
            raise ValueError(f"WeightBatch: {field} must have shape ({size},), got {tuple(tensor.shape)}")
    for field, pointer in (("tensor_type", "tensor_ptr"), ("tensor_scale", "tensor_ptr"), ("layer_level", "layer_ptr")):
        shape, count = tuple(fields[field].shape), fields[pointer].shape[0] - 1
        if shape != (count,):
            raise ValueError(
                f"WeightBatch: {field} must have one entry per {_PART[pointer]}, "
                f"shape ({count},) by {pointer}, got {shape}"
            )
    try:
        if isinstance(fields["chunk_size"], bool) or operator.index(fields["chunk_size"]) < 1:
            raise TypeError
    except TypeError:
        got = repr(fields["chunk_size"])
        raise ValueError(f"WeightBatch: chunk_size must be an integer of at least 1, got {got}") from None
    for field, allowed in (("chunking", CHUNKINGS), ("scale", SCALES), ("order", ORDERS)):
        if fields[field] not in allowed:
            raise ValueError(f"WeightBatch: {field} must be one of {', '.join(allowed)}, got {fields[field]!r}")


def check_contents(fields: Mapping[str, Any], hosts: Mapping[str, Tensor]) -> None:
    """Check that pointers fit each other, that ids and levels are in range, and that every tensor has name and shape.

    Args:
        fields: the constructor's arguments, as :func:`check_fields` has passed them.
        hosts: CPU copies of the pointers, by name.
    """
    names, chunk_size = fields["names"], fields["chunk_size"]
    counts = {field: host.shape[0] - 1 for field, host in hosts.items()}
    ends = {"network_ptr": counts["layer_ptr"], "layer_ptr": counts["tensor_ptr"], "tensor_ptr": counts["chunk_ptr"]}
    ends["chunk_ptr"] = fields["values"].shape[0]
    lengths = {}
    for field in reversed(POINTERS):
        host = hosts[field]
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
    _check_names(fields, hosts)
    if counts["chunk_ptr"] and int(lengths["chunk_ptr"].max()) > chunk_size:
        chunk = int(lengths["chunk_ptr"].argmax())
        tensor = int(torch.searchsorted(hosts["tensor_ptr"], chunk, right=True)) - 1
        raise ValueError(
            f"WeightBatch: chunk_ptr must cut chunks of 1..{chunk_size} values, "
            f"got {int(lengths['chunk_ptr'][chunk])} in chunk {chunk} of {tensor_name(names, hosts, tensor)}"
        )
    wrong = ((fields["tensor_type"] < 0) | (fields["tensor_type"] >= NUM_TENSOR_TYPES)).nonzero()
    if len(wrong):
        s = int(wrong[0])
        got = f"{int(fields['tensor_type'][s])} for {tensor_name(names, hosts, s)}"
        raise ValueError(f"WeightBatch: tensor_type must be 8 * kind + role in 0..{NUM_TENSOR_TYPES - 1}, got {got}")
    wrong = (~(fields["tensor_scale"] > 0) | fields["tensor_scale"].isinf()).nonzero()
    if len(wrong):
        s = int(wrong[0])
        got = f"{float(fields['tensor_scale'][s])} for {tensor_name(names, hosts, s)}"
        raise ValueError(f"WeightBatch: tensor_scale must be finite and above 0 (1 if nothing was divided), got {got}")
    wrong = (fields["layer_level"] < 0).nonzero()
    if len(wrong):
        row = int(wrong[0])
        b = int(torch.searchsorted(hosts["network_ptr"], row, right=True)) - 1
        got = f"{int(fields['layer_level'][row])} for layer {row} in {network_name(names, b)}"
        raise ValueError(f"WeightBatch: layer_level must be at least 0, got {got}")


def _check_names(fields: Mapping[str, Any], hosts: Mapping[str, Tensor]) -> None:
    names, networks = fields["names"], hosts["network_ptr"].shape[0] - 1
    firsts = hosts["layer_ptr"][hosts["network_ptr"]].tolist()
    weights = hosts["chunk_ptr"][hosts["tensor_ptr"]].tolist()
    for field in PER_NETWORK:
        entries = fields[field]
        if not entries:
            continue
        if len(entries) != networks:
            got = f"{len(entries)} for {networks}"
            raise ValueError(f"WeightBatch: {field} must have one entry per network, got {got}")
        if field == "skipped":
            continue
        for b, entry in enumerate(entries):
            count, given = firsts[b + 1] - firsts[b], len(entry[1] if field == "names" else entry)
            if given != count:
                raise ValueError(
                    f"WeightBatch: {field} must list the {count} tensors of {network_name(names, b)}, got {given}"
                )
            if field == "shapes":
                for i, shape in enumerate(entry):
                    s = firsts[b] + i
                    held = weights[s + 1] - weights[s]
                    if int(np.prod(shape, dtype=np.int64)) != held:
                        got = f"{shape} for the {held} of {tensor_name(names, hosts, s)}"
                        raise ValueError(f"WeightBatch: shapes must fit the values, got {got}")
