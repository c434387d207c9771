"""The weights among all that a checkpoint holds: the one mapping of names to tensors; several are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .content_tree import (
    MAX_DEPTH,
    MAX_TENSORS,
    RefusedContent,
    children,
    holding,
    is_container,
    is_module,
    is_optimiser,
    is_tensor,
    module_tensors,
)
from .errors import CheckpointError, shown, shown_list
from .numpy_values import array_form
from .pickled_values import Name, Placeholder
from .stored import Storage, StoredTensor

__all__ = ["NoWeights", "Weights", "choose_weights"]

BY_KEY = "choose with load_state_dict(path, key=...)"

_OPTIMISER = re.compile(r"(.*[_.-])?(optim|optims|optimi[sz]ers?|optimi[sz]er[_.-].*|optim[_.-].*)")
_BOOKKEEPING = re.compile(
    r"(.*[_.-])?(lr_?sched\w*|schedulers?|scheduler_state\w*|scaler|scaler_state\w*|amp|rng|rng_states?|random_states?|"
    r"callbacks?|loops|hyper_?parameters|hparams|args|config|metrics|history|logs|losses)"
)
_AVERAGE = re.compile(r"(.*[_.-])?(ema|swa|averaged?|shadow)([_.-].*)?|ema\w*|\w*ema")


class NoWeights(CheckpointError):
    """A checkpoint without tensors that could be weights."""


@dataclass
class Weights:
    """The weights of a checkpoint.

    Attributes:
        path: names that lead to them, joined by dots; "" at the top.
        tensors: by name.
        holder: the container that holds them.
        left_out: what else there is, by path, with the reason why it is not part of the weights.
    """

    path: str
    tensors: dict[str, Any]
    holder: Any
    left_out: dict[str, str] = field(default_factory=dict)


def choose_weights(content: Any, key: str | None = None, remedy: str = BY_KEY) -> Weights:
    """Return the weights of a checkpoint.

    Without `key`, the one container of tensors that is no optimiser's state or other bookkeeping, at any depth; a
    module that was pickled whole counts as its `state_dict`. A moving average of the same tensors, and numbers beside
    the weights, are left out. Several containers, or tensors both in a container and in one inside it, are refused.

    Args:
        content: mappings, sequences, tensors (in memory or `StoredTensor`) and placeholders.
        key: the path to the weights, names joined by dots; all tensors below it are taken, "" for all there are.
        remedy: what to do about several candidates, for the message.

    Raises:
        CheckpointError: no tensors, several candidates, tensors without names, no such key; without a file's name.
    """
    if not is_container(content):
        held = content.path if isinstance(content, Placeholder | Name) else _kind(content)
        raise CheckpointError(f"must hold a state_dict, got {held}; save state_dict()")
    search = _Search(content, remedy)
    try:
        return search.at(key) if key is not None else search.only()
    except RefusedContent as error:
        raise CheckpointError(f"refused, {error}; save the model's state_dict()") from error


def _kind(value: Any) -> str:
    return "a tensor" if is_tensor(value) else type(value).__name__


class _Search:
    def __init__(self, content: Any, remedy: str) -> None:
        self.content, self.remedy = content, remedy
        self.holding = holding(content)
        self.seen: set[int] = set()
        self.candidates: list[Weights] = []
        self.left_out: dict[str, str] = {}
        self.unnamed: list[tuple[str, str]] = []  # where tensors without names are, and in what
        self.optimiser = False

    # ------------------------------------------------------------------------------------------- the one candidate

    def only(self) -> Weights:
        self._explore(self.content, "", 0)
        found = [w for w in self.candidates if not _is_numbers(w)] or self.candidates
        self._leave(self.candidates, found, "numbers beside the weights")
        distinct: dict[tuple[Any, ...], Weights] = {}
        for weights in found:
            distinct.setdefault(_places(weights), weights)
        self._leave(found, list(distinct.values()), "the same tensors once more")
        found = _without_averages(list(distinct.values()))
        self._leave(list(distinct.values()), found, "a moving average of the weights")
        if len(found) > 1:
            listed = ", ".join(f"{_shown_path(w.path)} ({len(w.tensors)})" for w in found[:8])
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            raise CheckpointError(
                f"holds tensors in {len(found)} places, {listed}{more}, and it is not said which are the weights; "
                f"{self.remedy}"
            )
        if self.unnamed:
            path, kind = self.unnamed[0]
            chosen = f"; {self.remedy}" if found and found[0].path else ""
            raise CheckpointError(
                f"refused, it holds tensors without names in {kind} at {_shown_path(path)}"
                f"{chosen or '; save the state_dict() of the model'}"
            )
        if not found:
            raise NoWeights(f"holds {self._nothing()}; save the model's state_dict()")
        weights = found[0]
        weights.left_out = self._accounts(weights)
        return weights

    def _nothing(self) -> str:
        held = shown_list(name for name, _ in children(self.content) if name is not None) or "nothing"
        if self.optimiser or is_optimiser(self.content) or any(_is_optimiser_key(n) for n, _ in children(self.content)):
            return f"only an optimiser's state ({held})"
        what = f"an object of {self.content.path} and " if isinstance(self.content, Placeholder) else ""
        return f"{what}no tensors by name at any depth ({held})"

    def _leave(self, before: list[Weights], after: list[Weights], reason: str) -> None:
        for weights in before:
            if weights not in after:
                places = [weights.path] if weights.path else [*weights.tensors]
                self.left_out.update(dict.fromkeys(places, reason))

    def _accounts(self, weights: Weights) -> dict[str, str]:
        """Return what is left out beside the weights: at the top, on the way to them, and among them."""
        said = dict(self.left_out)
        known = _with_ancestors(said) | _with_ancestors(_joined(weights.path, name) for name in weights.tensors)
        value, path, rest = self.content, "", f"{weights.path}."
        while not is_module(value):
            following = None
            for name, inner in children(value):
                place = _joined(path, name)
                if value is not weights.holder and rest.startswith(f"{place}.") and is_container(inner):
                    following = place, inner
                elif place not in known:
                    said[place] = "tensors in another place" if id(inner) in self.holding else _reason(inner)
            if following is None:
                break
            path, value = following
        return said

    # --------------------------------------------------------------------------------------------------- the search

    def _explore(self, value: Any, path: str, depth: int) -> None:
        if id(value) in self.seen or id(value) not in self.holding:
            return
        self.seen.add(id(value))
        if depth > MAX_DEPTH:
            raise RefusedContent("its containers are nested too deeply")
        if is_module(value):
            tensors = module_tensors(value)
            if tensors:
                self.candidates.append(Weights(path, tensors, value))
            return
        leaves: dict[str, Any] = {}
        inside: list[tuple[str, Any]] = []
        sequence = isinstance(value, list | tuple)
        for name, inner in children(value):
            place = _joined(path, name)
            if is_tensor(inner):
                if name is None or sequence:
                    self._without_name(inner, path, value)
                else:
                    _put(leaves, name, inner)
            elif isinstance(inner, Storage):
                self.unnamed.append((path, _container_name(value)))
            elif not is_container(inner) or id(inner) not in self.holding:
                continue
            elif is_optimiser(inner) or _is_optimiser_key(name):
                self.optimiser = True
                self.left_out[place] = "an optimiser's state"
            elif name is not None and _BOOKKEEPING.fullmatch(name.lower()):
                self.left_out[place] = "bookkeeping of the training"
            elif not sequence and name is not None and (flat := _flat(inner, set())) is not None:
                for own, tensor in flat.items():
                    _put(leaves, f"{name}.{own}", tensor)
            else:
                inside.append((place, inner))
        if is_optimiser(value):
            self.optimiser = True
            return
        if leaves:
            self._check_arrays(value)
            self.candidates.append(Weights(path, leaves, value))
        for place, inner in inside:
            self._explore(inner, place, depth + 1)

    def _check_arrays(self, value: Any) -> None:
        for name, inner in children(value):
            array = array_form(inner)
            if array is not None and array.shape and array.dtype.kind in "fc":
                raise RefusedContent(
                    f"it holds an array of numpy, {shown(name)}, among tensors, which could be a weight"
                )

    def _without_name(self, tensor: Any, path: str, holder: Any) -> None:
        if tensor.ndim == 0:
            self.left_out[path] = "numbers beside the weights"
        else:
            self.unnamed.append((path, _container_name(holder)))

    # ------------------------------------------------------------------------------------------------ a chosen place

    def at(self, key: str) -> Weights:
        value = _descend(self.content, key)
        if is_module(value):
            tensors = module_tensors(value)
        else:
            tensors = {}
            self._gather(value, "", tensors, set(), 0)
        if not tensors:
            raise CheckpointError(f"holds no tensors at the key {shown(key)}")
        weights = Weights(key, tensors, value)
        weights.left_out = self._accounts(weights)
        return weights

    def _gather(self, value: Any, prefix: str, tensors: dict[str, Any], above: set[int], depth: int) -> None:
        if depth > MAX_DEPTH or id(value) in above:
            raise RefusedContent("its containers are nested too deeply or hold themselves")
        for name, inner in children(value):
            held = is_tensor(inner) or isinstance(inner, Storage) or id(inner) in self.holding
            if held and (name is None or isinstance(inner, Storage)):
                raise RefusedContent(f"it holds tensors without names in {_container_name(value)}")
            if is_tensor(inner):
                _put(tensors, f"{prefix}{name}", inner)
            elif is_module(inner):
                for own, tensor in module_tensors(inner, f"{prefix}{name}.").items():
                    _put(tensors, own, tensor)
            elif held:
                self._gather(inner, f"{prefix}{name}.", tensors, above | {id(value)}, depth + 1)
            if len(tensors) > MAX_TENSORS:
                raise RefusedContent(f"it has more than {MAX_TENSORS:,} tensors")


def _descend(value: Any, key: str) -> Any:
    """Return what the names of the key lead to; names may have dots themselves, and the key may end inside some."""
    rest = key
    while rest:
        if not is_container(value):
            break
        named = value.state["_modules"].items() if is_module(value) else children(value)
        fitting = [(n, v) for n, v in named if n is not None and (rest == n or rest.startswith(f"{n}."))]
        inside = {n[len(rest) + 1 :]: v for n, v in named if n is not None and n.startswith(f"{rest}.")}
        if not fitting and inside:  # the part of a state_dict, whose names have dots
            return inside
        if not fitting:
            raise CheckpointError(f"has no key {shown(key)}; there are {shown_list(n for n, _ in named if n)}")
        name, value = max(fitting, key=lambda item: len(item[0]))
        rest = rest[len(name) + 1 :]
    if not is_container(value):
        raise CheckpointError(f"holds {_kind(value)} at the key {shown(key)}, and no mapping of names to tensors")
    return value


def _flat(value: Any, seen: set[int]) -> dict[str, Any] | None:
    """Return the tensors of a sequence by their places in it, None if it holds other containers of tensors."""
    if not isinstance(value, list | tuple) or id(value) in seen or len(seen) > MAX_DEPTH:
        return None
    seen.add(id(value))
    tensors: dict[str, Any] = {}
    for i, inner in enumerate(value):
        if is_tensor(inner):
            tensors[str(i)] = inner
        elif is_container(inner) or isinstance(inner, Storage):
            deeper = _flat(inner, seen)
            if deeper is None:
                return None
            tensors.update({f"{i}.{own}": tensor for own, tensor in deeper.items()})
    return tensors


def _put(tensors: dict[str, Any], name: str, tensor: Any) -> None:
    if name in tensors:
        raise RefusedContent(f"it has two entries that are called {shown(name)}")
    tensors[name] = tensor


def _joined(path: str, name: str | None) -> str:
    name = "?" if name is None else name
    return f"{path}.{name}" if path else name


def _shown_path(path: str) -> str:
    return shown(path) if path else "the top"


def _container_name(value: Any) -> str:
    return f"an object of {value.path}" if isinstance(value, Placeholder) else f"a {type(value).__name__}"


def _is_numbers(weights: Weights) -> bool:
    """Return whether these can be no weights beside others: single numbers, and states of random generators."""
    return all(t.ndim == 0 or (t.ndim == 1 and not _is_floating(t)) for t in weights.tensors.values())


def _is_floating(tensor: Any) -> bool:
    return bool(tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _places(weights: Weights) -> tuple[Any, ...]:
    return tuple(
        (name, t.same_place() if isinstance(t, StoredTensor) else id(t)) for name, t in weights.tensors.items()
    )


def _without_averages(found: list[Weights]) -> list[Weights]:
    """Drop moving averages of other candidates: of the same names and shapes, under a key that says so."""
    averages = {id(w) for w in found if any(_AVERAGE.fullmatch(part.lower()) for part in w.path.split("."))}
    plain = [_shapes(w) for w in found if id(w) not in averages]
    return [w for w in found if id(w) not in averages or _shapes(w) not in plain]


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("module."): tuple(t.shape) for name, t in weights.tensors.items() if t.ndim}


def _is_optimiser_key(name: str | None) -> bool:
    return name is not None and _OPTIMISER.fullmatch(name.lower()) is not None


def _with_ancestors(paths: Iterable[str]) -> set[str]:
    """Return paths, and the paths of what they are in."""
    return {path[:end] for path in paths for end in [*(i for i, c in enumerate(path) if c == "."), len(path)]}


def _reason(value: Any) -> str:
    if is_tensor(value):
        return "a tensor beside the weights"
    if isinstance(value, Placeholder):
        return f"an object of {value.path}, which was not made"
    if isinstance(value, Name):
        return f"the name {value.path}, which was not looked up"
    if is_optimiser(value):
        return "an optimiser's state"
    return f"no tensor ({type(value).__name__})"
