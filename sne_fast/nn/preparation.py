"""`Preparation`: what a predictor does to networks before it encodes them, in training and on files alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from ..data.batch import WeightBatch
from ..data.choices import NonFinite
from ..data.tensor_types import CONVOLUTION, KINDS, LINEAR
from ..symmetry.boxes import SymmetryError
from ..symmetry.canonical import canonicalise
from ..symmetry.chain import chain_symmetry
from ..symmetry.core import Symmetry
from ..symmetry.per_network import check_named, one_per_network
from ..symmetry.permuting import CANONICAL
from ..symmetry.stored import from_json, same_permutations, to_json
from .choices import Units
from .config_checks import choice, flag, shortened, shown

RELATIVE = "relative places"
CANONICAL_ODD = f"{CANONICAL} and signs"
_REMEMBERED = 4096

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Preparation:
    """What is done to networks between packing and the encoder; part of a predictor, and saved with it.

    The order is: `pack` as the encoder's configuration says and with `nonfinite` and `kinds`; then `relative`, then
    `units`, which together are `apply`; then the predictor's input scale. Each step happens once: a batch says in
    `WeightBatch.prepared` which were done to it.

    Args:
        units: "given" leaves hidden units in the order they have; "canonical" sorts them by
            :func:`sne_fast.symmetry.canonicalise`.
        odd: of "canonical": turn signs too, for networks with odd activations.
        jitter: of "canonical", in training only: noise on the keys, drawn anew for every batch by `augment`, which
            `fit` uses unless it is given another augmentation.
        relative: replace types and levels by :func:`relative_places`.
        nonfinite: of `pack`: what NaN and infinities do.
        kinds: of `pack`: "names" types modules by names and shapes, as their files are; None by what they are.
        symmetries: of "canonical": those of architectures whose names and shapes do not tell them. A network takes the
            first that knows all its tensors; one that none of them knows must be a plain chain of layers, whose
            symmetry is read off by :func:`sne_fast.symmetry.chain_symmetry`. `for_networks` finds which are needed.

    Raises:
        ValueError: a value that is not among those, or `odd`, `jitter` or `symmetries` without "canonical".

    Example:
        >>> from sne_fast.nn import Preparation
        >>> predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32), preparation=Preparation(units="canonical"))
        >>> predictor.prepare(predictor.pack([torch.nn.Linear(4, 3)])).prepared
        ('canonical units',)
    """

    units: Units = "given"
    odd: bool = False
    jitter: float = 0.0
    relative: bool = False
    nonfinite: NonFinite = "raise"
    kinds: Literal["names"] | None = None
    symmetries: tuple[Symmetry, ...] = ()
    _found: dict[tuple[tuple[str, ...], Shapes], Symmetry] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        choice("Preparation", "units", self.units, get_args(Units))
        flag("Preparation", "odd", self.odd)
        flag("Preparation", "relative", self.relative)
        choice("Preparation", "nonfinite", self.nonfinite, get_args(NonFinite))
        choice("Preparation", "kinds", self.kinds, (None, "names"))
        number = isinstance(self.jitter, (int, float)) and not isinstance(self.jitter, bool)
        if not number or not 0 <= self.jitter < float("inf"):
            raise ValueError(f"Preparation: jitter must be a number of at least 0, got {shown(self.jitter)}")
        listed = not isinstance(self.symmetries, (str, bytes)) and isinstance(self.symmetries, Sequence)
        if not listed or not all(isinstance(symmetry, Symmetry) for symmetry in self.symmetries):
            raise ValueError(f"Preparation: symmetries must be a sequence of Symmetry, got {shown(self.symmetries)}")
        object.__setattr__(self, "jitter", float(self.jitter))
        object.__setattr__(self, "symmetries", tuple(self.symmetries))
        if self.units == "given":
            for name in ("odd", "jitter", "symmetries"):
                if getattr(self, name):
                    raise ValueError(f"Preparation: {name} needs units='canonical', got units='given'")

    @classmethod
    def for_networks(cls, batch: WeightBatch, symmetries: Symmetry | Sequence[Symmetry], **options: Any) -> Preparation:
        """Return a preparation with those of the networks' symmetries that their names and shapes do not tell.

        Args:
            batch: B networks, with names and shapes as `pack` gives them.
            symmetries: one for all networks, or a sequence of B, as `sne_fast.symmetry.zoo_symmetries` gives them.
            options: the other arguments of `Preparation`; "canonical" is the default of `units` here.

        Raises:
            SymmetryError: not one symmetry per network, or two networks of the same names and shapes whose symmetries
                differ, which no file can tell apart.
        """
        options = {"units": "canonical", **options}
        if options["units"] != "canonical" or not len(batch):
            return cls(**options)
        check_named(batch, "Preparation")
        needed: dict[tuple[tuple[str, ...], Shapes], tuple[int, Symmetry]] = {}
        seen: dict[tuple[tuple[str, ...], Shapes], tuple[int, Symmetry]] = {}
        for b, symmetry in enumerate(one_per_network(symmetries, len(batch), "Preparation")):
            key = batch.names[b][1], batch.shapes[b]
            first, known = seen.setdefault(key, (b, symmetry))
            if known is not symmetry and not same_permutations(known, symmetry):
                raise SymmetryError(
                    f"Preparation: {batch.network_name(first)} and {batch.network_name(b)} have tensors of the same "
                    f"names and shapes but other symmetries, and a file cannot tell them apart"
                )
            if first == b and not _chain_is(symmetry, *key):
                needed[key] = b, symmetry
        stored: list[Symmetry] = []
        for _, symmetry in needed.values():
            if not any(symmetry is one for one in stored):
                stored.append(symmetry)
        return cls(**options, symmetries=tuple(stored))

    @classmethod
    def from_config(cls, config: Any) -> Preparation:
        """Return the preparation whose `config` this is.

        Raises:
            ValueError: another form, or keys that are unknown or missing.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"preparation must be an object, got {shown(config)}")
        wanted = {one.name for one in dataclasses.fields(cls) if one.init}
        for what, keys in (("unknown", set(config) - wanted), ("missing", wanted - set(config))):
            if keys:
                raise ValueError(f"preparation: {what} {shortened(', '.join(sorted(keys)))}")
        listed = config["symmetries"]
        if not isinstance(listed, list):
            raise ValueError(f"preparation: symmetries must be a list, got {shown(listed)}")
        found = []
        for i, one in enumerate(listed):
            try:
                found.append(from_json(one))
            except SymmetryError as error:
                raise ValueError(f"preparation: symmetries[{i}] {error}") from error
        return cls(**{**config, "symmetries": tuple(found)})

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, as values that JSON can hold."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.init}
        return {**own, "symmetries": [to_json(symmetry) for symmetry in self.symmetries]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preparation) and self.config == other.config

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": {}}

    @property
    def steps(self) -> tuple[str, ...]:
        """What `apply` does, as `WeightBatch.prepared` names it."""
        canonical = CANONICAL_ODD if self.odd else CANONICAL
        return (RELATIVE,) * self.relative + (canonical,) * (self.units == "canonical")

    @property
    def draws(self) -> bool:
        """Whether training batches are drawn anew, by `augment`."""
        return self.units == "canonical" and self.jitter > 0

    def apply(self, batch: WeightBatch) -> WeightBatch:
        """Return the batch with all steps done; those that were done already are not done again.

        Raises:
            SymmetryError: "canonical", and a network that is neither known nor a plain chain of layers, or one that
                `canonicalise` refuses.
            ValueError: a step was done that is none of this preparation.
        """
        steps = self.steps
        if batch.prepared == steps:
            return batch
        others = [step for step in batch.prepared if step not in steps]
        if others:
            raise ValueError(
                f"Predictor: batch was prepared otherwise, with {', '.join(others)}, where this predictor takes "
                f"{', '.join(steps) or 'networks as they are packed'}; give it what pack returned"
            )
        if self.relative and RELATIVE not in batch.prepared:
            batch = relative_places(batch)
        if self.units == "canonical":
            batch = canonicalise(batch, self.symmetries_of(batch), odd=self.odd)
        return batch.with_fields(prepared=steps)

    def augment(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator) -> WeightBatch:
        """Return `part` in a canonical form with freshly drawn jitter, as `fit` takes it in training."""
        changed = canonicalise(part, self.symmetries_of(part), generator, odd=self.odd, jitter=self.jitter)
        return changed.with_fields(prepared=part.prepared)

    def symmetries_of(self, batch: WeightBatch) -> list[Symmetry]:
        """Return the symmetry of every network, found by the names and shapes of its tensors.

        Raises:
            SymmetryError: a network that is neither known nor a plain chain of layers.
        """
        if not len(batch):
            return []
        check_named(batch, "Preparation")
        return [self._symmetry_of(batch, b) for b in range(len(batch))]

    def _symmetry_of(self, batch: WeightBatch, b: int) -> Symmetry:
        key = batch.names[b][1], batch.shapes[b]
        found = self._found.get(key)
        if found is None:
            found = next((one for one in self.symmetries if _knows(one, *key)), None)
            try:
                found = found or _chain(*key)
            except SymmetryError as error:
                raise SymmetryError(
                    f"Preparation: {batch.network_name(b)}: its hidden units cannot be brought into canonical order, "
                    f"since its symmetries are not among those stored with the predictor and it is no plain chain of "
                    f"layers ({error})"
                ) from None
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[key] = found
        return found


