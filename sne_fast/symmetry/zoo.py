"""Symmetries of the networks of a zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .core import Symmetry, SymmetryError
from .tracing import trace

if TYPE_CHECKING:
    from ..zoo import Zoo


def zoo_symmetries(
    zoo: Zoo, architectures: Mapping[str, Callable[[], nn.Module]] | None = None, example_inputs: Any = None
) -> list[Symmetry]:
    """The symmetry of every network of a zoo whose table has a column `architecture`, each architecture traced once.

    Args:
        zoo: its column `architecture` names the architecture of each network.
        architectures: constructors by name; those of `sne_fast.zoo.architectures` by default.
        example_inputs: as for `trace`; images of 8 x 8, which those take, by default.

    Returns:
        One `Symmetry` per network, in the order of the table, for `permute` and `PermutationAugmentation`.

    Raises:
        KeyError: no such column.
        SymmetryError: an architecture that has no constructor.

    Example:
        >>> augment = PermutationAugmentation(zoo_symmetries(Zoo.open("demo/zoo")))
    """
    if architectures is None:
        from ..zoo.architectures import ARCHITECTURES

        architectures = ARCHITECTURES
    if example_inputs is None:
        example_inputs = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [str(name) for name in zoo.column("architecture")]
    found: dict[str, Symmetry] = {}
    for name in names:
        if name not in architectures:
            raise SymmetryError(f"zoo_symmetries: no constructor of {name!r}; known are {', '.join(architectures)}")
        if name not in found:
            found[name] = trace(architectures[name](), example_inputs, name=name)
    return [found[name] for name in names]
