"""Permutation symmetries of the networks of a zoo."""

from __future__ import annotations

from typing import Any

from ..symmetry import Symmetry, chain_symmetry, zoo_symmetries
from .architectures import ARCHITECTURES
from .table import Zoo


def symmetries_of(zoo: Zoo) -> list[Symmetry]:
    """Find the symmetry of every network of a zoo.

    Each architecture is traced once where all of them are among `architectures.ARCHITECTURES`; otherwise the symmetry
    is read from the tensor names and shapes of a plain chain of layers.

    Raises:
        SymmetryError: a network of another zoo that is not such a chain.
    """
    known = [str(a) for a in zoo.column("architecture")] if "architecture" in zoo.columns else []
    if known and all(name in ARCHITECTURES for name in known):
        return zoo_symmetries(zoo)
    chains: dict[Any, Symmetry] = {}
    found = []
    for i in range(len(zoo)):
        state = zoo.state_dict(i)
        shapes = tuple((name, tuple(t.shape)) for name, t in state.items())
        if shapes not in chains:
            chains[shapes] = chain_symmetry(state, name=str(zoo.rows[i]["name"]))
        found.append(chains[shapes])
    return found
