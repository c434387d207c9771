"""Native libraries of the backends: opened with ctypes, checked against what this package expects, loaded once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

INT, INT64, TEXT, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
Symbols = Mapping[str, tuple[type | None, list[type]]]
"""Exported function -> types of result and arguments."""


class NotLoaded(Exception):
    """A native library cannot be used; the message is the reason."""


def struct(name: str, integers: str, pointers: str) -> type[ctypes.Structure]:
    """Make the ctypes mirror of a struct of int64 fields and, behind them, pointers."""
    fields: list[tuple[str, type]] = [(field, INT64) for field in integers.split()]
    fields += [(field, POINTER) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def open_checked(
    path: Path, symbols: Symbols, abi_symbol: str, abi: int, loader: type[ctypes.CDLL] = ctypes.CDLL
) -> ctypes.CDLL:
    """Open a library, declare its functions and check its ABI number.

    Args:
        path: the library.
        symbols: the functions that it must have.
        abi_symbol: the function that returns its ABI number.
        abi: the number that it must return.
        loader: ``ctypes.CDLL``, or ``ctypes.PyDLL`` for functions that are called with the interpreter locked and may
            raise.

    Raises:
        OSError: with what is wrong with the file.
    """
    lib = loader(str(path))
    missing = [name for name in symbols if not hasattr(lib, name)]
    if missing:
        raise OSError(f"{path} lacks {', '.join(missing)}: it is from another version of sne_fast, reinstall")
    for name, (result, arguments) in symbols.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    found = getattr(lib, abi_symbol)()
    if found != abi:
        raise OSError(f"{path} has ABI {found}, this sne_fast needs {abi}: reinstall sne_fast")
    return lib


class NativeLibrary:
    """A library that is loaded at first use. A failed load is remembered and explained, not repeated.

    Args:
        load: opens the library, or raises :class:`NotLoaded` with the reason.
    """

    def __init__(self, load: Callable[[], ctypes.CDLL]) -> None:
        @functools.cache
        def attempt() -> tuple[ctypes.CDLL | None, str]:
            try:
                return load(), ""
            except NotLoaded as error:
                return None, str(error)

        self._attempt = attempt

    def reasons(self) -> list[str]:
        """Return why the library cannot be used; empty if it can."""
        _, why = self._attempt()
        return [why] if why else []

    def get(self) -> ctypes.CDLL:
        """Return the loaded library.

        Raises:
            RuntimeError: with the reason why there is none.
        """
        lib, why = self._attempt()
        if lib is None:
            raise RuntimeError(why)
        return lib

    def forget(self) -> None:
        """Load again at the next use (for tests)."""
        self._attempt.cache_clear()
