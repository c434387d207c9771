"""Canonical order and sign of hidden units: one form for all networks that permutations turn into each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.cutting import packed_strides
from ..data.tensor_types import CONVOLUTION, LINEAR
from .boxes import AxisInfo, SymmetryError, box_coordinates, permuted_placements
from .core import Symmetry
from .per_network import check_named, for_network, group_by_identity, kernels_of, one_per_network
from .permuting import permute_by_tables

_ODD_KINDS = (LINEAR, CONVOLUTION)


class _KeyIndex(NamedTuple):
    """The units that the V values of one architecture belong to, as places in a row of P permutation tables.

    `columns`: K tensors `(V,)`, the units whose axes a value lies on; P where there is none. Units with a permutation
    of their own in each head are not among them. `parts`: pairs of tensors `(M,)`, sources and targets: value
    `sources[m]` is part of the key of unit `targets[m]`; the keys themselves, those that decide between equal ones, and
    all values of a unit.
    """

    columns: tuple[Tensor, ...]
    parts: tuple[tuple[Tensor, Tensor], ...]


def canonicalise(
    batch: WeightBatch,
    symmetries: Symmetry | Sequence[Symmetry],
    generator: torch.Generator | None = None,
    *,
    odd: bool = False,
    jitter: float = 0.0,
) -> WeightBatch:
    """Return a batch whose networks compute the same functions, with the hidden units of each layer sorted by a key.

    Networks that permutations turn into each other become the same one, so that any prediction from it is invariant to
    them, and an order of units means the same in all networks, which the order codes of SNE can use. The key of a unit
    is the sum of its weights from the inputs of the network or to its outputs (from or to units that are not permuted);
    where it has none, its bias; where it has none either, the sum of all its weights. Between units of the same key the
    next of these decides, at last the sum of all squared weights. Attention heads are sorted as wholes by the sum of
    all their weights, and inside each head queries with keys, and values with outputs.

    With `odd` the hidden activations are odd, such as the sine or tanh: `f(-x) = -f(x)`, and turning the sign of all
    weights and biases into and out of a unit changes nothing. Every unit is then turned so that its key is positive. Of
    units without any key but the sum of all weights the sign stays open.

    Sorting is not continuous: units with nearly equal keys change places for next to nothing. `jitter` adds normal
    noise of that share of the layer's root mean square key to every key, not to the weights. Trained on draws
    of it, a predictor learns not to depend on such exchanges.

    Args:
        batch: B networks, with names and shapes as `pack` gives them.
        symmetries: one for all networks, or a sequence of B.
        generator: draws the jitter; on the CPU.
        odd: turn signs as well.
        jitter: 0 gives the canonical form itself.

    Raises:
        SymmetryError: an error of `permute`; with `odd`, a network with permuted tensors that are not weights and
            biases of linear layers or convolutions.

    Example:
        >>> import torch
        >>> import sne_fast
        >>> from sne_fast.symmetry import canonicalise, chain_symmetry, permute
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> symmetry, batch = chain_symmetry(net.state_dict()), sne_fast.pack([net]).detach()
        >>> one, other = (canonicalise(x, symmetry, odd=True) for x in (batch, permute(batch, symmetry)))
        >>> torch.equal(one.values, other.values)
        True
    """
    check_named(batch, "canonicalise")
    if len(batch) == 0:
        return batch
    per_network = one_per_network(symmetries, len(batch), "canonicalise")
    starts = batch.network_starts.tolist()
    values = batch.values
    tables: list[Tensor] = [torch.empty(0)] * len(batch)
    signs = torch.ones_like(values) if odd else None
    for symmetry, rows in group_by_identity(per_network):
        for index, places in group_by_identity([_key_index(batch, b, symmetry, odd) for b in rows]):
            chosen = [rows[i] for i in places]
            size = len(index.columns[0])
            own = torch.stack([values.detach()[starts[b] : starts[b] + size] for b in chosen])  # [n, V]
            keys, *ties = _keys(symmetry, index, own, jitter, generator)
            order = _order(symmetry, [keys.abs(), ties[-1]] if odd else [keys, *ties])
            for b, table in zip(chosen, order, strict=True):
                tables[b] = table
            if signs is not None:
                of_unit = torch.where(keys < 0, -1.0, 1.0).to(values.dtype)
                of_value = torch.stack([of_unit[:, column] for column in index.columns]).prod(0)
                for b, row in zip(chosen, of_value, strict=True):
                    signs[starts[b] : starts[b] + size] = row
    if signs is not None:
        batch = batch.with_fields(values=values * signs)
    return permute_by_tables(batch, per_network, tables)


class CanonicalAugmentation:
    """Fresh jittered canonical forms for every batch of training: `augment(part, rows, generator)`.

    Args:
        symmetries: one for all networks of the training batch, or one per network.
        odd: as for `canonicalise`.
        jitter: as for `canonicalise`.

    Example:
        >>> import torch
        >>> import sne_fast
        >>> from sne_fast.symmetry import CanonicalAugmentation, chain_symmetry
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> batch = sne_fast.pack([net, net]).detach()
        >>> augment = CanonicalAugmentation(chain_symmetry(net.state_dict()), odd=True)
        >>> len(augment(batch[[1]], [1], torch.Generator().manual_seed(0)))
        1
    """

    def __init__(self, symmetries: Symmetry | Sequence[Symmetry], *, odd: bool = False, jitter: float = 0.1) -> None:
        self.symmetries, self.odd, self.jitter = symmetries, odd, jitter

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator) -> WeightBatch:
        """Return `part` in a canonical form; `rows` are the networks' places in the training batch."""
        symmetries = self.symmetries
        own = symmetries if isinstance(symmetries, Symmetry) else [symmetries[row] for row in rows]
        changed = canonicalise(part, own, generator, odd=self.odd, jitter=self.jitter)
        return changed.with_fields(prepared=part.prepared)  # else a predictor would sort the units again


