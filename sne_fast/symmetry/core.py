"""`Symmetry`: which units of a network may be permuted, drawing permutations, and applying them to a state_dict."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.layers import strip_wrappers
from .plan import STORED, Plan, build_plan


class SymmetryError(ValueError):
    """A symmetry that does not hold, cannot be found, or does not fit the weights it is applied to."""


class AtomInfo(NamedTuple):
    """An axis of `size` units; `within` are the axes on whose position its permutation depends."""

    size: int
    frozen: str | None
    within: tuple[int, ...]
    tables: int
    offset: int  # of its first permutation in a row of tables; -1 if frozen


class Axis(NamedTuple):
    """Axis `atom` along dimension `dim` of a tensor, its units `step` positions apart."""

    atom: int
    dim: int
    step: int


class Block(NamedTuple):
    """A box in a tensor: it starts at `start` and has one coordinate per axis."""

    start: tuple[int, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Group:
    """Units that are permuted among themselves.

    `name` is the first place they stand in, such as `fc1.weight[0]`, dimension 0 of that tensor. `units`: how many.
    `tables`: how many independent permutations there are, more than one where each head has its own. `uses`: all
    places, as `(tensor, dimension, start, step)`: unit i stands at `start + i * step`.
    """

    name: str
    units: int
    tables: int
    uses: tuple[tuple[str, int, int, int], ...]

    @property
    def log10_order(self) -> float:
        """Decimal logarithm of the number of permutations."""
        return self.tables * math.lgamma(self.units + 1) / math.log(10)


@dataclass(frozen=True, eq=False, repr=False)
class Symmetry:
    """The function-preserving permutations of one architecture, made by `trace`, `from_spec` or `chain_symmetry`.

    It knows names and shapes, not weights: one serves all networks of an architecture. Picklable.

    Attributes:
        name: what messages call it.
        shapes: of every tensor that it knows, by name.
        unsupported: why axes were frozen that perhaps need not have been; empty where nothing was.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> symmetry = sne_fast.symmetry.trace(net, torch.zeros(1, 4))
        >>> permuted = symmetry.permute_state_dict(net.state_dict(), torch.Generator().manual_seed(0))
        >>> other = copy.deepcopy(net); other.load_state_dict(permuted)     # the same function
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    alias: dict[str, str]
    atoms: tuple[AtomInfo, ...]
    blocks: dict[str, tuple[Block, ...]]
    unsupported: tuple[str, ...] = ()
    _plans: OrderedDict = field(default_factory=OrderedDict, init=False)

    @classmethod
    def from_spec(
        cls,
        groups: Mapping[str, Sequence[Sequence[Any]]],
        state_dict: Mapping[str, Tensor],
        *,
        units: Mapping[str, int] | None = None,
        name: str = "spec",
    ) -> Symmetry:
        """A symmetry said by hand; see `sne_fast.symmetry.from_spec`."""
        from .spec import from_spec

        return from_spec(groups, state_dict, units=units, name=name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": OrderedDict()}

    def __repr__(self) -> str:
        return f"Symmetry({self.name!r}, {len(self.groups)} groups, 10^{self.log10_order:.1f} permutations)"

    # What it is

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of units that are permuted, in the order in which they first occur."""
        uses = self._uses()
        return tuple(
            Group(_place(self.shapes, *uses[a][0], info.size), info.size, info.tables, tuple(uses[a]))
            for a, info in enumerate(self.atoms)
            if info.frozen is None
        )

    @property
    def frozen(self) -> dict[str, str]:
        """Why dimensions, or parts of them, are left in place: reasons by place, such as `fc1.weight[1]`."""
        uses = self._uses()
        return {
            _place(self.shapes, *use, info.size): info.frozen
            for a, info in enumerate(self.atoms)
            if info.frozen is not None
            for use in uses[a]
        }

    @property
    def log10_order(self) -> float:
        """Decimal logarithm of the number of permutations, the identity included."""
        return sum(group.log10_order for group in self.groups)

    def _uses(self) -> list[list[tuple[str, int, int, int]]]:
        uses: list[list[tuple[str, int, int, int]]] = [[] for _ in self.atoms]
        for key, blocks in self.blocks.items():
            for block in blocks:
                for axis in block.axes:
                    use = (key, axis.dim, block.start[axis.dim], axis.step)
                    if use not in uses[axis.atom]:
                        uses[axis.atom].append(use)
        return uses

    def explain(self) -> str:
        """What is permuted, what is frozen and why, as text."""
        lines = [f"{self.name}: {len(self.groups)} groups, 10^{self.log10_order:.1f} permutations"]
        for group in self.groups:
            times = f", {group.tables} permutations" if group.tables > 1 else ""
            lines.append(f"  permuted  {group.units} units{times}: {group.name}")
            others = [_place(self.shapes, *use, group.units) for use in group.uses[1:]]
            if others:
                lines.append(f"            with {', '.join(others)}")
        reasons: dict[str, list[str]] = {}
        for place, why in self.frozen.items():
            reasons.setdefault(why, []).append(place)
        for why, places in reasons.items():
            lines.append(f"  frozen    {why}: {', '.join(places)}")
        return "\n".join(lines)

    # Permutations

    @property
    def table_size(self) -> int:
        """Length P of a row of permutation tables."""
        return sum(info.tables * info.size for info in self.atoms if info.frozen is None)

    def draw(self, generator: torch.Generator | None = None, count: int = 1) -> Tensor:
        """`count` random permutations, each uniform and independent: `(count, P)` int64 tables.

        The same generator state gives the same permutations. On the generator's device, else the CPU.
        """
        device = torch.device("cpu") if generator is None else generator.device
        starts, segments = self._segments(device)
        keys = torch.rand(count, len(starts), generator=generator, dtype=torch.float64, device=device)
        return (keys + segments).argsort(1) - starts

    def identity(self, count: int = 1) -> Tensor:
        """The tables `(count, P)` of the permutation that leaves everything in place."""
        starts, _ = self._segments(torch.device("cpu"))
        return (torch.arange(len(starts)) - starts).expand(count, -1)

    def _segments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        key = ("segments", device)
        if key not in self._plans:
            lengths = [info.size for info in self.atoms if info.frozen is None for _ in range(info.tables)]
            sizes = torch.tensor(lengths, dtype=torch.int64)
            segments = torch.arange(len(lengths)).repeat_interleave(sizes)
            starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            self._plans[key] = (starts.to(device), segments.to(device, torch.float64))
        return self._plans[key]

    def permute_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        tables: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The state_dict with its hidden units permuted; keys in their order, tensors of no concern as they are.

        Args:
            state_dict: names and tensors of the network; `module.` and `_orig_mod.` before names are seen through.
            generator: draws the permutation.
            tables: `(P,)` or `(1, P)`, a permutation from `draw` to apply instead.

        Raises:
            SymmetryError: a tensor is missing or has another shape.
        """
        keys = list(state_dict)
        names = dict(zip(strip_wrappers(keys), keys, strict=True))
        chosen = [n for n in names if n in self.alias and isinstance(state_dict[names[n]], Tensor)]
        shapes = tuple(tuple(state_dict[names[n]].shape) for n in chosen)
        plan = self.plan(tuple(chosen), shapes, STORED, torch.device("cpu"))
        tables = self.draw(generator) if tables is None else tables.reshape(1, -1)
        rows = plan.source(tables.cpu(), torch.zeros(1, dtype=torch.int64))[0]
        out = dict(state_dict)
        start = 0
        for n, shape in zip(chosen, shapes, strict=True):
            stop = start + math.prod(shape)
            if any(axis_moves(self, block) for block in self.blocks[self.alias[n]]):
                tensor = state_dict[names[n]]
                index = (rows[start:stop] - start).to(tensor.device)
                out[names[n]] = tensor.reshape(-1)[index].reshape(shape)
            start = stop
        return out

    def plan(self, names: tuple[str, ...], shapes: tuple, chunking: str, device: torch.device) -> Plan:
        """Index tables for tensors packed in this order, kept for the next call.

        Raises:
            SymmetryError: a tensor that must be permuted is missing, or one has another shape.
        """
        key = (names, shapes, chunking, device)
        found = self._plans.get(key)
        if found is None:
            self._check(names, shapes)
            found = self._plans[key] = build_plan(self, names, shapes, chunking).to(device)
        return found

    def _check(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        for n, shape in zip(names, shapes, strict=True):
            first = self.alias.get(n)
            if first is not None and self.shapes[first] != tuple(shape):
                raise SymmetryError(
                    f"symmetry {self.name!r}: {n!r} must have shape {self.shapes[first]}, got {tuple(shape)}; "
                    f"these weights are of another architecture"
                )
        present = {self.alias[n] for n in names if n in self.alias}
        for key, blocks in self.blocks.items():
            if key not in present and any(axis_moves(self, block) for block in blocks):
                raise SymmetryError(
                    f"symmetry {self.name!r}: {key!r} must be among the weights, as its units are permuted; "
                    f"got {', '.join(map(repr, names[:4]))}{', ...' if len(names) > 4 else ''}"
                )


def axis_moves(symmetry: Symmetry, block: Block) -> bool:
    """Whether anything in a block is ever permuted."""
    return any(symmetry.atoms[axis.atom].frozen is None for axis in block.axes)


def _place(shapes: Mapping[str, tuple[int, ...]], name: str, dim: int, start: int, step: int, units: int) -> str:
    place = f"{name}[{dim}]"
    if units == shapes[name][dim]:
        return place
    return f"{place} from {start}" + (f" in steps of {step}" if step > 1 else "")
