"""Fingerprints of data, targets and configuration: what a training or a result was made of, and what differs now.

A fingerprint is a dict of plain values, which checkpoints and JSON files can hold. Data stands in it as a digest and a
few words about its size. `differences` compares the fingerprint of a file with that of a call.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..nn.predictor import Predictor
from .settings import FitSettings

Fingerprint = dict[str, Any]
SETTINGS = "settings"
CONTINUED = ("epochs",)
"""Settings that may change when a training goes on."""
_MESSAGES = ("names", "skipped")  # fields of a batch that no number depends on
_VERSIONS = ("library_name", "sne_fast_version")  # entries of a configuration that do not decide what is computed
_MISSING = object()


def of_training(
    predictor: Predictor,
    batch: WeightBatch,
    targets: Tensor,
    settings: FitSettings,
    validation: tuple[WeightBatch, Tensor] | None = None,
    augment: Any = None,
) -> Fingerprint:
    """Return the fingerprint of a training; arguments as for :func:`sne_fast.training.fit`.

    The parameters with which it starts are no part of it, since those of the checkpoint take their place. Nor are the
    device and the number of processes, on which only rounding depends.
    """
    watched, goals = validation if validation is not None else (None, None)
    return {
        "networks": of_batch(batch),
        "targets": of_targets(targets, predictor),
        "validation networks": None if watched is None else of_batch(watched),
        "validation targets": None if goals is None else of_targets(goals, predictor),
        "augmentation": None if augment is None else of_object(augment),
        SETTINGS: {k: v for k, v in dataclasses.asdict(settings).items() if k not in CONTINUED},
        "predictor": of_predictor(predictor),
    }


def of_batch(batch: WeightBatch) -> Fingerprint:
    """Return the fingerprint of networks: their values, structure and types, not their names."""
    digest = _Digest()
    for field in dataclasses.fields(batch):
        if field.init and field.name not in _MESSAGES:
            digest.add(field.name)
            digest.add(getattr(batch, field.name))
    return {"size": f"{len(batch)} networks of {batch.num_weights} weights", "sha256": digest.hex()}


def of_targets(targets: Tensor, predictor: Predictor | None = None) -> Fingerprint:
    """Return the fingerprint of targets, in the dtype in which the predictor takes them."""
    if predictor is not None and targets.dtype.is_floating_point:
        targets = targets.to(predictor.target_mean.dtype)
    return {"size": f"{'x'.join(str(n) for n in targets.shape)} numbers", "sha256": of_values(targets)}


def of_predictor(predictor: Predictor) -> Fingerprint:
    """Return the fingerprint of a predictor: its configuration and its parameters' names, shapes and dtypes."""
    config = _flat(json.loads(json.dumps(predictor.config, default=repr)))
    parameters = {name: (tuple(t.shape), str(t.dtype)) for name, t in predictor.state_dict().items()}
    frozen = [name for name, p in predictor.named_parameters() if not p.requires_grad]
    return {
        **{key: value for key, value in config.items() if key.rpartition(".")[2] not in _VERSIONS},
        "class": type(predictor).__qualname__,
        "parameters": {"size": f"{len(parameters)} tensors", "sha256": of_values(parameters)},
        "frozen parameters": {"size": f"{len(frozen)} tensors", "sha256": of_values(frozen)},
    }


def of_module(module: nn.Module) -> str:
    """Return the digest of a module's parameters and buffers."""
    return of_values(dict(module.state_dict()))


def of_object(value: Any) -> Fingerprint:
    """Return the fingerprint of a function or of a callable object, such as an augmentation."""
    named = value.func if isinstance(value, functools.partial) else value
    name = getattr(named, "__qualname__", type(named).__qualname__)
    return {"size": name, "sha256": of_values(value)}


