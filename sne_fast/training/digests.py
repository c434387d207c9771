"""Digests of values of any kind, and of the code of functions and classes with the values that it reads."""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PACKAGE = __name__.partition(".")[0]


def of_values(value: Any, home: Collection[str] = ()) -> str:
    """Return the digest of plain values, tensors, arrays, modules, and sequences and mappings of them.

    Functions and classes count by their names. An object counts by its class and its attributes: all of them where its
    class is of this package or of one in `home`, else those that cannot change.

    Args:
        value: what the digest is of.
        home: names of the packages whose objects are looked into.
    """
    digest = Digest(home)
    digest.add(value)
    return digest.hex()


def home_of(value: Any) -> str:
    """Return the name of the package that a function, or the class of an object, is of."""
    while isinstance(value, functools.partial | types.MethodType):
        value = value.func if isinstance(value, functools.partial) else value.__self__
    named = value if isinstance(value, types.FunctionType | type) else type(value)
    return str(named.__module__).partition(".")[0]


def what_decides(value: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the code that a call of `value` runs, and the values that this code reads, by name.

    Code of this package and of libraries counts by its name; that of the package of `value` is followed through its
    functions and classes.
    """
    found = _Code({home_of(value), "__main__"} - {_PACKAGE, "torch", "builtins"})
    found.add_called("", value)
    return found.code, found.values


class _Code:
    """Code of functions and classes of some packages, and the values that it reads."""

    def __init__(self, home: set[str]) -> None:
        self.code: list[Any] = []
        self.values: dict[str, Any] = {}
        self._home = home
        self._seen: list[Any] = []

    def add_called(self, name: str, value: Any) -> None:
        """Add what is called."""
        if isinstance(value, functools.partial):
            self.add_called(name, value.func)
            arguments = {**{str(i): part for i, part in enumerate(value.args)}, **value.keywords}
            for key, part in arguments.items():
                self._add(f"{name}argument {key}", part)
        elif isinstance(value, types.MethodType):
            self.add_called(name, value.__self__)
            if isinstance(value.__func__, types.FunctionType):
                self._add_function(value.__func__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type) or not self._is_home(type(value)):
            self._add_class(value if isinstance(value, type) else type(value))
            if not isinstance(value, type):
                self.values[f"{name}object"] = value
        else:
            self._add_class(type(value))
            for key, part in attributes(value).items():
                self._add(f"{name}{key}", part)

    def _is_home(self, value: Any) -> bool:
        return str(value.__module__).partition(".")[0] in self._home

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, functools.partial | types.MethodType):
            self.add_called(f"{name}.", value)
        else:
            if self._is_home(type(value)):
                self._add_class(type(value))
            self.values[name] = value

    def _is_new(self, value: Any) -> bool:
        self.code.append(f"{value.__module__}.{value.__qualname__}")
        if not self._is_home(value) or any(value is one for one in self._seen):
            return False
        self._seen.append(value)
        return True

    def _add_function(self, function: types.FunctionType) -> None:
        if not self._is_new(function):
            return
        name = function.__qualname__
        read: set[str] = set()
        for code in _codes_of(function.__code__):
            constants = [one for one in code.co_consts if not isinstance(one, types.CodeType)]
            self.code.append([code.co_code, code.co_names, constants])
            loads = (step for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
            read.update(step.argval for step in loads)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        outer = {key: cell.cell_contents for key, cell in cells if _is_filled(cell)}
        outer |= {key: function.__globals__[key] for key in sorted(read) if key in function.__globals__}
        defaults = {str(i): part for i, part in enumerate(function.__defaults__ or ())}
        defaults |= function.__kwdefaults__ or {}
        for key, part in outer.items():
            self._add(f"{name}: {key}", part)
        for key, part in defaults.items():
            self._add(f"{name}: default {key}", part)

    def _add_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not self._is_new(base):
                continue
            for key, part in vars(base).items():
                inner = part.__func__ if isinstance(part, classmethod | staticmethod) else part
                inner = inner.fget if isinstance(inner, property) else inner
                if isinstance(inner, types.FunctionType):
                    if inner.__code__.co_filename != "<string>":  # those of a dataclass follow from its fields
                        self._add_function(inner)
                elif not key.startswith("__") and not isinstance(inner, types.MemberDescriptorType):
                    self._add(f"{base.__qualname__}.{key}", inner)


def _codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_of(constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, also those in slots; of a dataclass those that are arguments."""
    if dataclasses.is_dataclass(value):  # fields that are no arguments are caches, which grow in use
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    slots = (
        key
        for base in type(value).__mro__
        for key, part in vars(base).items()
        if isinstance(part, types.MemberDescriptorType) and hasattr(value, key)
    )
    return {**{key: getattr(value, key) for key in slots}, **getattr(value, "__dict__", {})}


class Digest:
    """A SHA-256 over values of any kind; every value is written with its kind and size, so that no two run together."""

    def __init__(self, home: Collection[str] = (), seen: dict[int, tuple[str, Any]] | None = None) -> None:
        self._sha = hashlib.sha256()
        self._home = home
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
            inner = Digest(self._home, self._seen)
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
        elif isinstance(value, list | tuple | deque):
            self._add_all("sequence", list(value))
        elif isinstance(value, set | frozenset):
            self._add_all("set", sorted(of_values(item, self._home) for item in value))
        elif isinstance(value, functools.partial):
            self._add_all("partial", [value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self._add_all("method", [value.__func__, value.__self__])
        elif isinstance(value, types.ModuleType):
            self._write("module", value.__name__.encode())
        elif isinstance(value, types.FunctionType | type) or not (hasattr(value, "__dict__") or self._is_home(value)):
            named = value if hasattr(value, "__qualname__") else type(value)
            self._write("name", f"{named.__module__}.{named.__qualname__}".encode())
        else:
            self._add_object(value)

    def _is_home(self, value: Any) -> bool:
        return str(type(value).__module__).partition(".")[0] in self._home

    def _add_object(self, value: Any) -> None:
        cls = type(value)
        self._write("object", f"{cls.__module__}.{cls.__qualname__}".encode())
        own = cls.__module__.partition(".")[0] == _PACKAGE
        if own and "__getstate__" in vars(cls):
            self.add(value.__getstate__())
        elif isinstance(value, nn.Module) and not self._is_home(value):
            self.add([(name, type(part).__qualname__, part.extra_repr()) for name, part in value.named_modules()])
            self.add(dict(value.state_dict()))
        else:
            deep = own or self._is_home(value) or dataclasses.is_dataclass(value)
            self.add({name: part for name, part in attributes(value).items() if deep or _lasts(part)})


def _lasts(value: Any) -> bool:
    """Return True for values that an object is made with, not for ones that it may collect in its use."""
    if isinstance(value, tuple | frozenset):
        return all(_lasts(part) for part in value)
    plain = (bool, int, float, complex, str, bytes, Tensor, np.ndarray, np.generic, torch.dtype, Path)
    return value is None or isinstance(value, plain) or type(value).__module__.partition(".")[0] == _PACKAGE
