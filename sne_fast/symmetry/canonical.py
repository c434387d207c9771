"""Canonical order and sign of hidden units: one form for all networks that permutations turn into each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.pointers import network_starts
from ..data.tensor_types import CONVOLUTION, LINEAR
from .core import Axis, Block, Symmetry, SymmetryError
from .permuting import _alike, _per_network, permute
from .plan import layout

ODD_KINDS = (LINEAR, CONVOLUTION)


class _Units(NamedTuple):
    """Which units the V values of one architecture belong to, as places in a row of P permutation tables.

    `columns`: K tensors `(V,)`, the units whose axes a value lies on; P where there is none. `sources`, `targets`
    `(M,)`: value `sources[m]` is part of the key of unit `targets[m]`.
    """

    columns: tuple[Tensor, ...]
    sources: Tensor
    targets: Tensor


def canonicalise(
    batch: WeightBatch,
    symmetries: Symmetry | Sequence[Symmetry],
    generator: torch.Generator | None = None,
    *,
    odd: bool = False,
    jitter: float = 0.0,
) -> WeightBatch:
    """A batch whose networks compute the same functions, the hidden units of each layer sorted by a key of their own.

    Networks that permutations turn into each other become the same one, so that whatever is predicted from it is
    invariant to them, and an order of units means the same in all networks, which the order codes of SNE can use. The
    key of a unit is the sum of its weights from the inputs of the network or to its outputs (whatever is not permuted);
    where it has none, its bias; where it has none either, the sum of all its weights.

    With `odd` the hidden activations are odd, such as the sine or tanh: `f(-x) = -f(x)`, and turning the sign of all
    weights and biases into and out of a unit changes nothing. Every unit is then turned so that its key is positive. Of
    units without any key but the sum of all weights the sign stays open.

    Sorting is not continuous: units with nearly the same key change places for next to nothing. `jitter` adds normal
    noise of that share of the layer's root mean square key to every key, not to the weights. Trained on draws
    of it, a predictor learns not to depend on such exchanges.

    Args:
        batch: B networks, with names and shapes as `pack` gives them.
        symmetries: one for all networks, or a sequence of B. Units with a permutation of their own in each head stay in
            their order.
        generator: draws the jitter; on the CPU.
        odd: turn signs as well.
        jitter: 0 gives the canonical form itself.

    Raises:
        SymmetryError: what `permute` raises; with `odd`, a network with permuted tensors that are not weights and
            biases of linear layers or convolutions.

    Example:
        >>> symmetry = sne_fast.symmetry.chain_symmetry(siren.state_dict())
        >>> batch = sne_fast.symmetry.canonicalise(sne_fast.pack([siren]).detach(), symmetry, odd=True)
    """
    if len(batch) == 0:
        return batch
    per_network = _per_network(symmetries, len(batch), "canonicalise")
    if not batch.names or not batch.shapes:
        raise SymmetryError("canonicalise: the batch must have names and shapes, as those that pack makes have")
    firsts = network_starts(batch).tolist()
    values = batch.values
    tables: list[Tensor] = [torch.empty(0)] * len(batch)
    turned = torch.ones_like(values) if odd else None
    for symmetry, rows in _alike(per_network):
        for units, chosen in _by_layout(batch, symmetry, rows, odd):
            size = len(units.columns[0])
            own = torch.stack([values.detach()[firsts[b] : firsts[b] + size] for b in chosen])  # [n, V]
            keys = _keys(symmetry, units, own, jitter, generator)
            for b, table in zip(chosen, _order(symmetry, keys.abs() if odd else keys), strict=True):
                tables[b] = table
            if turned is not None:
                sign = torch.where(keys < 0, -1.0, 1.0).to(values.dtype)
                of_value = torch.stack([sign[:, column] for column in units.columns]).prod(0)
                for b, row in zip(chosen, of_value, strict=True):
                    turned[firsts[b] : firsts[b] + size] = row
    if turned is not None:
        batch = batch._with(values=values * turned)
    return permute(batch, per_network, permutations=tables)


class CanonicalAugmentation:
    """Fresh jittered canonical forms for every batch of training: `augment(part, rows, generator)`.

    Args:
        symmetries: one for all networks of the training batch, or one per network.
        odd, jitter: as for `canonicalise`.
    """

    def __init__(self, symmetries: Symmetry | Sequence[Symmetry], *, odd: bool = False, jitter: float = 0.1) -> None:
        self.symmetries, self.odd, self.jitter = symmetries, odd, jitter

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator) -> WeightBatch:
        """`part` in a canonical form; `rows` are the networks' places in the training batch."""
        symmetries = self.symmetries
        own = symmetries if isinstance(symmetries, Symmetry) else [symmetries[row] for row in rows]
        return canonicalise(part, own, generator, odd=self.odd, jitter=self.jitter)


