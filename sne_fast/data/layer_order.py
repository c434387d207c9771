"""The order of layers by their names, which is the same for a module, its state_dict and every file of it.

Names are compared part by part. Inside one parent, known entries (embeddings, stems) come first and known exits (final
norms, heads) last, a normalisation stands behind the layer of the same number, families of blocks have the order of
their data flow, and all else stands in natural order, numbers by value. What is known is data, `layer_order.json`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["natural_key", "order_by_names"]

_FIRST, _MIDDLE, _LAST = range(3)
_STACKED = re.compile(r"_l([0-9]+)(_reverse)?$")
_BLOCKS = re.compile(r"(layer|block|stage|level|group|res|denseblock|features?|module)s?_?[0-9]+")
_FOLLOWS = (1,)
"""What the key of a normalisation adds to that of the layer it stands behind."""

_MAX_DEPTH = 64
_LONGEST_PART = 128

Key = tuple[Any, ...]


class _Pattern(NamedTuple):
    fits: re.Pattern[str]
    beside: tuple[tuple[str, ...], ...]


class _Family(NamedTuple):
    when: tuple[re.Pattern[str], ...]
    unless: re.Pattern[str] | None
    order: tuple[re.Pattern[str], ...]
    by_number: bool


class _Table(NamedTuple):
    entries: tuple[_Pattern, ...]
    exits: tuple[_Pattern, ...]
    middle: tuple[re.Pattern[str], ...]
    others: int
    families: tuple[_Family, ...]
    followers: dict[str, list[str]]
    unit: re.Pattern[str]
    norm: re.Pattern[str]
    recurrent: re.Pattern[str]


def natural_key(name: str) -> tuple[tuple[Any, ...], str]:
    """Return a sort key that compares numbers inside names by value, and letters without their case."""
    parts = re.split(r"([0-9]+)", name.lower())
    return tuple(_number(part) if i % 2 else part for i, part in enumerate(parts)), name


def _number(digits: str) -> tuple[int, str]:
    """Return a key that compares digits by value; `int` refuses those of thousands of digits."""
    digits = digits.lstrip("0")
    return len(digits), digits


def order_by_names(names: Sequence[str]) -> list[int]:
    """Return the positions of tensors in the order of their names, which must differ.

    The order depends on the set of names alone. Tensors of one layer stand together; a layer that owns tensors stands
    before the layers inside it.

    Args:
        names: full names, as `layer1.0.conv1.weight`.
    """
    return list(_order_by_names(tuple(names)))


@lru_cache(maxsize=256)  # the networks of a zoo have the same names
def _order_by_names(names: tuple[str, ...]) -> tuple[int, ...]:
    paths = [_path(name) for name in names]
    children: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        for depth in range(len(path) - 1):
            children.setdefault(path[:depth], set()).add(path[depth])

    def counts(parent: tuple[str, ...]) -> bool:
        return any(child.isdigit() for child in children.get(parent, ()))

    keys: dict[tuple[str, ...], Key] = {(): ()}
    for parent in sorted(children, key=len):
        inside = tuple(sorted((child, counts((*parent, child))) for child in children[parent]))
        for child, key in _keys_of_children(inside).items():
            path = (*parent, child)
            keys[path] = (*keys[parent], key)
    return tuple(sorted(range(len(names)), key=lambda i: (keys[paths[i][:-1]], _own_key(paths[i][-1]))))


def _path(name: str) -> tuple[str, ...]:
    """Return the parts of a name: those of the layer, of which a hostile name has one from a certain depth on."""
    layer, dot, own = name.rpartition(".")
    return (*layer.split(".", _MAX_DEPTH), own) if dot else (own,)


def _own_key(own: str) -> Key:
    """Return the key of a tensor inside its layer: weights, others, biases, running mean, running variance."""
    stacked = _STACKED.search(own)
    place = (_number(stacked[1]), bool(stacked[2])) if stacked else ((0, ""), False)
    name, own = own, {"gamma": "weight", "beta": "bias"}.get(own, own)  # older names of a normalisation's
    ranks = (own == "weight", "weight" in own, "bias" not in own and not own.startswith("running_"), "bias" in own)
    rank = ranks.index(True) if True in ranks else len(ranks)
    if own.startswith("weight_hr"):  # of projected states, which recurrent modules have behind their biases
        rank = len(ranks) - 1
    return place, rank, re.sub("_ih(?=_|$)", "_a", own), name  # recurrent modules: of inputs before of states


@lru_cache(maxsize=1024)
def _keys_of_children(inside: tuple[tuple[str, bool], ...]) -> dict[str, Key]:
    """Return the key of each part inside one parent; `inside` says of each whether it has numbered children."""
    table = _table()
    if all(part.isdigit() for part, _ in inside):
        return {part: (_MIDDLE, 0, natural_key(part)) for part, _ in inside}
    if any(len(part) > _LONGEST_PART for part, _ in inside):  # no name of a module, and long for the patterns
        return {part: (_MIDDLE, table.others, natural_key(part)) for part, _ in inside}
    siblings = _Siblings(inside, table)
    family = next((f for f in table.families if _fits(f, siblings.parts)), None)
    bases: dict[str, Key] = {}
    waiting: list[str] = []
    for part, _ in inside:
        low = _folded(part)
        place = _place_in_family(low, family) if family else None
        if place is not None:
            bases[part] = (_MIDDLE, -1, place, natural_key(part))
            continue
        bases[part] = (*_key(low, siblings, table), natural_key(part))
        if bases[part][0] != _LAST and siblings.layer_before(low) is not None:
            waiting.append(part)
    keys = dict(bases)
    for part in sorted(waiting, key=natural_key):
        # A norm that stands behind another norm stands behind the layer of that one.
        bases[part] = bases[siblings.parts[siblings.layer_before(_folded(part)) or part]]
        keys[part] = bases[part] + _FOLLOWS + (natural_key(part),)
    return keys


class _Siblings:
    """The parts inside one parent, in lower case and without underscores in front.

    Args:
        inside: each part, and whether it has numbered children.
        table: the known parts.
    """

    def __init__(self, inside: tuple[tuple[str, bool], ...], table: _Table) -> None:
        self.table = table
        self.parts = {_folded(part): part for part, _ in inside}
        self.blocks = any(numbered for _, numbered in inside) or _any(_BLOCKS, self.parts)
        self.recurrent = _any(table.recurrent, self.parts)
        self.decoder = _any(table.middle[-1], self.parts)
        self._whole: dict[str, str] = {}
        self._unit: dict[str, tuple[int, str]] = {}
        self._numbered: dict[str, list[tuple[Any, str]]] = {}
        for part in sorted(self.parts, key=natural_key):
            norm, unit = table.norm.search(part), table.unit.search(part)
            if number := re.fullmatch(r"(.*?)_?([0-9]+)", part):
                self._numbered.setdefault(number[1], []).append((_number(number[2]), part))
            if norm is None:
                self._whole.setdefault(part.replace("_", ""), part)
                if unit is not None:
                    rest = _without(part, unit)
                    rank = next(i for i, group in enumerate(unit.groups()) if group is not None)
                    # Without a number only where the norm surely stands behind: beside `fc` it may stand before.
                    if rest or re.search("conv|^proj$", part):
                        self._unit[rest] = min(
                            self._unit.get(rest, (rank, part)), (rank, part), key=lambda pair: pair[0]
                        )

    def alone(self, part: str) -> bool:
        """Return whether no sibling is this part with a number behind it."""
        return all(other == part for _, other in self._numbered.get(part, ()))

    def layer_before(self, part: str) -> str | None:
        """Return the sibling that a normalisation stands behind: that of the same number, else None."""
        norm = self.table.norm.search(part)
        if norm is None:
            return None
        rest = _without(part, norm)
        if rest and rest in self._whole:
            return self._whole[rest]
        unit = self._unit[rest][1] if rest in self._unit else None
        if unit is not None and "conv" in unit:
            return unit
        follower = next((other for other in self.table.followers.get(part, ()) if other in self.parts), None)
        return follower or unit or self._one_less(part)

    def _one_less(self, part: str) -> str | None:
        """Return the sibling of the same word with the next lower number, else None."""
        number = re.fullmatch(r"(.*?)_?([0-9]+)", part)
        if number is None:
            return None
        others = self._numbered[number[1]]
        place = bisect_left(others, (_number(number[2]), ""))
        return others[place - 1][1] if place else None


def _without(part: str, found: re.Match[str]) -> str:
    return (part[: found.start()] + part[found.end() :]).replace("_", "")


def _key(part: str, siblings: _Siblings, table: _Table) -> Key:
    for i, pattern in enumerate(table.exits):
        if pattern.fits.fullmatch(part) and _holds(pattern, part, siblings):
            return _LAST, i
    for i, pattern in enumerate(table.entries):
        if pattern.fits.fullmatch(part) and _holds(pattern, part, siblings):
            return _FIRST, i
    for i, fits in enumerate(table.middle):
        if fits.fullmatch(part):
            return _MIDDLE, i if i < table.others else i + 1
    return _MIDDLE, table.others


def _holds(pattern: _Pattern, part: str, siblings: _Siblings) -> bool:
    true = {
        "blocks": siblings.blocks,
        "recurrent": siblings.recurrent,
        "decoder": siblings.decoder,
        "alone": siblings.alone(part),
    }
    return not pattern.beside or any(all(true[word] for word in words) for words in pattern.beside)


def _fits(family: _Family, parts: Iterable[str]) -> bool:
    return all(_any(pattern, parts) for pattern in family.when) and not (family.unless and _any(family.unless, parts))


def _place_in_family(part: str, family: _Family) -> Key | None:
    for i, pattern in enumerate(family.order):
        if pattern.fullmatch(part):
            number = re.search(r"[0-9]+", part)
            return (_number(number[0] if number else ""), i) if family.by_number else (i,)
    return None


def _folded(part: str) -> str:
    return part.lower().lstrip("_") or part


def _any(pattern: re.Pattern[str], parts: Iterable[str]) -> bool:
    return any(pattern.fullmatch(part) for part in parts)


@cache
def _table() -> _Table:
    text = resources.files(__package__).joinpath("layer_order.json").read_text(encoding="utf-8")
    raw: dict[str, Any] = json.loads(text)

    def patterns(entries: list[dict[str, Any]]) -> tuple[_Pattern, ...]:
        return tuple(
            _Pattern(re.compile(entry["parts"]), tuple(tuple(words.split()) for words in entry.get("beside", ())))
            for entry in entries
        )

    others = raw["middle"].index("others")
    return _Table(
        entries=patterns(raw["entries"]),
        exits=patterns(raw["exits"]),
        middle=tuple(re.compile(pattern) for pattern in raw["middle"] if pattern != "others"),
        others=others,
        families=tuple(
            _Family(
                tuple(map(re.compile, family["when"])),
                re.compile(family["unless"]) if "unless" in family else None,
                tuple(map(re.compile, family["order"])),
                family.get("by_number", False),
            )
            for family in raw["families"]
        ),
        followers=raw["followers"],
        unit=re.compile("|".join(f"({word})" for word in raw["units"])),
        norm=re.compile("(?<![a-z])(" + "|".join(raw["norms"]) + ")(?!(?!s$)[a-z])"),  # also lists: bns
        recurrent=re.compile("|".join(raw["recurrent"])),
    )
