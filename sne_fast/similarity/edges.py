"""Steps from one network to another that was made of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edge:
    """A step from a parent to a child.

    Attributes:
        parent: name of the network that the other was made of.
        child: name of the other.
        relation: "copy" (the same compared weights), "prune", "round", "merge" (one of two parents), "head" (tensors of
            other shapes, and the rest as it was), or "train".
        distance: relative distance of their weights.
        evidence: from 0, the direction is a guess, to 1.
    """

    parent: str
    child: str
    relation: str
    distance: float
    evidence: float