def of_values(value: Any) -> str:
    """Return the digest of plain values, tensors, arrays, functions, and sequences and mappings of them.

    A function counts by its name and code, its defaults, and the values of its closure and of a `functools.partial`;
    an object by its class and attributes. Of functions and objects outside this package only attributes that cannot
    change are taken, so that one which counts its calls stays the same.
    """
    digest = _Digest()
    digest.add(value)
    return digest.hex()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, as parts of a sentence.

    Example:
        >>> then = {"targets": {"size": "4x1 numbers", "sha256": "ab"}, "predictor": {"loss": "mse"}}
        >>> differences(then, {"targets": {"size": "4x1 numbers", "sha256": "cd"}, "predictor": {"loss": "bce"}})
        ['targets differ', "loss 'mse' then, 'bce' now"]
    """
    found = []
    for key in [*now, *(key for key in then if key not in now)]:
        one, other = then.get(key, _MISSING), now.get(key, _MISSING)
        if one == other:
            continue
        if _is_group(one) and _is_group(other):
            parts = differences(one, other)
            found += [f"other {key} ({'; '.join(parts)})"] if key == SETTINGS else parts
        elif _MISSING in (one, other) and (_is_group(one) or _is_group(other)):
            found.append(f"no record of {key} {'then' if one is _MISSING else 'now'}")
        elif _is_digest(one) or _is_digest(other):
            sizes = [_shown(value) for value in (one, other)]
            verb = "differ" if key.endswith("s") else "differs"
            found.append(f"{key} {verb}" + (f" ({sizes[0]} then, {sizes[1]} now)" if sizes[0] != sizes[1] else ""))
        else:
            found.append(f"{key} {_shown(one)} then, {_shown(other)} now")
    return found


def _is_digest(value: Any) -> bool:
    return isinstance(value, Mapping) and "sha256" in value


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and "sha256" not in value


def _shown(value: Any) -> str:
    if value is _MISSING or value is None:
        return "none"
    return f"{value.get('size')}" if _is_digest(value) else f"{value!r:.80}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


class _Digest:
    """A SHA-256 over values of any kind; every value is written with its kind and size, so that no two run together."""

    def __init__(self, seen: dict[int, tuple[str, Any]] | None = None) -> None:
        self._sha = hashlib.sha256()
        self._seen = seen if seen is not None else {}

    def hex(self) -> str:
        """Return the digest of what was added so far."""
        return self._sha.hexdigest()

    def add(self, value: Any) -> None:
        """Add a value."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | Path):
            self._write(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
        elif isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            self._write(f"tensor {plain.dtype} {tuple(plain.shape)}", plain.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._write(
                f"array {value.dtype.str} {value.shape}", np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            )
        elif isinstance(value, np.generic):
            self.add(np.asarray(value))
        else:
            self._write("of", self._of(value).encode())

    def _of(self, value: Any) -> str:
        """Return the digest of a compound value, made once per object, as many networks share one symmetry."""
        if id(value) not in self._seen:
            self._seen[id(value)] = "a value inside itself", value  # kept alive, so that its id stays its own
            inner = _Digest(self._seen)
            inner._add_compound(value)
            self._seen[id(value)] = inner.hex(), value
        return self._seen[id(value)][0]

    def _write(self, kind: str, content: Any) -> None:
        self._sha.update(f"{kind} {len(content)}:".encode())
        self._sha.update(content)

    def _add_all(self, kind: str, values: Sequence[Any]) -> None:
        self._write(kind, str(len(values)).encode())
        for value in values:
            self.add(value)

    def _add_compound(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._add_all("mapping", [part for item in value.items() for part in item])
        elif isinstance(value, list | tuple):
            self._add_all("sequence", value)
        elif isinstance(value, set | frozenset):
            self._add_all("set", sorted(of_values(item) for item in value))
        elif isinstance(value, functools.partial):
            self._add_all("partial", [value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self._add_all("method", [value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif (
            dataclasses.is_dataclass(value) and not isinstance(value, type) and "__getstate__" not in vars(type(value))
        ):
            self._write("object", f"{type(value).__module__}.{type(value).__qualname__}".encode())
            # Fields that are no arguments are caches, which grow in use.
            fields = [field.name for field in dataclasses.fields(value) if field.init]
            self._add_all("fields", [getattr(value, name) for name in fields])
        elif isinstance(value, type) or not hasattr(value, "__dict__"):
            named = value if hasattr(value, "__qualname__") else type(value)
            self._write("name", f"{named.__module__}.{named.__qualname__}".encode())
        else:
            self._add_object(value)

    def _add_function(self, function: types.FunctionType) -> None:
        code = function.__code__
        rebound = {step.argval for step in dis.get_instructions(function) if step.opname == "STORE_DEREF"}
        closure = {
            name: cell.cell_contents
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
            if name not in rebound and _is_lasting(cell)
        }
        self._write("function", f"{function.__module__}.{function.__qualname__}".encode())
        self._add_code(code)
        self._add_all("closure", [function.__defaults__, function.__kwdefaults__, closure])

    def _add_code(self, code: types.CodeType) -> None:
        self._write("code", code.co_code)
        self._add_all("names", code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self.add(constant)

    def _add_object(self, value: Any) -> None:
        cls = type(value)
        own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
        state = value.__getstate__() if own and "__getstate__" in vars(cls) else vars(value)
        self._write("object", f"{cls.__module__}.{cls.__qualname__}".encode())
        self.add({name: part for name, part in state.items() if own or _lasts(part)})


def _is_lasting(cell: types.CellType) -> bool:
    try:
        return _lasts(cell.cell_contents)
    except ValueError:  # the cell is empty
        return False


def _lasts(value: Any) -> bool:
    """Return True for values that a function or an object is made with, not for ones that it may collect in its use."""
    if isinstance(value, tuple | frozenset):
        return all(_lasts(part) for part in value)
    plain = (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        Tensor,
        np.ndarray,
        np.generic,
        torch.dtype,
        Path,
        functools.partial,
    )
    own = type(value).__module__.partition(".")[0] == __name__.partition(".")[0]
    return value is None or own or isinstance(value, (*plain, types.FunctionType, types.MethodType, type))
