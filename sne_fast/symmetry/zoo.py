"""Symmetries of the networks of a zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from .boxes import SymmetryError
from .core import Symmetry
from .tracing import trace


class NetworkTable(Protocol):
    """The part of `sne_fast.zoo.Zoo` that `zoo_symmetries` needs."""

    def column(self, name: str) -> Iterable[Any]:
        """Return one value per network; raise KeyError where there is no such column."""

    @property
    def constructors(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Constructors of a fresh module, by the names that the column `architecture` may hold."""


def zoo_symmetries(
    zoo: NetworkTable,
    architectures: Mapping[str, Callable[[], nn.Module]] | None = None,
    example_inputs: Any = None,
) -> list[Symmetry]:
    """Return the symmetry of every network of a zoo; each architecture is traced once.

    Args:
        zoo: an `sne_fast.zoo.Zoo` whose column `architecture` names the architecture of each network.
        architectures: constructors of modules by name; `zoo.constructors` by default.
        example_inputs: as for `trace`; two random images of 8 x 8 by default.

    Returns:
        One `Symmetry` per network, in the order of the table, for `permute` and `PermutationAugmentation`.

    Raises:
        KeyError: the zoo has no column `architecture`.
        SymmetryError: no constructor for an architecture.

    Example:
        >>> from sne_fast.symmetry import zoo_symmetries
        >>> from sne_fast.zoo import Zoo
        >>> zoo = Zoo({"name": ["a", "b"], "architecture": ["mlp-10", "mlp-10"]}, source=None)
        >>> one, other = zoo_symmetries(zoo)
        >>> one is other, one.name
        (True, 'mlp-10')
    """
    constructors = zoo.constructors if architectures is None else architectures
    if example_inputs is None:
        example_inputs = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [str(name) for name in zoo.column("architecture")]
    found: dict[str, Symmetry] = {}
    for name in names:
        if name not in constructors:
            raise SymmetryError(f"zoo_symmetries: no constructor of {name!r}; known are {', '.join(constructors)}")
        if name not in found:
            found[name] = trace(constructors[name](), example_inputs, name=name)
    return [found[name] for name in names]
