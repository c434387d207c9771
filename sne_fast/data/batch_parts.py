"""Choosing networks of a `WeightBatch`, and joining batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .batch_checks import PACKED_BY, PER_NETWORK, POINTERS
from .pointers import join_pointers, ragged_gather

# That of sne_fast.data.batch, which imports this module.
WeightBatch = Any


def sliced(batch: WeightBatch, first: int, last: int) -> WeightBatch:
    """Return networks first..last-1 of a batch, as views of it."""
    if first == 0 and last == len(batch):
        return batch
    bounds = {}
    start, stop = first, last
    for field in reversed(POINTERS):
        bounds[field] = (start, stop)
        host = getattr(batch, f"{field}_host")
        start, stop = int(host[start]), int(host[stop])
    fields = batch.fields()
    hosts = {}
    for field, (a, b) in bounds.items():
        pointer, host = fields[field], getattr(batch, f"{field}_host")
        offset = int(host[a])
        hosts[field] = host[a : b + 1] - offset
        fields[field] = hosts[field] if pointer is host else pointer[a : b + 1] - offset
    a, b = bounds["tensor_ptr"]
    fields.update(tensor_type=batch.tensor_type[a:b], tensor_scale=batch.tensor_scale[a:b])
    a, b = bounds["layer_ptr"]
    fields.update(layer_level=batch.layer_level[a:b], values=batch.values[start:stop])
    fields.update({field: fields[field][first:last] for field in PER_NETWORK})
    tensors = slice(*bounds["tensor_ptr"])
    statistics = None if batch.statistics is None else batch.statistics[tensors]
    return type(batch).trusted(hosts, kernels=batch.kernels[tensors], statistics=statistics, **fields)


def taken(batch: WeightBatch, networks: np.ndarray) -> WeightBatch:
    """Return networks of a batch, by numbers, in their order and as often as they are named.

    Pointers by one ragged gather per level on the host, values by copies of whole networks.
    """
    fields = batch.fields()
    hosts = {}
    chosen = networks
    rows = {}
    starts, stops = networks, networks + 1  # after the loop: the run of values of each chosen network
    for field in reversed(POINTERS):
        host = getattr(batch, f"{field}_host").numpy()
        starts, stops = host[starts], host[stops]
        rows[field] = chosen
        pointer, chosen = ragged_gather(host, chosen, with_rows=field != "chunk_ptr")
        hosts[field] = torch.from_numpy(pointer)
    if len(networks):  # neighbouring runs are copied as one
        joint = starts[1:] == stops[:-1]
        starts, stops = starts[np.append(True, ~joint)], stops[np.append(~joint, True)]
    pieces = [batch.values[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    fields["values"] = torch.cat(pieces) if pieces else batch.values[:0]
    fields.update({field: host.to(batch.device) for field, host in hosts.items()})
    tensors = torch.from_numpy(rows["tensor_ptr"]).to(batch.device)
    layers = torch.from_numpy(rows["layer_ptr"]).to(batch.device)
    fields.update(tensor_type=batch.tensor_type[tensors], tensor_scale=batch.tensor_scale[tensors])
    fields["layer_level"] = batch.layer_level[layers]
    for field in PER_NETWORK:
        entries = fields[field]
        fields[field] = tuple(entries[b] for b in networks.tolist()) if entries else ()
    kernels = batch.kernels[torch.from_numpy(rows["tensor_ptr"])]
    statistics = None if batch.statistics is None else batch.statistics[tensors]
    own = hosts if batch.device.type != "cpu" else None
    return type(batch).trusted(own, kernels=kernels, statistics=statistics, **fields)


def joined(batches: Sequence[WeightBatch]) -> WeightBatch:
    """Return the networks of at least one batch as one batch.

    Raises:
        ValueError: batches that differ in how they were packed, dtype or device.
    """
    for i, batch in enumerate(batches):
        for field in (*PACKED_BY, "prepared", "dtype", "device"):
            one, other = getattr(batches[0], field), getattr(batch, field)
            if one != other:
                raise ValueError(
                    f"WeightBatch.cat: {field} must agree, batch 0 has {one} and batch {i} has {other}; "
                    f"pack alike, or convert with .to()"
                )
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    scale = max((b.tensor_scale.dtype for b in batches), key=lambda d: d.itemsize)
    fields: dict[str, Any] = {
        "values": torch.cat([b.values for b in batches]),
        "tensor_type": torch.cat([b.tensor_type for b in batches]),
        "layer_level": torch.cat([b.layer_level for b in batches]),
        "tensor_scale": torch.cat([b.tensor_scale.to(scale) for b in batches]),
        **{field: getattr(first, field) for field in (*PACKED_BY, "prepared")},
    }
    hosts = {field: join_pointers([getattr(b, f"{field}_host") for b in batches]) for field in POINTERS}
    fields.update({field: host.to(first.device) for field, host in hosts.items()})
    for field in PER_NETWORK:
        known = all(getattr(b, field) or not len(b) for b in batches)
        fields[field] = tuple(entry for b in batches for entry in getattr(b, field)) if known else ()
    kernels = torch.cat([b.kernels for b in batches])
    whole = [b for b in batches if b.num_tensors]
    counted = [b.statistics for b in whole if b.statistics is not None]
    statistics = torch.cat(counted) if whole and len(counted) == len(whole) else None
    own = hosts if first.device.type != "cpu" else None
    return type(first).trusted(own, kernels=kernels, statistics=statistics, **fields)
