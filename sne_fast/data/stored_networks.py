"""Networks whose tensors lie in memory as they are stored, packed many at once by what is known of their architectures.

The batch is that of `pack_collected`, to the bit. Only ordinary float tensors on the CPU, without gradients, are taken
so; everything else is left to it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.functional import gather_stored
from ..ops.schema import STORED_DTYPES
from .architectures import Architecture, Form, architecture_of, cuts_of
from .batch import WeightBatch, scale_dtype
from .checkpoints import Checkpoint
from .choices import Chunking, NonFinite, Order, Scale
from .pointers import pointer_of
from .readers.quantisation_configs import NOTHING_SAID
from .readers.small_files import SmallFiles
from .tensor_scales import TILE, divisors_of, sums_of_squares

__all__ = ["StoredNetwork", "pack_stored", "stored_network"]

_OTHERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = frozenset((*STORED_DTYPES, *_OTHERS))
_WIDTHS = np.array([dtype.itemsize for dtype in STORED_DTYPES])
_BLOCK = 1 << 16
"""Elements that are squared at once, half a MiB in float64, which stays in cache."""


class StoredNetwork(NamedTuple):
    """A network in memory.

    Attributes:
        name: of the network.
        forms: of all of its tensors.
        known: its architecture.
        buffers: that its weights lie in.
        held: (T,) place of the buffer of each weight, or 0 for one buffer.
        offsets: (T,) of each weight in its buffer, in bytes.
        left_out: what the reader left out, with the reasons.
    """

    name: str
    forms: tuple[Form, ...]
    known: Architecture
    buffers: list[Tensor]
    held: np.ndarray | int
    offsets: np.ndarray | int
    left_out: tuple[tuple[str, str], ...] = ()


def stored_network(network: Any, order: Order, files: SmallFiles) -> StoredNetwork | None:
    """Return a network in memory, None where it needs `collect`, which also says what is wrong with it.

    Args:
        network: as `pack` takes it.
        order: of layers.
        files: reads paths.
    """
    if isinstance(network, (str, os.PathLike)):
        file = files.read(network)
        if file is None or (order == "definition" and not file.layout.keeps_order):
            return None
        known = architecture_of(file.layout.forms, order)
        if known is None:
            return None
        offsets = file.layout.offsets[known.places]
        return StoredNetwork(os.fsdecode(network), file.layout.forms, known, [file.buffer], 0, offsets)
    if isinstance(network, Checkpoint):
        beside = network.adapter_scales or network.kinds or network.quantisation != NOTHING_SAID
        if beside or (order == "definition" and not network.keeps_order):
            return None
        return _in_memory("checkpoint", network.tensors, order, tuple(network.left_out.items()))
    if isinstance(network, Mapping):
        name = getattr(network, "name", None)
        return _in_memory(name if isinstance(name, str) else "state_dict", network, order)
    return None


def _in_memory(
    name: str, mapping: Mapping[Any, Any], order: Order, left_out: tuple[tuple[str, str], ...] = ()
) -> StoredNetwork | None:
    items = list(mapping.items())
    forms = []
    grad = torch.is_grad_enabled()
    for key, tensor in items:
        # The exact type: parameters are treated otherwise, and subclasses may compute their values.
        if type(tensor) is not Tensor or type(key) is not str or not tensor.is_cpu or tensor.layout != torch.strided:
            return None
        dtype = tensor.dtype
        if dtype not in _DTYPES or (grad and tensor.requires_grad) or tensor.is_nested or tensor.is_neg():
            return None
        forms.append((key, tuple(tensor.shape), dtype))
    stored = tuple(forms)
    known = architecture_of(stored, order) if stored else None
    if known is None:
        return None
    buffers = [items[place][1] for place in known.places.tolist()]
    if len({tensor.data_ptr() for tensor in buffers}) < len(buffers) or not all(t.is_contiguous() for t in buffers):
        return None
    return StoredNetwork(name, stored, known, buffers, np.arange(len(buffers)), 0, left_out)


def pack_stored(
    found: Sequence[StoredNetwork],
    chunk_size: int,
    chunking: Chunking,
    *,
    scale: Scale,
    order: Order,
    nonfinite: NonFinite,
    dtype: torch.dtype,
    device: torch.device | None,
) -> WeightBatch | None:
    """Cut the weights of networks in memory; arguments are those of `pack`, checked.

    Returns:
        The batch; None for values that are not finite or too large, and networks of too many chunks.
    """
    cuts = [cuts_of(network.forms, order, chunk_size, chunking) for network in found]
    known = [network.known for network in found]
    counts = np.array([len(one.sizes) for one in known])
    table = np.empty((counts.sum(), 5), np.int64)
    buffers: list[Tensor] = []
    row = 0
    chunk_ends, chunks_of = [], []
    for network, cut, count in zip(found, cuts, counts.tolist(), strict=True):
        if cut is None:
            return None
        rows = table[row : row + count]
        rows[:, 0] = network.held
        rows[:, 0] += len(buffers)
        rows[:, 1] = network.offsets
        rows[:, 2] = network.known.dtypes
        rows[:, 3:] = cut.matrices
        chunk_ends.append(cut.chunk_ends)
        chunks_of.append(cut.chunks_of)
        buffers += network.buffers
        row += count
    sizes = table[:, 3] * table[:, 4]
    divisors = _divisors(buffers, table, sizes, scale, nonfinite, dtype)
    if divisors is None:
        return None
    total = int(sizes.sum())
    values = gather_stored(buffers, torch.from_numpy(table), divisors, total, dtype)

    starts = np.cumsum([0, *(int(ends[-1]) for ends in chunk_ends)])
    chunk_ptr = np.zeros(sum(map(len, chunk_ends)) + 1, np.int64)
    np.concatenate(chunk_ends, out=chunk_ptr[1:])
    chunk_ptr[1:] += np.repeat(starts[:-1], [len(ends) for ends in chunk_ends])
    hosts = {
        "chunk_ptr": torch.from_numpy(chunk_ptr),
        "tensor_ptr": pointer_of(np.concatenate(chunks_of)),
        "layer_ptr": pointer_of(np.concatenate([one.tensors_of for one in known])),
        "network_ptr": pointer_of([len(one.levels) for one in known]),
    }
    target = values.device if device is None else device
    return WeightBatch.trusted(
        hosts if target.type != "cpu" else None,
        kernels=torch.from_numpy(np.concatenate([one.kernels for one in known])),
        values=values.to(target),
        **{field: host.to(target) for field, host in hosts.items()},
        tensor_type=torch.from_numpy(np.concatenate([one.types for one in known])).to(target),
        layer_level=torch.from_numpy(np.concatenate([one.levels for one in known])).to(target),
        tensor_scale=divisors.to(target),
        chunk_size=chunk_size,
        chunking=chunking,
        scale=scale,
        order=order,
        names=tuple((network.name, network.known.names) for network in found),
        shapes=tuple(one.shapes for one in known),
        skipped=tuple(network.left_out + network.known.skipped for network in found),
    )


def _divisors(
    buffers: list[Tensor], table: np.ndarray, sizes: np.ndarray, scale: Scale, nonfinite: NonFinite, dtype: torch.dtype
) -> Tensor | None:
    """Return what tensors are divided by as `tensor_scales`, None where a value is not finite or may be too large."""
    wanted = scale_dtype(dtype)
    if scale == "none" and nonfinite == "keep":
        return torch.ones(len(table), dtype=wanted, device="cpu")
    squares = _sums_of_squares(buffers, table, sizes)
    doubles = table[:, 2] == STORED_DTYPES.index(torch.float64)
    if doubles.any() and not ((squares[doubles] > 1e-290) & (squares[doubles] < math.inf)).all():
        return None  # squares that have left the range of float64
    with np.errstate(invalid="ignore"):
        rms = np.sqrt(squares / sizes)
    if nonfinite != "keep":
        limit = torch.finfo(dtype if scale == "none" else wanted).max if nonfinite == "raise" else math.inf
        if not (np.isfinite(rms) & (rms * np.sqrt(sizes) <= limit)).all():
            return None
    return divisors_of(rms, scale, wanted)[0]


def _sums_of_squares(buffers: list[Tensor], table: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each tensor in float64, with the bits that `root_mean_square` computes with."""
    squares = np.empty(len(table))
    large = sizes > TILE
    for t in np.flatnonzero(large).tolist():
        held, offset, code = table[t, :3].tolist()
        stored = STORED_DTYPES[code]
        data = buffers[held].reshape(-1).view(torch.uint8)[offset : offset + int(sizes[t]) * stored.itemsize]
        squares[t] = sums_of_squares([data.view(stored)])[0]
    small = np.flatnonzero(~large)
    rows = table[small]
    rows[:, 3], rows[:, 4] = sizes[small], 1
    ends = np.cumsum(rows[:, 3])
    first = 0
    while first < len(rows):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        part = rows[first:last].copy()
        inside = buffers[int(part[0, 0]) : int(part[-1, 0]) + 1]  # rows are in order of their buffers
        part[:, 0] -= part[0, 0].copy()
        count = int(ends[last - 1] - before)
        ones = torch.ones(len(part), dtype=torch.float64, device="cpu")
        values = gather_stored(inside, torch.from_numpy(part), ones, count, torch.float64).numpy()
        with np.errstate(over="ignore", under="ignore"):
            np.square(values, out=values)
        squares[small[first:last]] = np.add.reduceat(values, ends[first:last] - part[:, 3] - before)
        first = last
    return squares
