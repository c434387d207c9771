"""The weights of a TorchScript program: tensors of its tree of modules, or constants of one that was frozen.

The program is not run. Its archive holds the modules as pickled objects, whose tensors are found by the names of
attributes, and its source, of which only the lists of parameters and buffers at the head of each class are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .chosen_weights import NoWeights, Weights
from .content_tree import MAX_DEPTH, MAX_MODULES, MAX_TENSORS, RefusedContent, holding, is_container, is_tensor
from .errors import CheckpointError, shown
from .pickled_values import Placeholder
from .script_constants import constant_names

__all__ = ["SCRIPT_NAMES", "Script", "script_weights"]

_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n(?:  __parameters__ = \[([^\]\n]*)\]\n)?(?:  __buffers__ = \[([^\]\n]*)\]\n)?",
    re.MULTILINE,
)
_OBJECT = "__torch__.torch.classes."  # of C++, such as packed weights
_ATTRIBUTE = "attribute of the program"
_STATISTICS = frozenset({"running_mean", "running_var"})
_FROZEN = _STATISTICS | {"weight", "bias"}  # of a normalisation that was frozen, in which all are buffers
_CONSTANT = "constant of the program"


def _first(*arguments: Any) -> Any:
    return arguments[0] if arguments else None


SCRIPT_NAMES = {
    f"torch.jit._pickle.{name}": _first
    for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
}
"""Names in the pickles of programs, which return what they are given."""


@dataclass
class Script:
    """A TorchScript program: its tree of modules, its constants, and its source by path below `code/`."""

    root: Any
    constants: Any
    sources: Mapping[str, str]


@dataclass
class _Found:
    declared: Mapping[str, frozenset[str]]
    holding: set[int]
    tensors: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    modules: int = 0


def _declared_tensors(sources: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Return the parameters and running statistics of each class, by its path, from the source of a program.

    Args:
        sources: paths of files below `code/`, such as `__torch__/torch/nn/modules/linear.py`, and their text.
    """
    found = {}
    for path, text in sources.items():
        module = path.removesuffix(".py").replace("/", ".")
        for name, *lists in _CLASS.findall(text):
            parameters, buffers = (frozenset(re.findall(r'"([^"]*)"', text)) for text in lists)
            normalises = buffers >= _STATISTICS
            found[f"{module}.{name}"] = parameters | buffers & (_FROZEN if normalises else _STATISTICS)
    return found


def script_weights(script: Script, key: str | None = None) -> Weights:
    """Return the parameters of a program by name, and the running mean and variance of its normalisations.

    A program that was frozen has its weights among its constants, whose names are those of `constant_names`. The
    constants of another are left out, and so are other buffers and attributes. Where the archive has no source,
    all tensors of modules are taken.

    Args:
        script: the program.
        key: the name of a module inside it; None or "" for all.

    Raises:
        RefusedContent: weights in objects of C++, modules nested too deeply.
        CheckpointError: no such module, no tensors.
    """
    found = _Found(_declared_tensors(script.sources), holding(script.root) if is_container(script.root) else set())
    _walk(script.root, "", found, frozenset())
    constants = script.constants if isinstance(script.constants, tuple) else ()
    numbers: dict[str, Any] = {}
    names = constant_names(constants, script.sources.values())
    for i, value in enumerate(constants):
        if is_tensor(value):
            numbers[names[i]] = value
        elif is_container(value) and holding(value):
            raise RefusedContent(f"its constant {i} keeps tensors in {_shown(value)}")
    if _count(numbers) > _count(found.tensors):
        found.tensors.update(numbers)
    else:
        found.left_out.update({f"constants.{name}": _CONSTANT for name in numbers})
    if key:
        inside = {name: tensor for name, tensor in found.tensors.items() if name.startswith(f"{key}.")}
        if not inside:
            raise CheckpointError(f"holds a TorchScript program without tensors in a module {shown(key)}")
        beside = found.tensors.keys() - inside.keys()
        found.left_out.update(dict.fromkeys(beside, "a tensor beside the weights"))
        found.tensors = {name[len(key) + 1 :]: tensor for name, tensor in inside.items()}
    if not found.tensors:
        raise NoWeights("holds a TorchScript program without parameters")
    return Weights(key or "", found.tensors, script.root, found.left_out)


def _walk(module: Any, prefix: str, found: _Found, above: frozenset[int]) -> None:
    """Add the tensors of a module and those inside it, in the order in which they are stored."""
    found.modules += 1
    if len(above) > MAX_DEPTH or found.modules > MAX_MODULES or len(found.tensors) > MAX_TENSORS:
        raise RefusedContent("its modules are nested too deeply or are too many")
    if not isinstance(module, Placeholder) or not isinstance(module.state, dict):
        raise RefusedContent("its modules are stored in another way than TorchScript's own")
    declared, above = found.declared.get(module.path), above | {id(module)}
    inside = []
    for own, value in module.state.items():
        if not isinstance(own, str):
            raise RefusedContent("it has an attribute whose name is no text")
        name = prefix + own
        if is_tensor(value):
            if declared is None or own in declared:
                found.tensors[name] = value
            else:
                found.left_out[name] = _ATTRIBUTE
        elif id(value) not in found.holding:
            continue
        elif isinstance(value, Placeholder) and isinstance(value.state, dict):
            inside.append((name, value))
        elif isinstance(value, Placeholder):
            _packed(value, name, found)
        else:
            found.left_out[name] = _ATTRIBUTE
    for name, value in inside:
        if id(value) not in above:
            _walk(value, f"{name}.", found, above)


def _packed(value: Placeholder, name: str, found: _Found) -> None:
    """Add weight and bias of a quantised linear layer, which an object of C++ holds, named as in its `state_dict`."""
    state = value.state
    fits = value.path.startswith(_OBJECT) and "Linear" in value.path and isinstance(state, tuple) and len(state) == 2
    if not fits or not is_tensor(state[0]) or not (state[1] is None or is_tensor(state[1])):
        raise RefusedContent(f"it keeps tensors of {shown(name)} in {_shown(value)}")
    found.tensors.update({f"{name}.{i}": tensor for i, tensor in enumerate(state) if tensor is not None})


def _shown(value: Any) -> str:
    kind = f"an object of {value.path.removeprefix('__torch__.')}" if isinstance(value, Placeholder) else "a container"
    return f"{kind}, which is not read"


def _count(tensors: Mapping[str, Any]) -> int:
    """Return the number of floating values."""
    return sum(t.count() for t in tensors.values() if t.dtype.is_floating_point or t.dtype.is_complex)
