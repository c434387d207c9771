"""Tensors by name out of the values of a state_dict, also of those inside lists and of packed parameters of torch."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .known_names import is_weight_name

__all__ = ["DECODED", "FlatEntries", "holds_tensors", "quantised_recurrent_weights", "refuse_hidden", "saved_besides"]

DECODED = "quantised weight: decoded as {!r}"

_PLAIN = (numbers.Number, np.generic, str, bytes, bytearray, bool, torch.dtype, torch.device, torch.Size, type(None))
_MAX_DEPTH, _MAX_ENTRIES = 32, 1_000_000  # of lists in lists, whose parts may be shared
_PACKED = "_packed_params."
_OF_PACKED = {"weight": "weight", "bias": "bias", "_packed_weight": "weight", "0": "weight", "1": "bias"}


class FlatEntries:
    """Tensors of a network by name, and the entries that are none, with the reason why each is left out.

    Attributes:
        label: the network in messages.
        tensors: by full name, in order.
        skipped: names and reasons.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.tensors: dict[str, Tensor] = {}
        self.skipped: list[tuple[str, str]] = []
        self._names: set[str] = set()

    def add(self, name: str, value: Any, inside: tuple[int, ...] = ()) -> None:
        """Add an entry: a tensor, a list of tensors or of such lists as `name.0`, `name.1`, ..., or a plain value.

        Args:
            name: its full name.
            value: any value.
            inside: ids of the containers that it is in.

        Raises:
            ValueError: two entries of one name, lists in themselves.
            TypeError: a value that could hold weights and is no tensor.
        """
        if isinstance(value, Tensor):
            given = _unpacked(name)
            self._put(given, value)
            if given != name:
                self._leave(name, DECODED.format(given))
        elif isinstance(value, (list, tuple)) and _is_packed_linear(name, value):
            base = name.removesuffix("_packed_params").removesuffix(_PACKED)
            for own, tensor in zip(("weight", "bias"), value, strict=True):
                if tensor is not None:
                    self._put(base + own, tensor)
            self._leave(name, DECODED.format(base + "weight"))
        elif isinstance(value, torch.ScriptObject):
            self._unpack(name, value)
        elif isinstance(value, (list, tuple, Mapping)) and holds_tensors(value):
            if id(value) in inside or len(inside) > _MAX_DEPTH or len(self._names) > _MAX_ENTRIES:
                raise ValueError(f"pack: {self.label}, {name!r} nests containers in themselves or too deep; flatten it")
            if isinstance(value, Mapping):
                raise self._no_tensor(name, type(value).__name__)
            for i, entry in enumerate(value):
                self.add(f"{name}.{i}", entry, (*inside, id(value)))
        else:
            reason = _reason_of_value(name, value)
            if reason is None:
                raise self._no_tensor(name, type(value).__name__)
            self._leave(name, reason)

    def _put(self, name: str, tensor: Tensor) -> None:
        self._once(name)
        self.tensors[name] = tensor

    def _leave(self, name: str, reason: str) -> None:
        self._once(name)
        self.skipped.append((name, reason))

    def _once(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"pack: {self.label} has two entries that are called {name!r}; rename one")
        self._names.add(name)

    def _no_tensor(self, name: str, what: str) -> TypeError:
        return TypeError(f"pack: {self.label}, {name!r} must be a tensor, got {what}; convert or remove it")

    def _unpack(self, name: str, value: torch.ScriptObject) -> None:
        before, dot, own = name.rpartition(".")
        gate = own.removeprefix("_packed_weight")  # `_ih` or `_hh` of a recurrent cell
        try:
            weight, bias = torch.ops.quantized.linear_unpack(value)
        except RuntimeError:
            raise TypeError(
                f"pack: {self.label}, {name!r} must be a tensor, got packed parameters of torch; pass the module itself"
            ) from None
        self._put(f"{before}{dot}weight{gate}", weight)
        if bias is not None:
            self._put(f"{before}{dot}bias{gate}", bias)
        self._leave(name, DECODED.format(f"{before}{dot}weight{gate}"))


def _reason_of_value(name: str, value: Any) -> str | None:
    """Return why a value that is no tensor is left out, or None if it could hold weights."""
    if isinstance(value, _PLAIN):
        return "plain value"
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        if _holds(value, _could_be_weights):
            return None
        return None if is_weight_name(name, whole=True) and len(value) else "plain value"
    return None if _could_be_weights(value) or is_weight_name(name, whole=True) else f"{type(value).__name__} object"


def _could_be_weights(value: Any) -> bool:
    # Tensors that are left here are in a set, which has no order.
    kinds = (Tensor, nn.Module, torch.ScriptObject, torch.UntypedStorage, torch.TypedStorage)
    return isinstance(value, kinds) or (hasattr(value, "__array__") and not isinstance(value, np.generic))


def holds_tensors(value: Any) -> bool:
    """Return whether a value is a tensor or a container with one inside, at any depth."""
    return _holds(value, lambda inner: isinstance(inner, Tensor))


def _holds(value: Any, wanted: Callable[[Any], bool]) -> bool:
    """Return whether anything inside containers is wanted; containers inside themselves are looked at once."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if wanted(one):
            return True
        if isinstance(one, (list, tuple, set, frozenset, Mapping)) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, Mapping) else one)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Quantised modules of torch


def _is_packed_linear(name: str, value: Any) -> bool:
    """Return whether an entry is what `LinearPackedParams` saves: weight and bias, or None."""
    return (
        (name + ".").endswith("_packed_params." + _PACKED)
        and len(value) == 2
        and isinstance(value[0], Tensor)
        and (value[1] is None or isinstance(value[1], Tensor))
    )


def _unpacked(name: str) -> str:
    """Return the name that a weight has in the float module, for names that packed parameters give it."""
    before, packed, own = name.rpartition(_PACKED)
    if packed and own in _OF_PACKED:
        return before.removesuffix(_PACKED) + _OF_PACKED[own]
    return name


def quantised_recurrent_weights(module: nn.Module) -> dict[str, Tensor] | None:
    """Return weights and biases of a recurrent layer or cell that torch has quantised, None of another module."""
    recurrent: Any = module
    if not type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") or not hasattr(module, "get_bias"):
        return None
    return {**recurrent.get_weight(), **recurrent.get_bias()}


def saved_besides(module: nn.Module) -> dict[str, Any]:
    """Return what a quantised module saves besides its parameters and buffers; nothing for other modules."""
    held = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    integers = any(not (t.is_floating_point() or t.is_complex()) and t.numel() > 1 for t in held)
    if type(module)._save_to_state_dict is nn.Module._save_to_state_dict or not (
        integers or type(module).__module__.startswith("torch.ao.")
    ):
        return {}
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    return {name: v for name, v in saved.items() if name not in module._parameters and name not in module._buffers}


def refuse_hidden(module: torch.jit.ScriptModule, name: str, label: str) -> None:
    """Refuse a script whose quantised weights are neither parameters nor buffers.

    Raises:
        ValueError: such a script; the message names it.
    """
    hidden = ("_packed_params", "_packed_weight", "_packed_weight_ih", "_packed_weight_hh", "param", "_weight_bias")
    for own in hidden:
        if module._c.hasattr(own) and isinstance(module._c.getattr(own), torch.ScriptObject):
            raise ValueError(
                f"pack: {label}, module {name!r} is a script that hides quantised weights; pass the module itself"
            )
