"""Choice of the parameters that the inner loop of development runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but_every(nth: int, values: Iterable[Any]) -> list[Any]:
    """Return all values for ``parametrize``, or tuples for several names, of which all but every ``nth`` are slow."""

    def marked(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if n % nth == 0 else marked(value) for n, value in enumerate(values)]
