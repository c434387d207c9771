"""The order of layers by their names, which is the same for a module, its state_dict and every file of it.

Names are compared part by part. Inside one parent, known entries (embeddings, stems) come first and known exits (final
norms, heads) last, a normalisation stands behind the layer of the same number, families of blocks have the order of
their data flow, and all else stands in natural order, numbers by value. What is known is data, `layer_order.json`.
"""

from __future__ import annotations

import json
import re
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

Key = tuple[Any, ...]


class _Pattern(NamedTuple):
    fits: re.Pattern[str]
    beside: tuple[tuple[str, ...], ...]


class _Family(NamedTuple):
    when: tuple[re.Pattern[str], ...]
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
    paths = [tuple(name.split(".")) for name in names]
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
            keys[(*parent, child)] = (*keys[parent], key)
    return sorted(range(len(names)), key=lambda i: (keys[paths[i][:-1]], _own_key(paths[i][-1])))


def _own_key(own: str) -> Key:
    """Return the key of a tensor inside its layer: weights, others, biases, running mean, running variance."""
    stacked = _STACKED.search(own)
    place = (_number(stacked[1]), bool(stacked[2])) if stacked else ((0, ""), False)
    ranks = (own == "weight", "weight" in own, "bias" not in own and not own.startswith("running_"), "bias" in own)
    rank = ranks.index(True) if True in ranks else len(ranks)
    if own.startswith("weight_hr"):  # of projected states, which recurrent modules have behind their biases
        rank = len(ranks) - 1
    return place, rank, re.sub("_ih(?=_|$)", "_a", own)  # a layer's own order: input before hidden


@lru_cache(maxsize=4096)
def _keys_of_children(inside: tuple[tuple[str, bool], ...]) -> dict[str, Key]:
    """Return the key of each part inside one parent; `inside` says of each whether it has numbered children."""
    table = _table()
    if all(part.isdigit() for part, _ in inside):
        return {part: (_MIDDLE, 0, natural_key(part)) for part, _ in inside}
    siblings = {part.lower(): part for part, _ in inside}
    blocks = any(numbered for _, numbered in inside) or any(_BLOCKS.fullmatch(part) for part in siblings)
    family = next((f for f in table.families if all(_any(pattern, siblings) for pattern in f.when)), None)
    keys: dict[str, Key] = {}
    waiting: list[str] = []
    for part, _ in inside:
        low = part.lower()
        place = _place_in_family(low, family) if family else None
        if place is not None:
            keys[part] = (_MIDDLE, -1, place, natural_key(part))
        elif _layer_before(low, siblings) and _key(low, siblings, blocks, table)[0] != _LAST:
            waiting.append(part)
        else:
            keys[part] = (*_key(low, siblings, blocks, table), natural_key(part))
    for part in sorted(waiting, key=natural_key):
        before = _layer_before(part.lower(), siblings)
        assert before is not None
        anchor = keys.get(siblings[before])
        if anchor is None:  # two parts that each wait for the other
            keys[part] = (*_key(part.lower(), siblings, blocks, table), natural_key(part))
        else:
            keys[part] = anchor + _FOLLOWS + (natural_key(part),)
    return keys


def _key(part: str, siblings: Iterable[str], blocks: bool, table: _Table) -> Key:
    for i, pattern in enumerate(table.exits):
        if pattern.fits.fullmatch(part) and _holds(pattern, part, siblings, blocks, table):
            return _LAST, i
    for i, pattern in enumerate(table.entries):
        if pattern.fits.fullmatch(part):
            return _FIRST, i
    for i, fits in enumerate(table.middle):
        if fits.fullmatch(part):
            return _MIDDLE, i if i < table.others else i + 1
    return _MIDDLE, table.others


def _holds(pattern: _Pattern, part: str, siblings: Iterable[str], blocks: bool, table: _Table) -> bool:
    true = {
        "blocks": blocks,
        "recurrent": _any(table.recurrent, siblings),
        "alone": not any(re.fullmatch(re.escape(part) + "_?[0-9]+", other) for other in siblings),
    }
    return not pattern.beside or any(all(true[word] for word in words) for words in pattern.beside)


def _place_in_family(part: str, family: _Family) -> Key | None:
    for i, pattern in enumerate(family.order):
        if pattern.fullmatch(part):
            number = re.search(r"[0-9]+", part)
            return (_number(number[0] if number else ""), i) if family.by_number else (i,)
    return None


def _layer_before(part: str, siblings: Iterable[str]) -> str | None:
    """Return the sibling that a normalisation stands behind: that of the same number, else None."""
    table = _table()
    found = table.norm.search(part)
    if found is None:
        return None
    rest = _bare(part[: found.start()] + part[found.end() :])
    for other in sorted(siblings, key=natural_key):
        if other != part and not table.norm.search(other) and _bare(other) == rest and rest:
            return other
    best: tuple[int, str] | None = None
    for other in sorted(siblings, key=natural_key):
        unit = table.unit.search(other)
        if not rest and not re.search("conv|proj", other):  # `norm` may as well stand before `fc`
            continue
        if unit is None or table.norm.search(other) or _bare(other[: unit.start()] + other[unit.end() :]) != rest:
            continue
        rank = next(i for i, group in enumerate(unit.groups()) if group is not None)
        if best is None or rank < best[0]:
            best = rank, other
    if best is not None and "conv" in best[1]:
        return best[1]
    follower = next((other for other in table.followers.get(part, ()) if other in siblings), None)
    if follower or best is not None:
        return follower or best[1]
    return _one_less(part, found, siblings)


def _one_less(part: str, found: re.Match[str], siblings: Iterable[str]) -> str | None:
    """Return the sibling with the next lower number of a numbered normalisation, else None."""
    number = re.fullmatch(r"_?([0-9]+)", part[found.end() :])
    if number is None:
        return None
    lower = [
        (_number(other[1]), other[0])
        for other in (re.fullmatch(re.escape(part[: found.end()]) + r"_?([0-9]+)", name) for name in siblings)
        if other is not None and _number(other[1]) < _number(number[1])
    ]
    return max(lower)[1] if lower else None


def _bare(part: str) -> str:
    return part.replace("_", "")


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
                tuple(map(re.compile, family["order"])),
                family.get("by_number", False),
            )
            for family in raw["families"]
        ),
        followers=raw["followers"],
        unit=re.compile("|".join(f"({word})" for word in raw["units"])),
        norm=re.compile("(?<![a-z])(" + "|".join(raw["norms"]) + ")(?![a-z])"),
        recurrent=re.compile("|".join(raw["recurrent"])),
    )