def _key_index(batch: WeightBatch, b: int, symmetry: Symmetry, odd: bool) -> _KeyIndex:
    """Return the index of network b, checked: one object for all networks with their tensors in the same order."""
    names, shapes, chunking, device = batch.names[b][1], batch.shapes[b], batch.chunking, batch.device
    kernels = kernels_of(batch, b)

    def make() -> _KeyIndex:
        symmetry.check_shapes(names, shapes)
        index = _build_key_index(symmetry, names, shapes, kernels, chunking)
        columns = tuple(column.to(device) for column in index.columns)
        return _KeyIndex(columns, tuple((one.to(device), other.to(device)) for one, other in index.parts))

    key = ("key index", names, shapes, kernels, chunking, device)
    index = for_network(batch, b, "canonicalise", lambda: symmetry.cached(key, make))
    if odd:
        _check_odd(batch, b, symmetry)
    return index


def _check_odd(batch: WeightBatch, b: int, symmetry: Symmetry) -> None:
    first = int(batch.layer_ptr_host[batch.network_ptr_host[b]])
    for s, name in enumerate(batch.names[b][1]):
        kind = int(batch.tensor_type[first + s]) // 8
        if kind not in _ODD_KINDS and symmetry.permutes(name):
            raise SymmetryError(
                f"canonicalise: {batch.network_name(b)}: odd=True takes weights and biases of linear layers and "
                f"convolutions only, {name!r} is neither"
            )


