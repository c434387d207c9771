"""Copies of a network inside one state_dict: moving averages of its weights, and pairs such as student and teacher."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor

from .known_names import WRAPPER_PARTS
from .tied_names import identity_of

__all__ = ["averaged_copies", "refuse_pairs"]

_WRAPPERS = {"module", *WRAPPER_PARTS}
_AVERAGED_PARTS = {"shadow", "shadow_params", "averaged_model", "swa_model"}
_FILLERS = {"model", "module", "net", "network", "params", "weights", "state"}  # words of a part that names no network
_BOOKKEEPING = re.compile(r"(^|\.)(decay|min_decay|num_updates|n_averaged|steps?|initted|optimization_step)$")

_PAIRS = (
    ("student", "teacher"),
    ("model", "teacher"),
    ("online", "target"),
    ("encoder_q", "encoder_k"),
    ("query_encoder", "key_encoder"),
    ("base_encoder", "momentum_encoder"),
    ("policy_net", "target_net"),
    ("q_network", "target_network"),
)
"""Names of a network and its copy; also in front of other words, as in `online_encoder` and `target_encoder`."""
_COPIES = ("{}_momentum", "momentum_{}", "{}_target", "target_{}", "{}_m")
"""What the copy of a network `{}` is called."""


def averaged_copies(tensors: Mapping[str, Tensor], label: str) -> dict[str, str]:
    """Return the names of moving averages of other tensors, with the reason to leave them out.

    A name is one of an average by a part such as `ema`, `model_ema` or `ema_encoder`. It is left out if the tensor
    without that part is there in the same shape, also if dots are missing in the average's name.

    Raises:
        ValueError: some tensors of an average have a counterpart and others have none.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        marked = _marked_part(name)
        if marked is None:
            plain[name] = tensor
        else:
            groups.setdefault(marked, {})[name] = tensor
    found = {
        name: "setting of a moving average"
        for group in groups.values()
        for name, tensor in group.items()
        if tensor.numel() == 1 and _BOOKKEEPING.search(name)
    }
    by_letters = _by_letters(plain) if groups else {}
    for marked, group in groups.items() if plain else ():
        averages = {name: tensor for name, tensor in group.items() if name not in found}
        partners = {name: _partner(name, marked, tensor, by_letters, plain) for name, tensor in averages.items()}
        known = [partner for partner in partners.values() if partner is not None]
        if len(known) < len(averages) and _in_order(averages, plain):
            known = list(averages)
        if not known and not _is_certain(marked):
            continue  # a module that is called so
        if len(known) < len(averages) or len(set(known)) < len(known):
            odd = next((name for name, partner in partners.items() if partner is None), next(iter(group)))
            raise ValueError(
                f"pack: {label} holds moving averages under {marked!r} that are no copy of its other tensors "
                f"({odd!r} has no counterpart of its shape); pass one of the two alone, e.g. by --key"
            )
        for name in averages:
            found[name] = f"EMA copy: the weights themselves are taken; pass {marked!r} alone, e.g. by --key, for these"
    return found


def refuse_pairs(tensors: Mapping[str, Tensor], label: str) -> None:
    """Refuse two groups of tensors with the same names and shapes under names that are known to be copies.

    Raises:
        ValueError: such groups; the message names both.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if len(parts) > 1:
            groups.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
    for first, group in groups.items():
        for second in _copies_of(first):
            other = groups.get(second, {})
            same = [_is_copy(group[n], t) for n, t in other.items() if n in group]
            if other and len(same) == len(other) and all(same):
                raise ValueError(
                    f"pack: {label} holds two copies of a network, {first!r} and {second!r}; pass one of them alone, "
                    f"e.g. by --key"
                )


def _is_copy(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and identity_of(one) != identity_of(other)


def _copies_of(part: str) -> list[str]:
    names = [copy.format(part) for copy in _COPIES]
    for first, second in _PAIRS:
        if part == first or part.startswith(f"{first}_"):
            names.append(second + part.removeprefix(first))
        elif part.endswith(f"_{first}"):
            names.append(part.removesuffix(first) + second)
    return names


def _by_letters(plain: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return names by their letters without dots, whole and without their first part."""
    found: dict[str, list[str]] = {}
    for name in plain:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        found.setdefault("".join(parts), []).insert(0, name)
        if len(parts) > 1:
            found.setdefault("".join(parts[1:]), []).append(name)
    return found


@lru_cache(1 << 16)
def _marked_part(name: str) -> str | None:
    """Return a name up to and with its part that marks a moving average, or None."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in _AVERAGED_PARTS or "ema" in part.lower().split("_"):
            return ".".join(parts[: i + 1])
    return None


def _words(marked: str) -> list[str]:
    """Return the words of a marking part besides the mark."""
    part = marked.rpartition(".")[2]
    return [] if part in _AVERAGED_PARTS else [word for word in part.split("_") if word.lower() != "ema"]


def _is_certain(marked: str) -> bool:
    """Return whether the name says that a whole network is averaged, as `model_ema` does and `ema` does not."""
    part = marked.rpartition(".")[2]
    return part in _AVERAGED_PARTS or bool(_words(marked) and set(_words(marked)) <= _FILLERS)


def _partner(
    name: str, marked: str, tensor: Tensor, by_letters: Mapping[str, list[str]], plain: Mapping[str, Tensor]
) -> str | None:
    """Return the tensor of which `name` is the average: the same name without the mark, of the same shape."""
    before, dot, _ = marked.rpartition(".")
    words, behind = _words(marked), name[len(marked) :]
    candidates = [before + dot + "_".join(words) + behind]
    if all(word.lower() in _FILLERS for word in words):
        candidates.append(before + behind)
    for candidate in candidates:
        parts = [part for part in candidate.split(".") if part not in _WRAPPERS]
        for partner in by_letters.get("".join(parts), ()):
            if plain[partner].shape == tensor.shape:
                return partner
    return None


def _in_order(averages: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> bool:
    """Return whether numbered averages have the shapes of other tensors, in their order."""
    if not averages or not all(name.rpartition(".")[2].isdigit() for name in averages):
        return False
    shapes = iter(tensor.shape for tensor in plain.values())
    return all(tensor.shape in shapes for tensor in averages.values())
