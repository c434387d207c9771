"""`Symmetry`: which units of a network may be permuted, drawing permutations, and applying them to a state_dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.layers import strip_wrappers
from ..data.tied_names import identity_of
from .boxes import AxisInfo, Box, SymmetryError, permuted_placements
from .gather import STORED, GatherIndex, build_gather_index
from .spec import labels_from_groups
from .structure import assemble
from .terms import Label

Cached = TypeVar("Cached")


@dataclass(frozen=True)
class Group:
    """Units that are permuted among themselves.

    Attributes:
        name: the first place where they stand, such as `fc1.weight[0]`, dimension 0 of that tensor.
        units: number of units.
        tables: number of independent permutations, more than one where each head has its own.
        uses: all places, as `(tensor, dimension, start, step)`: unit i stands at `start + i * step`.
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

    A symmetry holds names and shapes, no weights: one serves all networks of an architecture. It can be pickled.

    Attributes:
        name: the architecture's name in messages.
        shapes: shape of every known tensor, by its first name.
        alias: the first name of every known tensor, by every name; tied tensors have several.
        axes: all axes of units, permuted or frozen.
        boxes: where axes stand in the tensors of `shapes`.
        unsupported: why axes were frozen that perhaps need not have been; empty where nothing was.

    Example:
        >>> import copy, torch
        >>> from sne_fast.symmetry import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> symmetry = trace(net, x)
        >>> other = copy.deepcopy(net)
        >>> permuted = symmetry.permute_state_dict(net.state_dict(), torch.Generator().manual_seed(0))
        >>> other.load_state_dict(permuted)
        <All keys matched successfully>
        >>> torch.allclose(other(x), net(x), atol=1e-5)
        True
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    alias: dict[str, str]
    axes: tuple[AxisInfo, ...]
    boxes: dict[str, tuple[Box, ...]]
    unsupported: tuple[str, ...] = ()
    _cache: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @classmethod
    def from_spec(
        cls,
        groups: Mapping[str, Sequence[Sequence[Any]]],
        state_dict: Mapping[str, Tensor],
        *,
        units: Mapping[str, int] | None = None,
        name: str = "spec",
    ) -> Symmetry:
        """Return a symmetry declared explicitly: for each group of units, the dimensions along which they stand.

        An entry is `(tensor, dim)`, `(tensor, dim, block)` or `(tensor, dim, block, (start, stop))`. `block` is the
        number of neighbouring positions that belong to one unit (1 if left out): the columns that a channel owns in
        the linear layer after a flatten, or the width of a head. With a range only positions start..stop-1 of the
        dimension are meant, such as the queries' rows of a fused projection. Groups may share a dimension if their
        blocks nest: heads with block d, and with block 1 the d units inside each head, which are then permuted alike
        in every head. Where blocks do not fill a range, they repeat over it, each repetition permuted alike.

        Nothing is inferred, and only shapes are checked: use `verify`.

        Args:
            groups: entries by group name.
            state_dict: for names and shapes.
            units: size of groups for which it does not follow: by default a group has as many units as its first
                entry has blocks.
            name: the network's name in messages.

        Raises:
            SymmetryError: an unknown tensor or dimension, blocks that do not fit, ranges that overlap.

        Example:
            >>> import torch
            >>> from sne_fast.symmetry import from_spec
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 2))
            >>> entries = [("0.weight", 0), ("0.bias", 0), ("2.weight", 1, 9)]  # a channel owns 9 columns
            >>> from_spec({"channels": entries}, net.state_dict())
            Symmetry('spec', 1 groups, 10^1.4 permutations)
        """
        return cls.from_labels(name, labels_from_groups(groups, state_dict, units or {}))

    @classmethod
    def from_labels(
        cls,
        name: str,
        labels: Mapping[str, Label],
        alias: Mapping[str, str] | None = None,
        records: Sequence[Label] | None = None,
        unsupported: Sequence[str] = (),
    ) -> Symmetry:
        """Return the symmetry of labelled tensors.

        Args:
            name: the network's name in messages.
            labels: of every tensor that may be permuted, by its first name.
            alias: the first name of every tensor, by every name; tensors have one name each if left out.
            records: labels of all tensors that a trace saw, those of `labels` among them. Without these no permutation
                depends on a position in another axis.
            unsupported: see the attribute.
        """
        structure = assemble(labels, list(labels.values()) if records is None else records, independent=records is None)
        return cls(
            name,
            structure.shapes,
            dict(alias) if alias is not None else {key: key for key in labels},
            structure.axes,
            structure.boxes,
            tuple(unsupported),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def __repr__(self) -> str:
        return f"Symmetry({self.name!r}, {len(self.groups)} groups, 10^{self.log10_order:.1f} permutations)"

    # Description

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of units that are permuted, in the order in which they first occur."""
        uses = self._uses()
        return tuple(
            Group(_place(self.shapes, *uses[a][0], info.size), info.size, info.tables, tuple(uses[a]))
            for a, info in enumerate(self.axes)
            if info.frozen is None
        )

    @property
    def frozen(self) -> dict[str, str]:
        """Reasons why dimensions, or parts of them, are left in place: by place, such as `fc1.weight[1]`."""
        uses = self._uses()
        return {
            _place(self.shapes, *use, info.size): info.frozen
            for a, info in enumerate(self.axes)
            if info.frozen is not None
            for use in uses[a]
        }

    @property
    def log10_order(self) -> float:
        """Decimal logarithm of the number of permutations, the identity included."""
        return sum(group.log10_order for group in self.groups)

    def _uses(self) -> list[list[tuple[str, int, int, int]]]:
        uses: list[list[tuple[str, int, int, int]]] = [[] for _ in self.axes]
        for key, boxes in self.boxes.items():
            for box in boxes:
                for placement in box.placements:
                    use = (key, placement.dim, box.start[placement.dim], placement.step)
                    if use not in uses[placement.axis]:
                        uses[placement.axis].append(use)
        return uses

    def explain(self) -> str:
        """Return as text what is permuted, and what is frozen and why."""
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
        return sum(info.tables * info.size for info in self.axes if info.frozen is None)

    def draw(self, generator: torch.Generator | None = None, count: int = 1) -> Tensor:
        """Return `count` random permutations, each uniform and independent: `(count, P)` int64 tables.

        The same generator state gives the same permutations. They are on the generator's device, else on the CPU.
        """
        device = torch.device("cpu") if generator is None else generator.device
        starts, segments = self._segments(device)
        keys = torch.rand(count, len(starts), generator=generator, dtype=torch.float64, device=device)
        return (keys + segments).argsort(1) - starts

    def identity(self, count: int = 1) -> Tensor:
        """Return the tables `(count, P)` of the permutation that leaves everything in place."""
        starts, _ = self._segments(torch.device("cpu"))
        return (torch.arange(len(starts)) - starts).expand(count, -1)

    def _segments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return for every place in a row where its table starts, and the number of its table."""

        def make() -> tuple[Tensor, Tensor]:
            lengths = [info.size for info in self.axes if info.frozen is None for _ in range(info.tables)]
            sizes = torch.tensor(lengths, dtype=torch.int64)
            segments = torch.arange(len(lengths)).repeat_interleave(sizes)
            starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            return starts.to(device), segments.to(device, torch.float64)

        return self.cached(("segments", device), make)

    def permute_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        tables: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the state_dict with its hidden units permuted; keys in their order, other tensors as they are.

        Tensors that are tied stay tied.

        Args:
            state_dict: names and tensors of the network; names may start with `module.` or `_orig_mod.`.
            generator: draws the permutation.
            tables: `(P,)` or `(1, P)`, a permutation from `draw` to apply instead.

        Raises:
            SymmetryError: a tensor is missing or has another shape.
        """
        keys = list(state_dict)
        names = dict(zip(strip_wrappers(keys), keys, strict=True))
        chosen = [n for n in names if n in self.alias and isinstance(state_dict[names[n]], Tensor)]
        shapes = tuple(tuple(state_dict[names[n]].shape) for n in chosen)
        index = self.gather_index(tuple(chosen), shapes, (False,) * len(shapes), STORED, torch.device("cpu"))
        tables = self.draw(generator) if tables is None else tables.reshape(1, -1)
        source = index.source(tables.cpu(), torch.zeros(1, dtype=torch.int64))[0]
        out = dict(state_dict)
        permuted: dict[object, list[tuple[Tensor, Tensor]]] = {}
        start = 0
        for n, shape in zip(chosen, shapes, strict=True):
            stop = start + math.prod(shape)
            if self.permutes(n):
                tensor = state_dict[names[n]]
                own = (source[start:stop] - start).to(tensor.device)
                same = permuted.setdefault(identity_of(tensor), [])
                found = next((result for index, result in same if torch.equal(index, own)), None)
                if found is None:
                    found = tensor.reshape(-1)[own].reshape(shape)
                    same.append((own, found))
                out[names[n]] = found
            start = stop
        return out

    # Index tables

    def boxes_of(self, name: str) -> tuple[Box, ...]:
        """Return the boxes of a tensor by any of its names; none for a tensor that is not known."""
        return self.boxes.get(self.alias.get(name, ""), ())

    def permutes(self, name: str) -> bool:
        """Return whether any units in a tensor are permuted."""
        return any(permuted_placements(box, self.axes) for box in self.boxes_of(name))

    def gather_index(
        self,
        names: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        kernels: tuple[bool, ...],
        chunking: str,
        device: torch.device,
    ) -> GatherIndex:
        """Return the index tables for tensors packed in this order, and keep them for the next call.

        `kernels` says which of them were cut with kernel dimensions.

        Raises:
            SymmetryError: a tensor that must be permuted is missing, or one has another shape.
        """

        def make() -> GatherIndex:
            self.check_shapes(names, shapes)
            packed = zip(names, shapes, kernels, strict=True)
            tensors = [(shape, kernel, self.boxes_of(n)) for n, shape, kernel in packed]
            return build_gather_index(self.axes, tensors, chunking).to(device)

        return self.cached(("gather index", names, shapes, kernels, chunking, device), make)

    def cached(self, key: Hashable, make: Callable[[], Cached]) -> Cached:
        """Return what `make` gave when it was first called for this key; pickling drops it."""
        if key not in self._cache:
            self._cache[key] = make()
        found: Cached = self._cache[key]
        return found

    def check_shapes(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """Check that tensors of these names and shapes can be permuted.

        Raises:
            SymmetryError: a tensor that must be permuted is missing, or one has another shape.
        """
        for n, shape in zip(names, shapes, strict=True):
            first = self.alias.get(n)
            if first is not None and self.shapes[first] != tuple(shape):
                raise SymmetryError(
                    f"symmetry {self.name!r}: {n!r} must have shape {self.shapes[first]}, got {tuple(shape)}; "
                    f"these weights are of another architecture"
                )
        present = {self.alias[n] for n in names if n in self.alias}
        for key in self.boxes:
            if key not in present and self.permutes(key):
                raise SymmetryError(
                    f"symmetry {self.name!r}: {key!r} must be among the weights, as its units are permuted; "
                    f"got {', '.join(map(repr, names[:4]))}{', ...' if len(names) > 4 else ''}"
                )


def _place(shapes: Mapping[str, tuple[int, ...]], name: str, dim: int, start: int, step: int, units: int) -> str:
    place = f"{name}[{dim}]"
    if units == shapes[name][dim]:
        return place
    return f"{place} from {start}" + (f" in steps of {step}" if step > 1 else "")
