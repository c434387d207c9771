"""Permuting packed batches: `draw`, `permute` and `PermutationAugmentation`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from .boxes import SymmetryError
from .core import Symmetry
from .gather import GatherIndex
from .per_network import check_named, for_network, group_by_identity, kernels_of, one_per_network

CANONICAL = "canonical units"
"""How the steps of `WeightBatch.prepared` begin that permuting undoes."""


def draw(
    symmetries: Symmetry | Sequence[Symmetry], count: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Return random permutations of `count` networks: the tables `(P,)` of each.

    `permute` and `Symmetry.permute_state_dict` take them. Networks of one architecture draw together, architectures in
    the order in which they first occur.

    Args:
        symmetries: one for all networks, or a sequence of `count`.
        count: number of networks.
        generator: the same state gives the same permutations.

    Raises:
        SymmetryError: not one symmetry per network.

    Example:
        >>> import torch
        >>> from sne_fast.symmetry import chain_symmetry, draw
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> [len(tables) for tables in draw(chain_symmetry(net.state_dict()), 2)]
        [8, 8]
    """
    found: list[Tensor] = [torch.empty(0)] * count
    for symmetry, rows in group_by_identity(one_per_network(symmetries, count, "draw")):
        for b, tables in zip(rows, symmetry.draw(generator, len(rows)), strict=True):
            found[b] = tables
    return found


def permute(
    batch: WeightBatch,
    symmetries: Symmetry | Sequence[Symmetry],
    generator: torch.Generator | None = None,
    *,
    permutations: Sequence[Tensor] | None = None,
) -> WeightBatch:
    """Return a batch whose networks compute the same functions, with their hidden units permuted at random.

    One gather of `values`; all other fields stay, `tensor_scale` too, but that `prepared` no longer says that units are
    in canonical order. The result has the same bits as packing the permuted state_dicts. Gradients reach the batch's
    values. Index tables are made on first use of an architecture and chunking, and kept in its `Symmetry`.

    Args:
        batch: B networks, with names and shapes as `pack` gives them, on any device.
        symmetries: one for all networks, or a sequence of B. Tensors that a symmetry does not know stay as they are.
        generator: draws the permutations; the same state gives the same ones.
        permutations: B tables `(P,)` from `draw`, to apply these instead.

    Raises:
        SymmetryError: not one symmetry or permutation per network; tables that are no permutations of the symmetry; a
            batch without names; tensors that are missing or of another shape (names network and tensor).
        TypeError: no `WeightBatch`, `Symmetry` or `torch.Generator` where one is expected.

    Example:
        >>> import torch
        >>> import sne_fast
        >>> from sne_fast.symmetry import permute, trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = sne_fast.pack([net, net]).detach()
        >>> permuted = permute(batch, trace(net, torch.zeros(1, 4)), torch.Generator().manual_seed(0))
        >>> torch.equal(permuted.values, batch.values), permuted.shapes == batch.shapes
        (False, True)
    """
    check_named(batch, "permute")
    count = len(batch)
    if count == 0:
        return batch
    per_network = one_per_network(symmetries, count, "permute")
    if permutations is None:
        return permute_by_tables(batch, per_network, draw(per_network, count, generator))
    if len(permutations) != count:
        raise SymmetryError(f"permute: permutations must be one per network ({count}), got {len(permutations)}")
    tables = [
        for_network(batch, b, "permute", lambda b=b: per_network[b].checked(permutations[b])[0])  # type: ignore[misc]
        for b in range(count)
    ]
    return permute_by_tables(batch, per_network, tables)


def permute_by_tables(batch: WeightBatch, per_network: Sequence[Symmetry], tables: Sequence[Tensor]) -> WeightBatch:
    """Return a batch permuted by tables that are known to be permutations; arguments as for `permute`."""
    drawn = [(rows, torch.stack([tables[b] for b in rows])) for _, rows in group_by_identity(per_network)]
    count = len(batch)
    starts = batch.network_starts
    sources: list[Tensor] = [starts] * count
    for rows, stacked in drawn:
        stacked = stacked.to(batch.device)
        for index, places in group_by_identity([_gather_index(batch, b, per_network[b]) for b in rows]):
            chosen = [rows[i] for i in places]
            own = stacked if len(chosen) == len(rows) else stacked[torch.tensor(places, device=stacked.device)]
            source = index.source(own, starts[chosen].to(batch.device))
            if len(chosen) == count:
                sources = [source.reshape(-1)]
            else:
                for b, row in zip(chosen, source, strict=True):
                    sources[b] = row
    source = sources[0] if len(sources) == 1 else torch.cat(sources)
    given = tuple(step for step in batch.prepared if not step.startswith(CANONICAL))
    values = batch.values.index_select(0, source)
    return batch.with_fields(values=values, prepared=given, statistics=batch.statistics)  # which no permutation changes


def _gather_index(batch: WeightBatch, b: int, symmetry: Symmetry) -> GatherIndex:
    names, shapes, kernels = batch.names[b][1], batch.shapes[b], kernels_of(batch, b)
    return for_network(
        batch, b, "permute", lambda: symmetry.gather_index(names, shapes, kernels, batch.chunking, batch.device)
    )  # fmt: skip


class PermutationAugmentation:
    """Fresh random permutations for every batch of training: `augment(part, rows)`.

    Args:
        symmetries: one for all networks of the training batch, or one per network.
        seed: of the generator; `state_dict` and `load_state_dict` keep its state for an exact resume.

    Example:
        >>> import torch
        >>> import sne_fast
        >>> from sne_fast.symmetry import PermutationAugmentation, trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = sne_fast.pack([net, net]).detach()
        >>> augment = PermutationAugmentation(trace(net, torch.zeros(1, 4)), seed=0)
        >>> len(augment(batch[[1]], [1]))
        1
    """

    def __init__(self, symmetries: Symmetry | Sequence[Symmetry], seed: int = 0) -> None:
        self.symmetries = symmetries
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        part: WeightBatch,
        rows: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> WeightBatch:
        """Return `part`, permuted.

        Args:
            part: networks of the training batch.
            rows: their places in the training batch; needed where there is one symmetry per network.
            generator: draws the permutations in place of its own, as `sne_fast.training.fit` wants for exact resumes.

        Raises:
            SymmetryError: no rows where they are needed, or an error of `permute`.
        """
        generator = generator if generator is not None else self.generator
        if isinstance(self.symmetries, Symmetry):
            return permute(part, self.symmetries, generator)
        if rows is None:
            raise SymmetryError("PermutationAugmentation: rows must say which networks these are, got None")
        chosen = rows.tolist() if isinstance(rows, Tensor) else rows
        return permute(part, [self.symmetries[row] for row in chosen], generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set the state of the generator."""
        self.generator.set_state(state["generator"])
