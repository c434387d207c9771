"""What a checkpoint holds as a tree: containers, and tensors by the path of names that leads to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .numpy_values import array_form
from .pickled_values import Placeholder
from .stored import Storage, StoredTensor

__all__ = [
    "arrays_as_tensors",
    "children",
    "holding",
    "is_container",
    "is_module",
    "is_optimiser",
    "is_tensor",
    "module_tensors",
    "text_of",
]

MAX_DEPTH = 100
MAX_TENSORS = 1_000_000
MAX_MODULES = 100_000


class RefusedContent(Exception):
    """Content in which the weights cannot be told or named; the message ends a sentence."""


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
            raise RefusedContent("its modules are nested too deeply or are too many")
        for key, value in _own_tensors(one):
            if not is_tensor(value) or not isinstance(key, str):
                raise RefusedContent(f"its module {one.path} has a parameter or buffer that is no tensor")
            found[prefix + key] = value
        inside = [(key, inner) for key, inner in one.state["_modules"].items() if inner is not None]
        for key, inner in reversed(inside):
            if not is_module(inner) or not isinstance(key, str):
                raise RefusedContent(f"its module {one.path} has a part whose tensors have no names")
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
    own = [*module.state["_parameters"].items(), *kept, *_packed_tensors(module)]
    return [(key, value) for key, value in own if value is not None]


def _packed_tensors(module: Placeholder) -> list[tuple[str, Any]]:
    """Return weight and bias that a quantised linear layer keeps in an object of C++, named as in its `state_dict`."""
    found: list[tuple[str, Any]] = []
    for key, value in module.state.items():
        if not isinstance(value, Placeholder) or value.path != "torch.ScriptObject" or not holding(value):
            continue
        packed = value.state[0] if isinstance(value.state, tuple) and value.state else None
        if not isinstance(packed, tuple) or len(packed) != 2 or not is_tensor(packed[0]) or not isinstance(key, str):
            raise RefusedContent(f"its module {module.path} keeps tensors in an object of C++ that is not read")
        found += [(f"{key}.0", packed[0]), (f"{key}.1", packed[1])]
    return found


def arrays_as_tensors(content: Any) -> Any:
    """Return what a pickle holds with tensors for its arrays of numpy, if it has no other tensors.

    Its containers are changed in place.
    """
    return _with_arrays(content, {}, 0) if is_container(content) and not holding(content) else content


def _with_arrays(value: Any, made: dict[int, Any], depth: int) -> Any:
    """Return a container with tensors for its arrays of numpy; what it shares stays shared."""
    if depth > MAX_DEPTH:
        raise RefusedContent("its containers are nested too deeply")
    if id(value) in made:
        return made[id(value)]
    made[id(value)] = value
    array = array_form(value)
    if array is not None:
        if len(array.data) > 1 and id(array.data) in made:
            raise RefusedContent("it holds two arrays of numpy over the same bytes")
        made[id(array.data)] = array.data
        made[id(value)] = array.tensor()
    elif isinstance(value, dict):
        for key, inner in value.items():
            value[key] = _with_arrays(inner, made, depth + 1)
    elif isinstance(value, list):
        value[:] = [_with_arrays(inner, made, depth + 1) for inner in value]
    elif isinstance(value, tuple):
        made[id(value)] = tuple(_with_arrays(inner, made, depth + 1) for inner in value)
    elif isinstance(value, Placeholder):
        value.state, value.items, value.entries, value.arguments = (
            _with_arrays(inner, made, depth + 1) for inner in (value.state, value.items, value.entries, value.arguments)
        )
    return made[id(value)]
