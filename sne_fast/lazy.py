"""Packages whose names are imported when they are first used (PEP 562), so that importing the package is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, names: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    A package lists the same imports under `if TYPE_CHECKING:`, where type checkers and editors find them, and attaches
    in the `else:` branch; a module with a `__getattr__` that checkers see would pass every misspelt name.

    Args:
        package: its `__name__`.
        names: for each module, relative as in the import such as ".nn.blocks", the names that are taken from it.
        submodules: modules of the package that are its attributes without having been imported.
    """
    module_of = {name: module for module, taken in names.items() for name in taken}

    def get(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f".{name}", package)
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_of[name], package), name)
        setattr(sys.modules[package], name, value)  # later uses do not come here
        return value

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *submodules})

    return get, names_of
