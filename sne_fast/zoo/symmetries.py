"""Permutation symmetries of the networks of a zoo."""

from __future__ import annotations

from typing import Any

from ..symmetry import Symmetry, chain_symmetry, trace, zoo_symmetries
from .architectures import ARCHITECTURES
from .family_architectures import build
from .family_data import find_task
from .table import Zoo


def symmetries_of(zoo: Zoo) -> list[Symmetry]:
    """Find the symmetry of every network of a zoo.

    Each architecture is traced once where all of them are among `architectures.ARCHITECTURES`, and in zoos of
    `make_family_zoo`; otherwise the symmetry is read from the tensor names and shapes of a plain chain of layers.

    Raises:
        SymmetryError: a network of another zoo that is not such a chain.
    """
    if zoo.about.get("source") == "families":
        return _of_families(zoo)
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


def _of_families(zoo: Zoo) -> list[Symmetry]:
    traced: dict[str, Symmetry] = {}
    found = []
    for row in zoo.rows:
        architecture = row["architecture"]
        if architecture not in traced:
            example = find_task(row["dataset"]).test[0][:2]
            traced[architecture] = trace(build(architecture).eval(), example, name=row["family"])
        found.append(traced[architecture])
    return found
