"""Layers and tensors of a network, in order, with their kinds and roles."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from .checkpoints import CheckpointError, find_state_dict, read_checkpoint
from .layer_order import order_by_names
from .tensor_types import NORMALISATION, infer_kind, kind_of_module, role_of

_STATISTICS = ("running_mean", "running_var")

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

    def add(self, own: str, tensor: Tensor) -> None:
        """Append a tensor by its name inside the layer."""
        self.tensors.append((f"{self.name}.{own}" if self.name else own, tensor))
        self.own.append(own)

    def resolved_kind(self) -> int:
        """Return the kind of the layer, inferred from names and shapes where no module said it."""
        return infer_kind(self.name, self.held) if self.kind is None else self.kind

    def roles(self) -> list[int]:
        """Return the role of each tensor."""
        return [role_of(own) for own in self.own]


@dataclass
class Network:
    """A network to pack: its position in the call, its name, its layers, and what was left out with the reasons."""

    index: int
    name: str
    layers: list[Layer]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the network in messages."""
        return f"network {self.index} ({self.name!r})"


def collect(index: int, network: Any, order: str = "names", *, kinds_by_names: bool = False) -> Network:
    """Collect the layers of a module, state_dict or checkpoint path, and check that every tensor can be cut.

    Args:
        index: position of the network in the call.
        network: the module, state_dict or path.
        order: of the layers, "names" or "definition".
        kinds_by_names: whether a module's layers get the kinds that those of its file would have.
    """
    kinds: dict[str, int | None] = {}
    if isinstance(network, nn.Module):
        found = Network(index, type(network).__name__, [])
        entries, kinds = _entries_of_module(network)
    elif isinstance(network, Mapping):
        name = getattr(network, "name", None)  # of a network of a zoo
        found = Network(index, name if isinstance(name, str) else "state_dict", [])
        entries = _entries_of_state_dict(network, found.label)
    elif isinstance(network, (str, os.PathLike)):
        found = Network(index, os.fspath(network), [])
        try:
            checkpoint = read_checkpoint(network)
        except CheckpointError as error:
            raise CheckpointError(f"pack: network {index}: {error}") from error
        if order == "definition" and not checkpoint.keeps_order:
            raise CheckpointError(
                f"pack: {found.label} does not say in which order its layers were defined, which order='definition' "
                f"needs; write it with sne_fast.data.checkpoints.save_state_dict, or use order='names'"
            )
        entries = _entries_of_state_dict(checkpoint.tensors, found.label)
    else:
        raise TypeError(
            f"pack: network {index} must be an nn.Module, a state_dict or a path to a checkpoint, "
            f"got {type(network).__name__}"
        )
    found.layers = _layers(entries, order)
    if not kinds_by_names:
        for layer in found.layers:
            layer.kind = kinds.get(layer.name)
    if not found.layers:
        raise ValueError(
            f"pack: {found.label} has no floating-point parameters, so nothing of it can be encoded; leave it out"
        )
    for layer in found.layers:
        for name, tensor in layer.tensors:
            _check_tensor(found.label, name, tensor)
    return found


def _check_tensor(label: str, name: str, tensor: Tensor) -> None:
    where = f"pack: {label}, tensor {name!r}"
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{where} is not initialised yet (lazy module); run the network once on an example")
    if tensor.layout != torch.strided:
        raise ValueError(f"{where} is sparse ({tensor.layout}); use .to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values; load its weights first")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{where} is distributed ({type(tensor).__name__}); use .full_tensor()")
    if tensor.dtype.itemsize == 1 and "x2" in str(tensor.dtype):
        raise ValueError(f"{where} packs two numbers per element ({tensor.dtype}); unpack it first")
    if tensor.numel() == 0:
        raise ValueError(f"{where} is empty, shape {tuple(tensor.shape)}; leave it out")


def _refuse_quantised(label: str, name: str, tensor: Tensor) -> None:
    if tensor.is_quantized:
        raise ValueError(f"pack: {label}, tensor {name!r} is quantised ({tensor.dtype}); use .dequantize()")


