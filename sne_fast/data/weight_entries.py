"""What counts as a weight among the entries of a module, a state_dict or a file, and why the others do not.

Every entry is accounted for once: it is taken under its own name, or it is in `skipped` with the reason. What has the
name or the shape of a weight is never left out without a word: it is decoded where its format is known (`dequantise`),
else refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.masked import MaskedTensor

from .adapters import Adapters, Scaling, scalings_of_module
from .checkpoints import CheckpointError, find_state_dict
from .flat_entries import FlatEntries, holds_tensors, quantised_recurrent_weights, refuse_hidden, saved_besides
from .known_names import (
    buffer_by_name,
    counter_by_name,
    is_flattened,
    is_optimiser_state,
    is_weight_name,
    parameter_left_out,
)
from .network_copies import averaged_copies, refuse_pairs
from .quantised_weights import decode
from .readers.quantisation_configs import NOTHING_SAID, Quantisation
from .tensor_types import NORMALISATION, kind_of_module
from .tied_names import has_plain_values

__all__ = ["Entries", "entries_of_mapping", "entries_of_modules", "weight_of"]

_STATISTICS = ("running_mean", "running_var")
_FROZEN = (*_STATISTICS, "weight", "bias")


@dataclass
class Entries:
    """Weights by name in their order, and the other entries with the reason why each is left out."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sources: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The tensors that each weight is made of by `weight_of`, as they were given."""


def entries_of_mapping(
    mapping: Mapping[Any, Any],
    label: str,
    scalings: Mapping[str, Scaling] | None = None,
    quantisation: Quantisation = NOTHING_SAID,
    *,
    values: bool = True,
) -> Entries:
    """Return the weights of a state_dict.

    Lists and tuples of tensors are taken as `name.0`, `name.1`, ...

    Args:
        mapping: names and values.
        label: the network in messages.
        scalings: what the configuration of adapters says of their scales, see `Adapters.canonical`.
        quantisation: what a configuration says of quantised weights, see `decode`.
        values: whether tensors must have values. Without, those of the meta device stand for what will be read, and
            only `sources` says what weights are made of.

    Raises:
        ValueError: no tensors, a quantised weight of an unknown format, copies of a network that are ambiguous.
        CheckpointError: tensors in several places.
        TypeError: a mapping, a module or an array among the values, or tensors under a key that is no string.
    """
    flat = FlatEntries(label)
    refused: TypeError | None = None
    mapping, beside = _inner(mapping, label)
    for key, value in mapping.items():
        if not isinstance(key, str):
            if holds_tensors(value):
                raise TypeError(f"pack: {label} must have strings as keys, got {key!r}")
            beside.append((repr(key), "plain value"))
            continue
        try:
            flat.add(key, value)
        except TypeError as error:
            refused = refused or error
    if not flat.tensors:
        held = ", ".join(repr(key) for key in list(mapping)[:8]) or "nothing"
        raise ValueError(
            f"pack: {label} must map names to tensors, at the top or in one mapping inside; it holds {held}"
        )
    if refused is not None:
        raise refused
    found = _weights(flat, {}, scalings or {}, quantisation, values)
    return Entries(found.weights, beside + found.skipped, found.sources)


def weight_of(
    name: str, sources: Mapping[str, Tensor], label: str, quantisation: Quantisation = NOTHING_SAID
) -> Tensor:
    """Return a weight from the tensors that `Entries.sources` has for it, once they have values.

    Args:
        name: of the weight.
        sources: tensors by their names in the file.
        label: the network in messages.
        quantisation: as for `decode`.

    Raises:
        ValueError: as `decode`.
    """
    decoded = decode(sources, label, quantisation=quantisation)
    made = dict(decoded.weights.values())
    if name in made:
        return made[name]
    ((stored, tensor),) = sources.items()
    _check_tensor(label, stored, tensor)
    return _real(tensor)


def entries_of_modules(modules: Iterable[tuple[str, nn.Module]], label: str) -> Entries:
    """Return the weights of a network's modules, given by name: its parameters and its running mean and variance.

    Weights of quantised modules, which are no parameters, are found by what the module saves.

    Raises:
        ValueError: a quantised weight of an unknown format, a module that hides weights, ambiguous copies.
    """
    flat = FlatEntries(label)
    buffers: dict[str, bool] = {}
    recurrent: list[str] = []
    scalings: dict[str, Scaling] = {}
    for name, module in modules:
        prefix = f"{name}." if name else ""
        scalings.update(scalings_of_module(name, module))
        statistics = kind_of_module(module) in (None, NORMALISATION)
        # A normalisation that was frozen has its weight and bias among its buffers, and no file tells them apart.
        counted = _FROZEN if statistics and all(own in module._buffers for own in _STATISTICS) else _STATISTICS
        for own, parameter in module._parameters.items():
            if parameter is not None:
                flat.add(prefix + own, parameter)
        for own, buffer in module._buffers.items():
            if buffer is not None:
                flat.add(prefix + own, buffer)
                buffers[prefix + own] = statistics and own in counted
        if any(prefix.startswith(outer) for outer in recurrent):
            continue  # parts of a quantised recurrent layer, which names its weights itself
        recurrent_weights = quantised_recurrent_weights(module)
        if isinstance(module, torch.jit.ScriptModule):
            refuse_hidden(module, name, label)
        elif recurrent_weights is not None:
            recurrent.append(prefix)
            for own, tensor in recurrent_weights.items():
                flat.add(prefix + own, tensor)
        else:
            for own, value in saved_besides(module).items():
                flat.add(prefix + own, value)
    return _weights(flat, buffers, scalings)


