"""Layers and tensors of a network, in order, with their kinds and roles."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .adapters import Scaling
from .checkpoints import Checkpoint, CheckpointError, read_checkpoint
from .known_names import WRAPPER_PARTS
from .layer_order import order_by_names
from .tensor_types import ADAPTER_ROLES, infer_kind, kind_of_module, role_of
from .tied_names import identity_of
from .weight_entries import entries_of_mapping, entries_of_modules

Entry = tuple[str, Tensor]
"""A tensor with its full name."""


@dataclass
class Layer:
    """The tensors of one module that count: `tensors` by full name, `own` their names inside the layer.

    `held` has the shapes of all its tensors by name, those too that count elsewhere because they are tied.
    """

    name: str
    kind: int | None = None
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    held: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor by its full name."""
        self.tensors.append((name, tensor))
        self.own.append(name.rpartition(".")[2])

    def resolved_kind(self) -> int:
        """Return the kind of the layer, inferred from names and shapes where no module said it."""
        return infer_kind(self.name, self.held) if self.kind is None else self.kind

    def is_adapter(self) -> bool:
        """Return whether the layer is the adapter of a module, which may have the name of that module."""
        return not ADAPTER_ROLES.keys().isdisjoint(self.own)

    def types(self, kind: int | None = None) -> list[int]:
        """Return `8 * kind + role` of each tensor, in a layer of this kind; None is its own."""
        kind = self.resolved_kind() if kind is None else kind
        return [8 * kind + role_of(own, kind) for own in self.own]


@dataclass
class Network:
    """A network to pack: its position in the call, its name, its layers, and what was left out with the reasons."""

    index: int
    name: str
    layers: list[Layer]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sources: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)
    """Of each tensor, its name in the source and the tensors there that `weight_entries.weight_of` makes it of."""

    @property
    def label(self) -> str:
        """Name of the network in messages."""
        return f"network {self.index} ({self.name!r})"


def collect(
    index: int, network: Any, order: str = "names", *, kinds_by_names: bool = False, values: bool = True
) -> Network:
    """Collect the layers of a module, state_dict or checkpoint, and check that every tensor can be cut.

    Args:
        index: position of the network in the call.
        network: the module, state_dict, path or checkpoint that was read.
        order: of the layers, "names" or "definition".
        kinds_by_names: whether a module's layers get the kinds that those of its file would have.
        values: whether tensors must have values; see `entries_of_mapping`.
    """
    kinds: dict[str, int | None] = {}
    if isinstance(network, nn.Module):
        found = Network(index, type(network).__name__, [])
        modules = list(_modules(network))
        kinds = {name: kind_of_module(module) for name, module in modules}
        entries = entries_of_modules(modules, found.label)
    elif isinstance(network, Mapping):
        name = getattr(network, "name", None)  # of a network of a zoo
        found = Network(index, name if isinstance(name, str) else "state_dict", [])
        entries = entries_of_mapping(network, found.label)
    elif isinstance(network, (str, os.PathLike, Checkpoint)):
        found = Network(index, "checkpoint" if isinstance(network, Checkpoint) else os.fspath(network), [])
        try:
            checkpoint = network if isinstance(network, Checkpoint) else read_checkpoint(network)
        except CheckpointError as error:
            raise CheckpointError(f"pack: network {index}: {error}") from error
        if order == "definition" and not checkpoint.keeps_order:
            raise CheckpointError(
                f"pack: {found.label} does not say in which order its layers were defined, which order='definition' "
                f"needs; write it with sne_fast.data.checkpoints.save_state_dict, or use order='names'"
            )
        scalings = {name: Scaling(*scaling) for name, scaling in checkpoint.adapter_scales.items()}
        entries = entries_of_mapping(checkpoint.tensors, found.label, scalings, checkpoint.quantisation, values=values)
        entries.skipped = [*checkpoint.left_out.items(), *entries.skipped]
        kinds = dict(checkpoint.kinds)
    else:
        raise TypeError(
            f"pack: network {index} must be an nn.Module, a state_dict or a path to a checkpoint, "
            f"got {type(network).__name__}"
        )
    stored = list(entries.weights)
    names = strip_wrappers(stored)
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(
            f"pack: {found.label} has two tensors called {twice!r} once the prefixes of wrappers are dropped; "
            f"remove one"
        )
    found.sources = {
        name: (stored_as, entries.sources.get(stored_as, {})) for name, stored_as in zip(names, stored, strict=True)
    }
    found.layers, tied = _layers(list(zip(names, entries.weights.values(), strict=True)), order)
    found.skipped = [*entries.skipped, *((stored[i], f"tied tensor: of {first!r}") for i, first in tied.items())]
    if not kinds_by_names:
        owners = {name.rpartition(".")[0]: full.rpartition(".")[0] for name, full in zip(names, stored, strict=True)}
        for layer in found.layers:
            if not layer.is_adapter():
                layer.kind = kinds.get(owners[layer.name])
    if not found.layers:
        raise ValueError(
            f"pack: {found.label} has no floating-point parameters, so nothing of it can be encoded; leave it out"
        )
    return found


def _modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those inside it by name, a shared one under each of its names; one inside itself only once."""
    waiting: list[tuple[str, nn.Module, frozenset[int]]] = [("", network, frozenset())]
    while waiting:
        name, module, around = waiting.pop()
        yield name, module
        around = around | {id(module)}
        inside = [
            (f"{name}.{child}" if name else child, inner, around)
            for child, inner in module._modules.items()
            if inner is not None and id(inner) not in around
        ]
        waiting.extend(reversed(inside))


def _layers(entries: Sequence[Entry], order: str) -> tuple[list[Layer], dict[int, str]]:
    """Return the layers that own these tensors, in order, and the places of entries that are other names of a tensor.

    Each tensor is taken once, at the first of its names, which stands behind the place of each other one.
    """
    ordered = _ordered(range(len(entries)), entries, order)
    firsts: dict[object, int] = {}
    tied = {}
    for i in ordered:
        first = firsts.setdefault(identity_of(entries[i][1]), i)
        if first != i:
            tied[i] = entries[first][0]
    kept: Sequence[int] = [i for i in ordered if i not in tied]
    if tied:  # by the names that count: a file may have lost the others
        kept = _ordered(kept, entries, order)
    layers: dict[str, Layer] = {}
    for i in kept:
        layer = entries[i][0].rpartition(".")[0]
        if layer not in layers:
            layers[layer] = Layer(layer)
        layers[layer].add(*entries[i])
    for full, tensor in entries:
        layer, _, own = full.rpartition(".")
        if layer in layers:
            layers[layer].held[own] = tuple(tensor.shape)
        owner, parametrised, parameter = f".{layer}".rpartition(".parametrizations.")
        if parametrised and owner[1:] in layers and own in ("original", "original1"):
            layers[owner[1:]].held.setdefault(parameter, tuple(tensor.shape))
    return list(layers.values()), tied


def _ordered(places: Sequence[int], entries: Sequence[Entry], order: str) -> Sequence[int]:
    return places if order == "definition" else [places[i] for i in order_by_names([entries[i][0] for i in places])]


def strip_wrappers(names: list[str]) -> list[str]:
    """Return names without the parts of wrappers: DistributedDataParallel, FSDP, checkpointing, `torch.compile`."""
    if any(f"{part}." in name for part in WRAPPER_PARTS for name in names):
        names = [".".join(part for part in name.split(".") if part not in WRAPPER_PARTS) for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names
