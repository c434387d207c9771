"""Which of many parameters the inner loop of development runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but_every(nth: int, values: Iterable[Any]) -> list[Any]:
    """Return all values for ``parametrize``, of which all but every ``nth`` are marked slow."""
    return [value if n % nth == 0 else pytest.param(value, marks=pytest.mark.slow) for n, value in enumerate(values)]