# ---------------------------------------------------------------------------------------------------------------------
# Entries to tensors


def _inner(mapping: Mapping[Any, Any], label: str) -> tuple[Mapping[Any, Any], list[tuple[str, str]]]:
    """Return the state_dict inside a checkpoint, and what lies beside it."""
    try:
        inner = find_state_dict(mapping)
    except CheckpointError as error:
        raise CheckpointError(f"pack: {label} {error}") from error
    beside: list[tuple[str, str]] = []
    prefix, outer = "", mapping
    for key in _path(mapping, inner):
        beside += [(f"{prefix}{other}", f"entry beside {key!r}") for other in outer if other is not key]
        prefix, outer = f"{prefix}{key}.", outer[key]
    return outer, beside


def _path(outer: Mapping[Any, Any], inner: Mapping[Any, Any]) -> list[Any]:
    """Return the keys that lead from a mapping to one inside it; none if there is no such way through mappings."""
    waiting: list[tuple[Mapping[Any, Any], list[Any]]] = [(outer, [])]
    seen = set()
    while waiting:
        one, keys = waiting.pop(0)
        if one is inner:
            return keys
        if id(one) not in seen:
            seen.add(id(one))
            waiting += [(value, [*keys, key]) for key, value in one.items() if isinstance(value, Mapping)]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Tensors to weights


def _weights(
    flat: FlatEntries,
    buffers: Mapping[str, bool],
    scalings: Mapping[str, Scaling],
    quantisation: Quantisation = NOTHING_SAID,
    values: bool = True,
) -> Entries:
    """Decode what is quantised, and part weights from the rest.

    Args:
        flat: all tensors, and entries that are none.
        buffers: whether it counts, for every tensor that a module calls a buffer.
        scalings: those of adapters.
        quantisation: as for `decode`.
        values: whether tensors must have values.
    """
    tensors, label, found = flat.tensors, flat.label, Entries(skipped=list(flat.skipped))
    decoded = decode(tensors, label, values=values, quantisation=quantisation)
    scaled_layers = {name.rpartition(".")[0] for name in tensors if _names_scales(name)}
    adapters = Adapters(tensors)
    floating: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in decoded.weights:
            target, decoded_weight = decoded.weights[name]
            if target in floating or (target in tensors and target != name):
                raise ValueError(f"pack: {label} has {target!r} beside its quantised form {name!r}; remove one")
            if decoded_weight.numel():
                floating[target] = decoded_weight
                found.sources[target] = {part: tensors[part] for part in decoded.parts[name]}
            elif name not in decoded.used:
                found.skipped.append((name, "empty tensor"))
        if name in decoded.used:
            found.skipped.append((name, decoded.used[name]))
        elif name not in decoded.weights and name not in adapters.scales:
            if nn.parameter.is_lazy(tensor):
                reason = None
            elif is_optimiser_state(name):
                reason = "optimiser state"
            elif tensor.is_floating_point() or tensor.is_complex():
                reason = _reason_of_floats(name, tensor, buffers.get(name), tensors)
            else:
                reason = _reason_of_integers(name, tensor, label, name.rpartition(".")[0] in scaled_layers)
            if reason is None:
                if values or not tensor.is_meta:
                    _check_tensor(label, name, tensor)
                _check_float8(label, name, tensor, decoded.any_scaled)
                floating[name] = tensor
                found.sources[name] = {name: tensor}
            else:
                found.skipped.append((name, reason))
    _refuse_placeholders(flat)
    copies = averaged_copies(floating, label)
    found.skipped.extend(copies.items())
    floating = {name: tensor for name, tensor in floating.items() if name not in copies}
    refuse_pairs(floating, label)
    floating, said = adapters.canonical(floating, tensors, scalings, label)
    found.skipped.extend(said)
    found.weights.update({name: _real(tensor) for name, tensor in floating.items()})
    return found