def _entries_of_module(network: nn.Module) -> tuple[list[Entry], dict[str, int | None]]:
    """Return the tensors of a module that count, under all their names, and the kind of each layer."""
    entries: list[Entry] = []
    kinds: dict[str, int | None] = {}
    for name, module in _modules(network):
        if not module._parameters and not module._buffers:
            continue
        prefix = f"{name}." if name else ""
        kinds[prefix] = kind = kind_of_module(module)
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                entries.append((prefix + own, parameter))
        if kind is None or kind == NORMALISATION:
            for own in _STATISTICS:
                # Not .get, which the buffers of scripted modules lack.
                buffer = module._buffers[own] if own in module._buffers else None  # noqa: SIM401
                if buffer is not None and buffer.is_floating_point():
                    entries.append((prefix + own, buffer))
    prefixes = dict(zip(kinds, strip_wrappers(list(kinds)), strict=True))
    names = strip_wrappers([name for name, _ in entries])
    renamed = [(name, tensor) for name, (_, tensor) in zip(names, entries, strict=True)]
    return renamed, {prefixes[prefix][:-1]: kind for prefix, kind in kinds.items()}


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


def _layers(entries: Sequence[Entry], order: str) -> list[Layer]:
    """Return the layers that own these tensors, in order, each tensor once: at the first of its names."""
    kept = _once(_ordered(entries, order))
    if len(kept) < len(entries):  # by the names that count: a file may have lost the others
        kept = _ordered(kept, order)
    layers: dict[str, Layer] = {}
    for name, tensor in kept:
        layer, _, own = name.rpartition(".")
        if layer not in layers:
            layers[layer] = Layer(layer)
        layers[layer].add(own, tensor)
    for name, tensor in entries:
        layer, _, own = name.rpartition(".")
        if layer in layers:
            layers[layer].held[own] = () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return list(layers.values())


def _ordered(entries: Sequence[Entry], order: str) -> Sequence[Entry]:
    return entries if order == "definition" else [entries[i] for i in order_by_names([name for name, _ in entries])]


def _once(entries: Sequence[Entry]) -> list[Entry]:
    seen: set[object] = set()
    kept = []
    for name, tensor in entries:
        identity = _identity(tensor)
        if identity not in seen:
            seen.add(identity)
            kept.append((name, tensor))
    return kept


def _identity(tensor: Tensor) -> object:
    """Return what two names of one tensor share: its memory and the way it is read, else the object."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or nn.parameter.is_lazy(tensor) or is_functorch_wrapped_tensor(tensor) or tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def strip_wrappers(names: list[str]) -> list[str]:
    """Return names without the prefixes of DistributedDataParallel and `torch.compile`."""
    if any("_orig_mod." in name for name in names):
        names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def _entries_of_state_dict(state_dict: Mapping[Any, Any], label: str) -> list[Entry]:
    """Return the tensors of a state_dict that count."""
    try:
        state_dict = find_state_dict(state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"pack: {label} {error}") from error
    keys, tensors = [], []
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            if not isinstance(key, str):
                raise TypeError(f"pack: {label} must have strings as keys, got {key!r}")
            keys.append(key)
            tensors.append(value)
    if not tensors:
        held = ", ".join(repr(key) for key in list(state_dict)[:8]) or "nothing"
        raise ValueError(
            f"pack: {label} must map names to tensors, at the top or in one mapping inside; it holds {held}"
        )
    for key, value in state_dict.items():
        # numbers, None and extra state may stand beside tensors; these would be weights left out without a word
        if isinstance(value, (Mapping, nn.Module)) or type(value).__module__ == "numpy":
            raise TypeError(
                f"pack: {label}, {key!r} must be a tensor, got {type(value).__name__}; convert or remove it"
            )
    entries = []
    for key, tensor in zip(strip_wrappers(keys), tensors, strict=True):
        _refuse_quantised(label, key, tensor)
        if tensor.is_floating_point():
            entries.append((key, tensor))
    return entries
