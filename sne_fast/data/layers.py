"""Layers and tensors of a network, in order, with their kinds and roles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import CheckpointError, find_state_dict, load_state_dict
from .tensor_types import NORMALISATION, infer_kind, kind_of_module, role_of

_STATISTICS = ("running_mean", "running_var")


@dataclass
class Layer:
    """The tensors that one module owns: `tensors` by full name, `own` their names inside the layer."""

    name: str
    kind: int | None = None
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def add(self, own: str, tensor: Tensor) -> None:
        """Append a tensor by its name inside the layer."""
        self.tensors.append((f"{self.name}.{own}" if self.name else own, tensor))
        self.own.append(own)

    def resolved_kind(self) -> int:
        """Return the kind of the layer, inferred from names and shapes where no module said it."""
        if self.kind is None:
            return infer_kind(self.name, ((own, t.ndim) for own, (_, t) in zip(self.own, self.tensors, strict=True)))
        return self.kind

    def roles(self) -> list[int]:
        """Return the role of each tensor."""
        return [role_of(own) for own in self.own]


@dataclass
class Network:
    """A network to pack: its position in the call, its name and its layers."""

    index: int
    name: str
    layers: list[Layer]

    @property
    def label(self) -> str:
        """Name of the network in messages."""
        return f"network {self.index} ({self.name!r})"


def collect(index: int, network: Any) -> Network:
    """Collect the layers of a module, state_dict or checkpoint path, and check that every tensor can be cut."""
    if isinstance(network, nn.Module):
        found = Network(index, type(network).__name__, _from_module(network))
    elif isinstance(network, Mapping):
        found = Network(index, "state_dict", [])
        found.layers = _from_state_dict(network, found.label)
    elif isinstance(network, (str, os.PathLike)):
        found = Network(index, os.fspath(network), [])
        try:
            found.layers = _from_state_dict(load_state_dict(network), found.label)
        except CheckpointError as error:
            raise CheckpointError(f"pack: network {index}: {error}") from error
    else:
        raise TypeError(
            f"pack: network {index} must be an nn.Module, a state_dict or a path to a checkpoint, "
            f"got {type(network).__name__}"
        )
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


def _from_module(network: nn.Module) -> list[Layer]:
    layers, seen = [], set()
    for name, module in network.named_modules():
        if not module._parameters and not module._buffers:
            continue
        layer = Layer(name, kind_of_module(module))
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                layer.add(own, parameter)
        if layer.kind is None or layer.kind == NORMALISATION:
            for own in _STATISTICS:
                # Not .get, which the buffers of scripted modules lack.
                buffer = module._buffers[own] if own in module._buffers else None  # noqa: SIM401
                if buffer is not None and buffer.is_floating_point() and id(buffer) not in seen:
                    seen.add(id(buffer))
                    layer.add(own, buffer)
        if layer.tensors:
            layers.append(layer)
    stripped = strip_wrappers([layer.name + "." for layer in layers])
    return [_renamed(layer, name[:-1]) for layer, name in zip(layers, stripped, strict=True)]


def _renamed(layer: Layer, name: str) -> Layer:
    if name == layer.name:
        return layer
    renamed = Layer(name, layer.kind)
    for own, (_, tensor) in zip(layer.own, layer.tensors, strict=True):
        renamed.add(own, tensor)
    return renamed


def strip_wrappers(names: list[str]) -> list[str]:
    """Return names without the prefixes of DistributedDataParallel and `torch.compile`."""
    if any("_orig_mod." in name for name in names):
        names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def _from_state_dict(state_dict: Mapping[Any, Any], label: str) -> list[Layer]:
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
    layers: dict[str, Layer] = {}
    for key, tensor in zip(strip_wrappers(keys), tensors, strict=True):
        _refuse_quantised(label, key, tensor)
        if not tensor.is_floating_point():
            continue
        name, _, own = key.rpartition(".")
        if name not in layers:
            layers[name] = Layer(name)
        layers[name].add(own, tensor)
    return list(layers.values())
