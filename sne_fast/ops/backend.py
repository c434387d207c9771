"""The interface of a backend, which each folder of :mod:`sne_fast.backends` fills in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Arguments = tuple[Any, ...]
"""Arguments of one call of an op, in the order of its schema."""
Kernel = Callable[..., Any]
"""Function with the arguments and results of an op's schema."""


def never_preferred(op: str, args: Arguments) -> bool:
    """Return False: ``auto`` asks the backend by its priority alone."""
    return False


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops, declared as ``BACKEND`` in ``sne_fast/backends/NAME/backend.py``.

    The folder is found by its file ``backend.py``, which is imported on first use. It must be light: packages such as
    Triton are imported, and native libraries loaded, by the first call that needs them.

    Attributes:
        name: the name of the folder, by which :func:`sne_fast.use_backend` takes it.
        kernels: op name -> function; a backend needs not have all ops.
        devices: device types of torch that it computes on; empty for all.
        priority: ``auto`` asks the highest first, and lists are in ascending order.
        unavailable: returns the reasons why the backend cannot run on this machine; empty if it can.
        why_not: takes an op and its arguments, returns the reasons why the backend cannot run this call.
        auto_devices: device types where ``auto`` may take it; None for all of ``devices``.
        self_test: whether ``auto`` takes it only after it has passed :mod:`sne_fast.ops.selftest` on the device.
        sources: files and folders that decide its results; a change of one repeats the self-test.
        preferred: takes an op and its arguments, returns whether ``auto`` asks this backend for the call before those
            of higher priority.
        fusions: which of :data:`sne_fast.ops.schema.OPTIONAL_OPS` modules should call under this backend, instead of
            ordinary torch operations.
        packages: Python packages that it needs; without them, ``auto`` expects no fusion of it.
        describe: returns one line for ``sne-fast info``: what it was built for and where it has been verified; empty
            for no line.
    """

    name: str
    kernels: Mapping[str, Kernel]
    devices: tuple[str, ...] = ()
    priority: int = 0
    unavailable: Callable[[], list[str]] = list
    why_not: Callable[[str, Arguments], list[str]] = lambda op, args: []
    auto_devices: tuple[str, ...] | None = None
    self_test: bool = False
    sources: tuple[Path, ...] = ()
    preferred: Callable[[str, Arguments], bool] = never_preferred
    fusions: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    describe: Callable[[], str] = str

    def computes_on(self, device_type: str) -> bool:
        """Return whether the backend takes tensors of a device type when it is chosen by name."""
        return not self.devices or device_type in self.devices

    def serves_auto_on(self, device_type: str) -> bool:
        """Return whether ``auto`` may take the backend for tensors of a device type."""
        return self.auto_devices is None or device_type in self.auto_devices

    def has_packages(self) -> bool:
        """Return whether all of ``packages`` are installed, without importing them."""
        return all(importlib.util.find_spec(package) is not None for package in self.packages)
