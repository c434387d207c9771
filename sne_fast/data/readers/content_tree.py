"""What a checkpoint holds as a tree: containers, and tensors by the path of names that leads to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .pickled_values import Placeholder
from .stored import Storage, StoredTensor

__all__ = ["children", "holding", "is_container", "is_module", "is_optimiser", "is_tensor", "module_tensors", "text_of"]

MAX_DEPTH = 100
MAX_TENSORS = 1_000_000
MAX_MODULES = 100_000


class TooDeep(Exception):
    """Containers nested deeper than any checkpoint; the message ends a sentence."""


def is_tensor(value: Any) -> bool:
    """Return whether the value is a tensor, in memory or in a file."""
    return isinstance(value, Tensor | StoredTensor)


def is_container(value: Any) -> bool:
    """Return whether the value can hold others."""
    return isinstance(value, Mapping | list | tuple | Placeholder) and not isinstance(value, str)


def is_module(value: Any) -> bool:
    """Return whether the value is a module that was pickled whole."""
    state = value.state if isinstance(value, Placeholder) else None
    return (
        isinstance(state, dict)
        and isinstance(state.get("_modules"), dict)
        and isinstance(state.get("_parameters"), dict)
    )


def is_optimiser(value: Any) -> bool:
    """Return whether the value is the state of an optimiser, or an optimiser that was pickled whole."""
    if isinstance(value, Placeholder):
        value = value.state
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def text_of(key: Any) -> str | None:
    """Return a key as part of a name, None where it cannot be one."""
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    return key.decode("ascii") if isinstance(key, bytes) and key.isascii() else None


def children(value: Any) -> list[tuple[str | None, Any]]:
    """Return what a container holds, each with its name; None where it has no name."""
    if isinstance(value, Mapping):
        return [(text_of(key), inner) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [(str(i), inner) for i, inner in enumerate(value)]
    named = [(text_of(key), inner) for key, inner in value.items.items()]
    known = {id(inner) for _, inner in named}
    states = value.state if isinstance(value.state, tuple) and len(value.state) == 2 else (value.state,)
    for state in states:
        if isinstance(state, dict):  # attributes; dicts that allow access by attributes have all entries twice
            named += [(text_of(key), inner) for key, inner in state.items() if id(inner) not in known]
        elif state is not None:
            named.append((None, state))
    named += [(str(i), inner) for i, inner in enumerate(value.entries)]
    return named + [(None, inner) for inner in value.arguments]


def holding(root: Any) -> set[int]:
    """Return the ids of the containers that hold tensors, however deep; storages without a tensor count too."""
    above: dict[int, list[int]] = {}
    waiting, seen, found = [root], {id(root)}, []
    while waiting:
        value = waiting.pop()
        for _, inner in children(value):
            if is_tensor(inner) or isinstance(inner, Storage):
                found.append(id(value))
            elif is_container(inner):
                above.setdefault(id(inner), []).append(id(value))
                if id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append(inner)
    held: set[int] = set()
    while found:
        one = found.pop()
        if one not in held:
            held.add(one)
            found += above.get(one, [])
    return held


def module_tensors(module: Placeholder, prefix: str = "") -> dict[str, Any]:
    """Return the `state_dict` of a module that was pickled whole, by its parameters, buffers and modules."""
    found: dict[str, Any] = {}
    waiting, visits = [(module, prefix)], 0
    while waiting:
        one, prefix = waiting.pop()
        visits += 1
        if visits > MAX_MODULES or len(found) > MAX_TENSORS or prefix.count(".") > MAX_DEPTH:
            raise TooDeep("its modules are nested too deeply or are too many")
        for key, value in _own_tensors(one):
            if not is_tensor(value) or not isinstance(key, str):
                raise TooDeep(f"its module {one.path} has a parameter or buffer that is no tensor")
            found[prefix + key] = value
        inside = [(key, inner) for key, inner in one.state["_modules"].items() if inner is not None]
        for key, inner in reversed(inside):
            if not is_module(inner) or not isinstance(key, str):
                raise TooDeep(f"its module {one.path} has a part whose tensors have no names")
            waiting.append((inner, f"{prefix}{key}."))
    return found


def _own_tensors(module: Placeholder) -> list[tuple[Any, Any]]:
    """Return the parameters of one module and the buffers that its `state_dict` has."""
    temporary = module.state.get("_non_persistent_buffers_set")
    names: list[Any] = []
    if isinstance(temporary, Placeholder):
        names = [*temporary.entries, *(name for made in temporary.arguments if isinstance(made, list) for name in made)]
    left_out = {name for name in names if isinstance(name, str)}
    buffers = module.state.get("_buffers")
    entries = buffers.items() if isinstance(buffers, dict) else ()
    kept = [(key, value) for key, value in entries if key not in left_out]
    return [(key, value) for key, value in [*module.state["_parameters"].items(), *kept] if value is not None]