def _reason_of_floats(name: str, tensor: Tensor, counts: bool | None, tensors: Mapping[str, Tensor]) -> str | None:
    """Return why a floating or complex tensor is left out, or None if it is a weight.

    Args:
        name: its full name.
        tensor: its values.
        counts: for a module's buffer, whether it is one that counts; None where no module says that it is a buffer.
        tensors: all tensors by name.
    """
    if counts is False:
        return "buffer"
    if tensor.numel() == 0:
        return "empty tensor"
    if counts is None and isinstance(tensor, nn.Parameter):
        return parameter_left_out(name)
    known = buffer_by_name(name, tensor, tensors)
    if known is None and name.endswith("weight_v") and {name[:-1] + "u", name[:-1] + "orig"} <= tensors.keys():
        return "spectral norm vector"
    return known


def _reason_of_integers(name: str, tensor: Tensor, label: str, scales_beside: bool) -> str:
    own = name.rpartition(".")[2]
    wide = tensor.dtype in (torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
    if tensor.dtype == torch.bool and (own != "weight" or tensor.ndim < 2):
        return "mask"
    if tensor.ndim == 0 or counter_by_name(name):
        return f"{own} counter" if tensor.numel() == 1 else f"{own} table"
    if own.endswith(("mask", "masks")) or (own == "bias" and tensor.ndim == 4 and tensor.shape[:2] == (1, 1)):
        return "mask"
    if tensor.dtype == torch.int64 and not is_weight_name(name, whole=True):  # too wide for anything quantised
        return "integer tensor"
    if not is_weight_name(name) and (tensor.ndim < 2 or (wide and not scales_beside)):
        return "integer tensor"
    if tensor.numel() == 0:
        return "empty tensor"
    raise ValueError(
        f"pack: {label}, tensor {name!r} looks like a quantised weight ({tensor.dtype}, shape {tuple(tensor.shape)}) "
        f"of a format that is not known here; dequantise it or remove it"
    )


def _check_tensor(label: str, name: str, tensor: Tensor) -> None:
    where = f"pack: {label}, tensor {name!r}"
    if tensor.ndim == 1 and is_flattened(name):
        raise ValueError(f"{where} joins the weights of several layers, as FSDP keeps them; save a full state_dict")
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{where} is not initialised yet (lazy module); run the network once on an example")
    if isinstance(tensor, MaskedTensor):
        raise ValueError(f"{where} is masked ({type(tensor).__name__}); use .to_tensor() with a value for the rest")
    if tensor.layout != torch.strided or tensor.is_nested:
        what = "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
        raise ValueError(f"{where} is {what}; use .to_dense()")
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        device = "on the meta device" if tensor.is_meta else "fake"
        raise ValueError(f"{where} is {device} and has no values; load its weights first")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{where} is distributed ({type(tensor).__name__}); use .full_tensor()")
    if tensor.dtype.itemsize == 1 and "x2" in str(tensor.dtype):
        raise ValueError(f"{where} packs two numbers per element ({tensor.dtype}); unpack it first")
    if has_plain_values(tensor) and tensor.numel() * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{where} has more elements than are stored of it, {tensor.numel()}, since it was expanded; use .clone() "
            f"if they are meant"
        )


def _refuse_placeholders(flat: FlatEntries) -> None:
    """Refuse a network of which most matrices are empty vectors, which partitioned trainings save in their place."""
    weights = {name: tensor for name, tensor in flat.tensors.items() if is_weight_name(name, whole=True)}
    empty = [name for name, tensor in weights.items() if not nn.parameter.is_lazy(tensor) and tensor.shape == (0,)]
    matrices = sum(not nn.parameter.is_lazy(tensor) and tensor.ndim > 1 for tensor in weights.values())
    if len(empty) > max(1, matrices):
        raise ValueError(
            f"pack: {flat.label}, tensor {empty[0]!r} and others are empty in place of weights, as "
            f"ZeRO stage 3 of DeepSpeed saves them; gather the weights first, e.g. with its zero_to_fp32.py"
        )


def _check_float8(label: str, name: str, tensor: Tensor, any_scaled: bool) -> None:
    if any_scaled and "float8" in str(tensor.dtype):
        raise ValueError(
            f"pack: {label}, tensor {name!r} is {tensor.dtype} and lacks the scale that others of this network have; "
            f"add it or dequantise the network first"
        )


def _names_scales(name: str) -> bool:
    own = name.rpartition(".")[2].lower()
    return own == "s" or any(word in own for word in ("scale", "absmax", "codebook", "zeros", "scb"))


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as its real and imaginary parts side by side along its last dimension."""
    if not tensor.is_complex():
        return tensor
    parts = torch.view_as_real(tensor.resolve_conj())
    return parts.flatten(-2) if parts.ndim > 1 else parts
