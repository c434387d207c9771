"""Views by real training: in place of a network, one that was fine-tuned from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.batch import WeightBatch
from .objective import Augment
from .views import replaced


class ChildViews:
    """Views of a network, or of one of its children in its place: `child_views(part, rows, generator)`.

    What fine-tuning does to weights is no noise, and is learnt from networks that were fine-tuned. A child and its
    parent are no negatives of each other where :class:`Contrastive` is given their groups.

    Args:
        views: changes what stands in the batch then, such as :class:`Views`; it is told the places of the children.
        batch: all training networks.
        children: of each of them, the places of those that were made of it, as :func:`children_of` returns them.
        share: of the networks with children that one of them stands for, drawn anew for every network and call.

    Raises:
        ValueError: `children` that are not one list per network or name places outside of the batch, or a share outside
            of [0, 1].

    Example:
        >>> views = ChildViews(Views(permute=0, noise=0, prune=0, round=0, head=0), batch, [[1], []], share=1)
        >>> found = views(batch, range(2), torch.Generator().manual_seed(0))
        >>> torch.equal(found[0].values, batch[1].values)
        True
    """

    def __init__(
        self, views: Augment, batch: WeightBatch, children: Sequence[Sequence[int]], *, share: float = 0.5
    ) -> None:
        if len(children) != len(batch):
            raise ValueError(f"ChildViews: children must be lists for {len(batch)} networks, got {len(children)}")
        if not all(0 <= child < len(batch) for own in children for child in own):
            raise ValueError(f"ChildViews: children must be places of {len(batch)} networks")
        if not 0 <= share <= 1:
            raise ValueError(f"ChildViews: share must lie in [0, 1], got {share!r:.80}")
        self.views, self.batch, self.share = views, batch, share
        self.children = tuple(tuple(own) for own in children)

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator) -> WeightBatch:
        """Return a view of each network, or of a child of it.

        Args:
            part: networks of the training batch.
            rows: their places among the training networks.
            generator: the source of all randomness, on the CPU.
        """
        chosen, drawn = torch.rand(2, len(part), generator=generator, dtype=torch.float64).tolist()
        places = list(rows)
        for k, row in enumerate(rows):
            own = self.children[row]
            if own and chosen[k] < self.share:
                places[k] = own[int(drawn[k] * len(own))]
        changed = [k for k, row in enumerate(rows) if places[k] != row]
        if changed:
            found = self.batch[[places[k] for k in changed]].to(part.device, part.dtype)
            part = replaced(part, changed, found)
        return self.views(part, places, generator)


def children_of(rows: Sequence[Mapping[str, Any]], relations: Sequence[str] = ("fine-tune",)) -> list[list[int]]:
    """Return for each network the places of its children, from the rows of a zoo of families.

    Args:
        rows: with `name`, `parent` and `relation`; a parent that is not among them has no children.
        relations: of the children that count.

    Raises:
        ValueError: two networks of one name, as those of two zoos may be.

    Example:
        >>> first = {"name": "a", "parent": None, "relation": None}
        >>> children_of([first, {"name": "b", "parent": "a", "relation": "fine-tune"}])
        [[1], []]
    """
    place: dict[str, int] = {}
    for k, row in enumerate(rows):
        if place.setdefault(row["name"], k) != k:
            raise ValueError(f"children_of: two networks are called {row['name']!r}; give the rows of one zoo")
    found: list[list[int]] = [[] for _ in rows]
    for k, row in enumerate(rows):
        if row["relation"] in relations and row["parent"] in place:
            found[place[row["parent"]]].append(k)
    return found