def _by_layout(
    batch: WeightBatch, symmetry: Symmetry, rows: Sequence[int], odd: bool
) -> list[tuple[_Units, list[int]]]:
    """Networks of one architecture by the order of their tensors, which files may differ in."""
    found: dict[int, tuple[_Units, list[int]]] = {}
    for b in rows:
        names, shapes = batch.names[b][1], batch.shapes[b]
        key = ("canonical", names, shapes, batch.chunking, batch.device)
        if key not in symmetry._plans:
            try:
                symmetry._check(names, shapes)
            except SymmetryError as error:
                raise SymmetryError(f"canonicalise: {batch.network_name(b)}: {error}") from None
            symmetry._plans[key] = _units(symmetry, names, shapes, batch)
        if odd:
            _check_odd(batch, b, symmetry)
        units = symmetry._plans[key]
        found.setdefault(id(units), (units, []))[1].append(b)
    return list(found.values())


def _check_odd(batch: WeightBatch, b: int, symmetry: Symmetry) -> None:
    first = int(batch.layer_ptr_host[batch.network_ptr_host[b]])
    for s, name in enumerate(batch.names[b][1]):
        blocks = symmetry.blocks.get(symmetry.alias.get(name, ""), ())
        kind = int(batch.tensor_type[first + s]) // 8
        if kind not in ODD_KINDS and any(_moving(symmetry, block) for block in blocks):
            raise SymmetryError(
                f"canonicalise: {batch.network_name(b)}: odd=True takes weights and biases of linear layers and "
                f"convolutions only, {name!r} is neither"
            )


def _moving(symmetry: Symmetry, block: Block) -> list[tuple[int, Axis]]:
    return [(i, axis) for i, axis in enumerate(block.axes) if symmetry.atoms[axis.atom].frozen is None]


def _units(symmetry: Symmetry, names: Sequence[str], shapes: Sequence[tuple[int, ...]], batch: WeightBatch) -> _Units:
    total, none = sum(math.prod(shape) for shape in shapes), symmetry.table_size
    columns = [np.full(total, none)]
    # Of each axis: (rank, places of values, units), rank 0 where all other axes stay, 1 for vectors, 2 for the rest.
    parts: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    offset = 0
    for name, shape in zip(names, shapes, strict=True):
        steps = layout(shape, batch.chunking)
        first = symmetry.alias.get(name)
        for block in symmetry.blocks[first] if first is not None else ():
            sizes = [symmetry.atoms[axis.atom].size for axis in block.axes]
            grids = np.ogrid[tuple(slice(n) for n in sizes)]
            start = offset + sum(s * step for s, step in zip(block.start, steps, strict=True))
            places = np.asarray(
                start + sum(g * axis.step * steps[axis.dim] for g, axis in zip(grids, block.axes, strict=True))
            )
            moving = [(i, axis) for i, axis in _moving(symmetry, block) if not symmetry.atoms[axis.atom].within]
            alone = len(_moving(symmetry, block)) == 1
            for k, (i, axis) in enumerate(moving):
                units = np.broadcast_to(symmetry.atoms[axis.atom].offset + grids[i], places.shape)
                if k == len(columns):
                    columns.append(np.full(total, none))
                columns[k][places] = units
                rank = 2 if not alone else 0 if len(shape) > 1 else 1
                parts.setdefault(axis.atom, []).append((rank, places.ravel(), units.ravel()))
        offset += math.prod(shape)
    best = {atom: min(rank for rank, _, _ in found) for atom, found in parts.items()}
    chosen = [p for atom, found in parts.items() for p in found if p[0] == best[atom]]
    empty = np.zeros(0, np.int64)
    index = [torch.from_numpy(np.concatenate([empty, *(p[k] for p in chosen)])) for k in (1, 2)]
    return _Units(tuple(torch.from_numpy(c).to(batch.device) for c in columns), *(t.to(batch.device) for t in index))


def _keys(symmetry: Symmetry, units: _Units, own: Tensor, jitter: float, generator: torch.Generator | None) -> Tensor:
    """Keys `(n, P + 1)` float64 of all units; 0 where nothing is sorted, and in the last column."""
    keys = own.new_zeros(len(own), symmetry.table_size + 1, dtype=torch.float64)
    keys.index_add_(1, units.targets, own[:, units.sources].double())
    if jitter:
        noise = torch.randn(keys.shape, generator=generator, dtype=torch.float64).to(keys.device)
        for info in symmetry.atoms:
            if info.frozen is None and not info.within:
                part = slice(info.offset, info.offset + info.size)
                keys[:, part] += jitter * keys[:, part].square().mean(1, keepdim=True).sqrt() * noise[:, part]
    return keys


def _order(symmetry: Symmetry, keys: Tensor) -> Tensor:
    """Tables `(n, P)` that sort every group by its keys."""
    tables = torch.zeros(len(keys), symmetry.table_size, dtype=torch.int64, device=keys.device)
    for info in symmetry.atoms:
        if info.frozen is None:
            part = slice(info.offset, info.offset + info.tables * info.size)
            tables[:, part] = keys[:, part].view(len(keys), -1, info.size).argsort(dim=2, stable=True).flatten(1)
    return tables
