"""A namespace whose expensive names are made when they are first looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class LazyNames(dict[str, Any]):
    """A namespace that makes some names when they are first looked up, so that an example pays for what it uses."""

    def __init__(self, makers: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self.makers = makers

    def __missing__(self, name: str) -> Any:
        if name not in self.makers:
            raise KeyError(name)
        self[name] = self.makers[name]()
        return self[name]
