"""Batches whose sizes repeat: padded up to a few sizes by networks of zeros, which change nothing for the others.

What a GPU launches for a batch depends on its numbers of weights, chunks, tensors, layers and networks, and on the
lengths of chunks and sets. `pad_to_bucket` rounds all of them up: the numbers by padding, the lengths by declared
bounds. Batches with the same `bucket_of` are launched alike, so that one CUDA graph serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.launch_bounds import LENGTH_GROUPS, LaunchBounds, bins_of, bounds_of, declare_bounds
from .batch import WeightBatch
from .batch_checks import POINTERS
from .devices import without_waiting

STEPS = {"chunk_ptr": 8, "tensor_ptr": 8, "layer_ptr": 1, "network_ptr": 1, "networks": 1}
"""Sizes between a power of two and the next, of the rows of each pointer (weights, chunks, ...) and of the networks.

Weights and chunks are what costs, so their sizes are finer: padding adds an eighth at most.
"""
LONGEST_PADDING = 64
"""Chunks that a tensor of padding may have, since attention is quadratic in them."""
TYPICAL = (16, 128)
"""Length classes of the kernels of set attention: a power of two from the first to the last."""


@dataclass(frozen=True)
class Bucket:
    """What launches for a batch depend on.

    Attributes:
        rows: numbers of weights, chunks, tensors, layers and networks.
        bounds: of the sets of each pointer.
    """

    rows: tuple[int, ...]
    bounds: tuple[LaunchBounds, ...]


def rounded_up(number: int, steps: int) -> int:
    """Return the smallest number, at least the given one, of so many evenly spaced sizes to each power of two.

    Example:
        >>> [rounded_up(n, 4) for n in (0, 3, 9, 17, 1000, 1025)]
        [0, 3, 10, 20, 1024, 1280]
    """
    if number < 2:
        return number
    step = max(1, (1 << ((number - 1).bit_length() - 1)) // steps)
    return -(-number // step) * step


def padded_rows(rows: tuple[int, ...], chunk_size: int) -> tuple[int, ...]:
    """Return numbers of weights, chunks, tensors, layers and networks with room for padding between all of them.

    Every network of padding has a layer, every layer a tensor and so on; at least one chunk of padding is whole.
    """
    steps = [STEPS[pointer] for pointer in POINTERS] + [STEPS["networks"]]
    weights, chunks, tensors, layers, networks = (rounded_up(n + 1, s) for n, s in zip(rows, steps, strict=True))

    def next_up(number: int, level: int) -> int:
        return rounded_up(number + 1, steps[level])

    while layers - rows[3] < networks - rows[4]:
        layers = next_up(layers, 3)
    while tensors - rows[2] < layers - rows[3]:
        tensors = next_up(tensors, 2)
    while True:
        if chunks - rows[1] < tensors - rows[2] + 2:
            chunks = next_up(chunks, 1)
        elif chunks - rows[1] > LONGEST_PADDING * (tensors - rows[2]):
            tensors = next_up(tensors, 2)
        elif weights - rows[0] < chunks - rows[1] + chunk_size - 1:
            weights = next_up(weights, 0)
        elif weights - rows[0] > chunk_size * (chunks - rows[1]):
            chunks = next_up(chunks, 1)
        else:
            return weights, chunks, tensors, layers, networks


def _padding_lengths(weights: int, chunks: int, chunk_size: int) -> np.ndarray:
    """Return lengths of chunks of padding: as many whole ones as there can be, the others of about equal lengths."""
    whole = min(chunks, (weights - chunks) // (chunk_size - 1)) if chunk_size > 1 else chunks
    others, rest = chunks - whole, weights - whole * chunk_size
    lengths = np.full(chunks, chunk_size, np.int64)
    lengths[whole:] = np.diff(np.arange(others + 1) * rest // max(1, others))
    return lengths


def _even(parts: int, rows: int) -> np.ndarray:
    """Return the lengths of parts that rows are cut into, as equal as they can be."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * rows // parts)


def _bounds(ptr: np.ndarray) -> LaunchBounds:
    lengths = np.diff(ptr)
    typical = int(np.square(lengths, dtype=np.float64).sum() / lengths.sum())
    least, most = TYPICAL
    return LaunchBounds(
        rounded_up(max(least, int(lengths.max())), 1), min(most, rounded_up(max(least, typical), 1))
    )  # fmt: skip


