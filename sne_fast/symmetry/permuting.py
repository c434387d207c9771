"""Permuting packed batches: `permute`, `PermutationAugmentation`, and the logit-invariance loss (SPEC 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.pointers import network_starts
from .core import Symmetry, SymmetryError
from .plan import Plan


def _per_network(symmetries: Symmetry | Sequence[Symmetry], count: int, where: str) -> Sequence[Symmetry]:
    if isinstance(symmetries, Symmetry):
        return [symmetries] * count
    if len(symmetries) != count:
        raise SymmetryError(
            f"{where}: symmetries must be one Symmetry, or one per network ({count}), got {len(symmetries)}"
        )
    return symmetries


def draw(
    symmetries: Symmetry | Sequence[Symmetry], count: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Random permutations of `count` networks: the tables `(P,)` of each, for `permute` and `permute_state_dict`.

    Networks of one architecture draw together, architectures in the order in which they first occur.
    """
    found: list[Tensor] = [torch.empty(0)] * count
    for symmetry, rows in _alike(_per_network(symmetries, count, "draw")):
        for b, tables in zip(rows, symmetry.draw(generator, len(rows)), strict=True):
            found[b] = tables
    return found


def _alike(keys: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    rows: dict[int, tuple[Any, list[int]]] = {}
    for b, key in enumerate(keys):
        rows.setdefault(id(key), (key, []))[1].append(b)
    return list(rows.values())


def permute(
    batch: WeightBatch,
    symmetries: Symmetry | Sequence[Symmetry],
    generator: torch.Generator | None = None,
    *,
    permutations: Sequence[Tensor] | None = None,
) -> WeightBatch:
    """A batch whose networks compute the same functions, their hidden units permuted at random.

    One gather of `values`; nothing else changes, `tensor_scale` neither. What it gives is, to the bit, what packing
    the permuted state_dicts would. Gradients reach the batch's values. Index tables are made on first use of an
    architecture and chunking, and kept in its `Symmetry`.

    Args:
        batch: B networks, with names and shapes as `pack` gives them, on any device.
        symmetries: one for all networks, or a sequence of B. Tensors that a symmetry does not know stay as they are.
        generator: draws the permutations; the same state gives the same ones.
        permutations: B tables `(P,)` from `draw`, to apply these instead.

    Raises:
        SymmetryError: not one symmetry or permutation per network; a batch without names; tensors that are missing
            or of another shape (names network and tensor).

    Example:
        >>> symmetry = sne_fast.symmetry.trace(net, x)
        >>> batch = sne_fast.pack([net, other_net_of_this_architecture]).detach()
        >>> permuted = sne_fast.symmetry.permute(batch, symmetry, torch.Generator().manual_seed(0))
    """
    count = len(batch)
    if count == 0:
        return batch
    per_network = _per_network(symmetries, count, "permute")
    if permutations is not None and len(permutations) != count:
        raise SymmetryError(f"permute: permutations must be one per network ({count}), got {len(permutations)}")
    if not batch.names or not batch.shapes:
        raise SymmetryError("permute: the batch must have names and shapes, as those that pack makes have")
    if permutations is None:
        drawn = [(rows, symmetry.draw(generator, len(rows))) for symmetry, rows in _alike(per_network)]
    else:
        drawn = [(rows, torch.stack([permutations[b] for b in rows])) for _, rows in _alike(per_network)]
    firsts = network_starts(batch)
    sources: list[Tensor] = [firsts] * count
    for rows, tables in drawn:
        tables = tables.to(batch.device)
        for plan, places in _alike([_plan(batch, b, per_network[b]) for b in rows]):
            chosen = [rows[i] for i in places]
            own = tables if len(chosen) == len(rows) else tables[torch.tensor(places, device=tables.device)]
            source = plan.source(own, firsts[chosen].to(batch.device))
            if len(chosen) == count:
                sources = [source.reshape(-1)]
            else:
                for b, row in zip(chosen, source, strict=True):
                    sources[b] = row
    source = sources[0] if len(sources) == 1 else torch.cat(sources)
    return batch._with(values=batch.values.index_select(0, source))


def _plan(batch: WeightBatch, b: int, symmetry: Symmetry) -> Plan:
    try:
        return symmetry.plan(batch.names[b][1], batch.shapes[b], batch.chunking, batch.device)
    except SymmetryError as error:
        raise SymmetryError(f"permute: {batch.network_name(b)}: {error}") from None


class PermutationAugmentation:
    """Fresh random permutations for every batch of training: `augment(part, rows)`.

    Args:
        symmetries: one for all networks of the training batch, or one per network.
        seed: of the generator; `state_dict` and `load_state_dict` keep its state for an exact resume.

    Example:
        >>> augment = sne_fast.symmetry.PermutationAugmentation(symmetries, seed=0)
        >>> part = augment(batch[rows], rows)
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
        """`part`, permuted.

        Args:
            part: networks of the training batch.
            rows: which they are, as positions in it; needed where there is a symmetry per network.
            generator: draws the permutations in place of its own, as `sne_fast.training.fit` wants for exact resumes.

        Raises:
            SymmetryError: no rows where they are needed, or what `permute` raises.
        """
        generator = generator if generator is not None else self.generator
        if isinstance(self.symmetries, Symmetry):
            return permute(part, self.symmetries, generator)
        if rows is None:
            raise SymmetryError("PermutationAugmentation: rows must say which networks these are, got None")
        chosen = rows.tolist() if isinstance(rows, Tensor) else rows
        return permute(part, [self.symmetries[row] for row in chosen], generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])


def logit_invariance(
    predictor: Callable[[WeightBatch], Tensor],
    batch: WeightBatch,
    permuted: WeightBatch,
    *,
    outputs: Tensor | None = None,
) -> Tensor:
    """How much a predictor tells a network from its permuted copy: `mean_b ||f(g x_b) - f(x_b)||^2 / 2`.

    The regulariser of Moskalev et al., "On genuine invariance learning without weight-tying" (2023), which SNE adds
    to its loss, times a weight (section 3.6 of the paper). Gradients flow through both terms.

    Args:
        predictor: an `sne_fast.Predictor`, of which the head's outputs are taken (of normalised targets, before any
            sigmoid), or any function of a batch that gives `(B, ...)`.
        batch, permuted: the networks x and g x, from `permute`.
        outputs: `f(x)`, if it has been computed already.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: batches of different length.
    """
    if len(batch) != len(permuted):
        raise ValueError(
            f"logit_invariance: permuted must hold the {len(batch)} networks of batch, got {len(permuted)}"
        )
    f: Callable[[WeightBatch], Tensor] = predictor
    encode, head = getattr(predictor, "encode", None), getattr(predictor, "head", None)
    if encode is not None and head is not None:
        f = lambda networks: head(encode(networks))  # noqa: E731
    difference = f(permuted) - (f(batch) if outputs is None else outputs)
    return difference.square().sum() / (2 * max(1, len(batch)))