def relative_places(batch: WeightBatch) -> WeightBatch:
    """Replace types and levels by ones that architectures share, since SNE has learnt no codes of others.

    The level of a network's first layer becomes 0, of its last one 2, of the others 1; a single layer is the last one.
    Convolutions count as linear layers.
    """
    level = torch.ones_like(batch.layer_level)
    level[batch.network_ptr[:-1]] = 0
    level[batch.network_ptr[1:] - 1] = 2
    kind, role = batch.tensor_type // len(KINDS), batch.tensor_type % len(KINDS)
    kind = torch.where(kind == CONVOLUTION, LINEAR, kind)
    return batch.with_fields(layer_level=level, tensor_type=len(KINDS) * kind + role)


def _knows(symmetry: Symmetry, names: tuple[str, ...], shapes: Shapes) -> bool:
    """Return whether all tensors are ones of a symmetry's architecture, and none that it permutes is missing."""
    firsts = [symmetry.alias.get(name) for name in names]
    if any(first is None or symmetry.shapes[first] != shape for first, shape in zip(firsts, shapes, strict=True)):
        return False
    return all(key in firsts or not symmetry.permutes(key) for key in symmetry.boxes)


@lru_cache(maxsize=1024)
def _chain(names: tuple[str, ...], shapes: Shapes) -> Symmetry:
    """Return the symmetry of a plain chain of layers; one object per architecture, which keeps its index tables."""
    state = {name: torch.empty(shape, device="meta") for name, shape in zip(names, shapes, strict=True)}
    return chain_symmetry(state)


def _chain_is(symmetry: Symmetry, names: tuple[str, ...], shapes: Shapes) -> bool:
    try:
        return same_permutations(_chain(names, shapes), symmetry)
    except SymmetryError:
        return False
