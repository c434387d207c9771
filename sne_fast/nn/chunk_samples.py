"""A seeded, stratified sample of the chunks of large tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.pointers import ragged_gather

__all__ = ["ChunkSample", "sample_chunks"]


class Half(NamedTuple):
    """Every other chunk of sampled tensors, and all of the others.

    Attributes:
        rows: `(N'',)` int64, places among the chunks of the sample.
        tensor_ptr: `(T+1,)` int64, which of `rows` belong to which tensor.
        tensor_ptr_host: the same on the CPU.
        position: `(N'',)` int64, the place of each chunk in its tensor.
    """

    rows: Tensor
    tensor_ptr: Tensor
    tensor_ptr_host: Tensor
    position: Tensor


class ChunkSample(NamedTuple):
    """Some chunks of a batch.

    Attributes:
        batch: with these chunks alone; statistics are those of all.
        position: `(N',)` int64, the place of each chunk in its tensor.
        halves: the two halves of the sample, from which its error is estimated; none where that is not wanted.
    """

    batch: WeightBatch
    position: Tensor
    halves: tuple[Half, ...]


def sample_chunks(batch: WeightBatch, max_chunks: int, seed: int) -> ChunkSample | None:
    """Choose `max_chunks` chunks of every tensor that has more, None where no tensor has.

    The chunks of a tensor are cut into `max_chunks` runs of equal length, and one is drawn from each. What is drawn
    depends on the seed, on the layer's level, on the place of the tensor in its layer and on its number of chunks.

    Args:
        batch: networks of any sizes.
        max_chunks: at least 2.
        seed: of the draw.
    """
    counts = batch.tensor_ptr_host.diff().tolist()
    if max(counts, default=0) <= max_chunks:
        return None
    firsts, levels = batch.tensor_ptr_host.tolist(), batch.layer_level.tolist()
    position: list[np.ndarray] = []
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    place = 0
    for level, (a, b) in zip(levels, pairwise(batch.layer_ptr_host.tolist()), strict=True):
        for s in range(a, b):
            n = counts[s]
            chosen = _stratified(n, max_chunks, [seed, level, s - a, n]) if n > max_chunks else np.arange(n)
            rows = np.arange(place, place + len(chosen))
            for i in (0, 1):
                halves[i].append(rows[i::2] if n > max_chunks else rows)
            position.append(chosen)
            place += len(chosen)
    offset = np.repeat(np.array(firsts[:-1], np.int64), [len(chosen) for chosen in position])
    joined = np.concatenate(position)
    chunk_ptr, values = ragged_gather(batch.chunk_ptr_host.numpy(), joined + offset, with_rows=True)
    fields = batch.fields()
    hosts = {
        **batch.pointers_host,
        "chunk_ptr": torch.from_numpy(chunk_ptr),
        "tensor_ptr": torch.from_numpy(np.cumsum([0, *map(len, position)], dtype=np.int64)),
    }
    on_host = batch.device.type == "cpu"
    fields.update({name: hosts[name] if on_host else hosts[name].to(batch.device) for name in hosts})
    fields["values"] = batch.values[torch.from_numpy(values).to(batch.device)]
    sampled = WeightBatch.trusted(hosts, kernels=batch.kernels, statistics=batch.statistics, **fields)
    where = torch.from_numpy(joined).to(batch.device)

    def half(rows: list[np.ndarray]) -> Half:
        ptr = torch.from_numpy(np.cumsum([0, *map(len, rows)], dtype=np.int64))
        chosen = torch.from_numpy(np.concatenate(rows)).to(batch.device)
        return Half(chosen, ptr.to(batch.device), ptr, where[chosen])

    return ChunkSample(sampled, where, (half(halves[0]), half(halves[1])))


def _stratified(count: int, wanted: int, seed: list[int]) -> np.ndarray:
    bounds = np.arange(wanted + 1, dtype=np.int64) * count // wanted
    return bounds[:-1] + np.random.default_rng(seed).integers(0, bounds[1:] - bounds[:-1])
