"""Kernels of a GPU backend that has one module per op, imported at the first call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from ...ops import direct_checks
from ...ops.backend import Arguments, Kernel
from ...ops.schema import named


def computed_in(op: str, args: Arguments) -> tuple[torch.dtype, torch.device]:
    """Return the dtype that a call computes in and the device of its tensors."""
    given = named(op, args)
    if op == "gather_chunks":
        return given["dtype"], given["scale"].device
    operand = given[next(name for name in ("values", "q", "x", "grad") if name in given)]
    return operand.dtype, operand.device


class OpModules:
    """The modules ``PACKAGE.OP``, each with functions ``OP``, ``OP_backward`` and ``why_not``."""

    def __init__(self, package: str) -> None:
        self.package = package
        self._modules: dict[str, ModuleType] = {}

    def module(self, op: str) -> ModuleType:
        """Return the module of an op or of its backward."""
        module = self._modules.get(op)
        if module is None:
            module = self._modules[op] = importlib.import_module(f"{self.package}.{op.removesuffix('_backward')}")
        return module

    def why_not(self, op: str, args: Arguments) -> list[str]:
        """Return why the op's module cannot run a call; empty if it can."""
        reasons: list[str] = self.module(op).why_not(op, args)
        return reasons

    def run(self, op: str, *args: Any) -> Any:
        """Call the function of an op, once its pointers are known to stay within its rows."""
        direct_checks.direct_call_pointers(op, args)
        return getattr(self.module(op), op)(*args)

    def kernels(self, ops: Iterable[str]) -> dict[str, Kernel]:
        """Return the functions of ops by name."""
        return {op: functools.partial(self.run, op) for op in ops}
