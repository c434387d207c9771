"""Checks of constructor arguments, the same for calls from Python and for the values of a `config.json`."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

MAX_WIDTH = 2**24
"""Largest width of a layer; a product of two still counts its bytes in an int64."""


def integer(where: str, name: str, value: Any, low: int = 1, high: int = MAX_WIDTH) -> int:
    """Return the integer `value`, which may be one of numpy's but no boolean.

    Raises:
        ValueError: no integer in `low..high`; the message begins with `where` and names the argument.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        found = low - 1
    if found < low:
        raise ValueError(f"{where}: {name} must be an integer of at least {low}, got {shown(value)}")
    if found > high:
        raise ValueError(f"{where}: {name} must be at most {high}, got {shown(value)}")
    return found


def flag(where: str, name: str, value: Any) -> bool:
    """Return the boolean `value`.

    Raises:
        ValueError: anything else, the text "no" and the number 0 among it.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be True or False, got {shown(value)}")
    return value


def choice(where: str, name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return `value`, which must be one of `allowed`; 1 is not True.

    Raises:
        ValueError: it is none of them.
    """
    if not any(isinstance(value, type(one)) and value == one for one in allowed):
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")
    return value


def integers(where: str, name: str, values: Any, most: int, low: int = 1, high: int = MAX_WIDTH) -> tuple[int, ...]:
    """Return a sequence of at most `most` integers.

    Raises:
        ValueError: no sequence, too long a one, or an entry that `integer` refuses.
    """
    found = listed(values, most)
    if found is None:
        raise ValueError(f"{where}: {name} must be a list of at most {most} integers, got {shown(values)}")
    return tuple(integer(where, f"{name}[{i}]", value, low, high) for i, value in enumerate(found))


def listed(values: Any, most: int) -> tuple[Any, ...] | None:
    """Return what a list, a tuple, an array or another ordered iterable holds; None for anything else, or more."""
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        return None
    found = tuple(itertools.islice(values, most + 1))
    return found if len(found) <= most else None


def shown(value: Any) -> str:
    """Return a value as messages show it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        return "a very large number"
    return shortened(text)


def shortened(text: str) -> str:
    """Return text as messages show it, on one line and cut where it is long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."