def _build_key_index(
    symmetry: Symmetry,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    kernels: Sequence[bool],
    chunking: str,
) -> _KeyIndex:
    axes = symmetry.axes
    total, none = sum(math.prod(shape) for shape in shapes), symmetry.table_size
    columns = [np.full(total, none)]
    # By axis: (rank, positions, units); rank 0 where all other axes are frozen, 1 for vectors, 2 for the rest.
    parts: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    offset = 0
    for name, shape, kernel in zip(names, shapes, kernels, strict=True):
        strides = packed_strides(shape, kernel, chunking)
        for box in symmetry.boxes_of(name):
            coordinates, positions = box_coordinates(box, axes, strides, offset)
            along = dict(zip((p.axis for p in box.placements), coordinates, strict=True))
            permuted = permuted_placements(box, axes)
            k = 0
            for i in permuted:
                axis = box.placements[i].axis
                info = axes[axis]
                # Inside a head the head is no other axis: what stands beside both is as good as beside the unit alone.
                others = [j for j in permuted if j != i and box.placements[j].axis not in info.within]
                rank = 2 if others else 0 if len(shape) > 1 else 1
                table: np.ndarray | int = 0
                for other in info.within:
                    table = table * axes[other].size + along[other]
                place = info.offset + table * info.size + coordinates[i]
                units = np.broadcast_to(place, positions.shape)
                parts.setdefault(axis, []).append((rank, positions.ravel(), units.ravel()))
                if not info.within:
                    if k == len(columns):
                        columns.append(np.full(total, none))
                    columns[k][positions] = units
                    k += 1
        offset += math.prod(shape)
    # Of every axis the parts of its lowest rank, those of its second lowest, of its third, and all.
    by_rank: list[list[tuple[np.ndarray, np.ndarray]]] = [[], [], [], []]
    for found in parts.values():
        for level, rank in enumerate(sorted({rank for rank, _, _ in found})):
            by_rank[level].extend(part[1:] for part in found if part[0] == rank)
        by_rank[-1].extend(part[1:] for part in found)
    return _KeyIndex(
        tuple(torch.from_numpy(column) for column in columns),
        tuple((_joined([one for one, _ in level]), _joined([other for _, other in level])) for level in by_rank),
    )


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]))


def _keys(
    symmetry: Symmetry, index: _KeyIndex, own: Tensor, jitter: float, generator: torch.Generator | None
) -> list[Tensor]:
    """Return the keys of all units, and in order those that decide between equal ones.

    Each is `(n, P + 1)` float64, 0 where nothing is sorted, and in the last column.
    """
    found = []
    for level, (sources, targets) in enumerate(index.parts):
        values = own[:, sources].double()
        keys = own.new_zeros(len(own), symmetry.table_size + 1, dtype=torch.float64)
        found.append(keys.index_add_(1, targets, values.square() if level == len(index.parts) - 1 else values))
    if jitter:
        keys = found[0]
        noise = torch.randn(keys.shape, generator=generator, dtype=torch.float64).to(keys.device)
        for info in symmetry.axes:
            if info.frozen is None:
                part = slice(info.offset, info.offset + info.tables * info.size)
                keys[:, part] += jitter * keys[:, part].square().mean(1, keepdim=True).sqrt() * noise[:, part]
    return found


def _order(symmetry: Symmetry, keys: Sequence[Tensor]) -> Tensor:
    """Return tables `(n, P)` that sort every group by its keys, the first of which weighs most."""
    axes = symmetry.axes
    tables = torch.zeros(len(keys[0]), symmetry.table_size, dtype=torch.int64, device=keys[0].device)
    # The axes that others depend on come first: they depend on fewer.
    for info in sorted((info for info in axes if info.frozen is None), key=lambda info: len(info.within)):
        part = slice(info.offset, info.offset + info.tables * info.size)
        order = torch.arange(info.size, device=tables.device).expand(len(tables), info.tables, -1)
        for key in reversed(keys):
            own = key[:, part].view(len(tables), info.tables, info.size).gather(2, order)
            order = order.gather(2, own.argsort(dim=2, stable=True))
        if any(axes[other].frozen is None for other in info.within):  # the units of a head go with the head
            order = order.gather(1, _moved_tables(symmetry, info, tables)[:, :, None].expand_as(order))
        tables[:, part] = order.flatten(1)
    return tables


def _moved_tables(symmetry: Symmetry, info: AxisInfo, tables: Tensor) -> Tensor:
    """Return `(n, info.tables)`: the table that comes to each place when the axes on which it depends are sorted."""
    axes = symmetry.axes
    sizes = [axes[other].size for other in info.within]
    places = torch.from_numpy(np.indices(sizes).reshape(len(sizes), -1)).to(tables.device)
    here = dict(zip(info.within, places, strict=True))
    moved = torch.zeros(len(tables), info.tables, dtype=torch.int64, device=tables.device)
    for other, size in zip(info.within, sizes, strict=True):
        source = here[other].expand_as(moved)
        if axes[other].frozen is None:
            table = torch.zeros_like(here[other])
            for outer in axes[other].within:
                table = table * axes[outer].size + here[outer]
            source = tables[:, axes[other].offset + table * size + here[other]]
        moved = moved * size + source
    return moved