def _chunk_bounds(ptr: np.ndarray, chunk_size: int) -> LaunchBounds:
    """Return the bounds of chunks: few of other lengths than the usual one count as a sixteenth of all."""
    lengths = np.diff(ptr)
    counts = np.bincount(lengths, minlength=LENGTH_GROUPS[-1][1] + 1)
    bounds = counts.copy()
    for first, last in LENGTH_GROUPS:
        found = bins_of(counts, first, last)
        bounds[first : last + 1] = 0
        # A launch for chunks that fill their bins needs one of them.
        if first <= chunk_size and (first < last or found):
            bins = rounded_up(max(found, len(lengths) // 16), 4)
            bounds[last] = bins * (2 if last == LENGTH_GROUPS[0][1] else 1)
    sets = _bounds(ptr)
    return LaunchBounds(sets.longest, sets.typical, tuple(bounds.tolist()))


def pad_to_bucket(batch: WeightBatch) -> WeightBatch:
    """Pad a batch, so that its sizes repeat, by networks of zeros that come last.

    The encodings of the other networks are the same, up to rounding, and no gradient comes from padding whose encodings
    are not used. Names, shapes and what was skipped are left out.

    Args:
        batch: B networks, B at least 1.

    Returns:
        A batch of more networks, whose first B are those of `batch`.

    Example:
        >>> batch = encoder.pack([torch.nn.Linear(4, 3), torch.nn.Linear(2, 2)])
        >>> padded = pad_to_bucket(batch)
        >>> len(padded), torch.allclose(encoder(padded)[:2], encoder(batch))
        (4, True)
    """
    rows = (batch.num_weights, batch.num_chunks, batch.num_tensors, batch.num_layers, batch.num_networks)
    target = padded_rows(rows, batch.chunk_size)
    more = [after - before for after, before in zip(target, rows, strict=True)]
    lengths = dict(zip(POINTERS[1:], (_even(more[i + 1], more[i]) for i in range(1, 4)), strict=True))
    lengths["chunk_ptr"] = _padding_lengths(more[0], more[1], batch.chunk_size)
    hosts, fields = {}, batch.fields()
    for pointer in POINTERS:
        own = batch.pointers_host[pointer].numpy()
        hosts[pointer] = torch.from_numpy(np.concatenate([own, own[-1] + lengths[pointer].cumsum()]))
    fields.update({pointer: without_waiting(host, batch.device) for pointer, host in hosts.items()})
    for field, count in (("values", more[0]), ("tensor_type", more[2]), ("layer_level", more[3])):
        fields[field] = _with_rows(fields[field], count, 0)
    fields["tensor_scale"] = _with_rows(fields["tensor_scale"], more[2], 1)
    fields.update(names=(), shapes=(), skipped=())
    statistics = None if batch.statistics is None else _with_rows(batch.statistics, more[2], 0)
    kernels = _with_rows(batch.kernels, more[2], 0)
    padded = WeightBatch.trusted(hosts, kernels=kernels, statistics=statistics, **fields)
    bounds = {pointer: _bounds(host.numpy()) for pointer, host in hosts.items()}
    bounds["chunk_ptr"] = _chunk_bounds(hosts["chunk_ptr"].numpy(), batch.chunk_size)
    return _with_bounds(padded, bounds)


def bucket_of(batch: WeightBatch) -> Bucket:
    """Return what launches for a padded batch depend on.

    Raises:
        ValueError: a batch that `pad_to_bucket` did not pad.
    """
    found = [bounds_of(host) for host in batch.pointers_host.values()]
    bounds = tuple(one for one in found if one is not None)
    if len(bounds) < len(found):
        raise ValueError("bucket_of: batch must be padded; use pad_to_bucket(batch)")
    rows = (batch.num_weights, batch.num_chunks, batch.num_tensors, batch.num_layers, batch.num_networks)
    return Bucket(rows, bounds)


def buffers_like(batch: WeightBatch) -> WeightBatch:
    """Copy a padded batch to memory of its own, into which `copy_into` copies others of the same bucket."""
    bounds = dict(zip(POINTERS, bucket_of(batch).bounds, strict=True))
    fields: dict[str, Any] = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.fields().items()
    }
    # Where the pointers are on the CPU, they are their own copies there.
    hosts = {p: fields[p] if batch.device.type == "cpu" else batch.pointers_host[p].clone() for p in POINTERS}
    statistics = None if batch.statistics is None else batch.statistics.clone()
    copy = WeightBatch.trusted(hosts, kernels=batch.kernels, statistics=statistics, **fields)
    return _with_bounds(copy, bounds)


@torch.no_grad()
def copy_into(buffers: WeightBatch, batch: WeightBatch) -> None:
    """Copy a batch into buffers of its bucket, without waiting for the device; copies of pointers on the CPU stay."""
    for field, to in buffers.fields().items():
        if isinstance(to, Tensor):
            to.copy_(getattr(batch, field), non_blocking=True)
    if buffers.statistics is not None and batch.statistics is not None:
        buffers.statistics.copy_(batch.statistics, non_blocking=True)


def _with_rows(tensor: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([tensor, tensor.new_full((count, *tensor.shape[1:]), value)])


def _with_bounds(batch: WeightBatch, bounds: dict[str, LaunchBounds]) -> WeightBatch:
    for pointer, bound in bounds.items():
        declare_bounds(batch.pointers_host[pointer], bound)
    longest = bounds["tensor_ptr"].longest
    object.__setattr__(batch, "chunk_positions", torch.arange(longest, device=batch.device))
    return batch
