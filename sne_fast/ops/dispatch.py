"""Choice of the backend ("backend") that runs an op, made inside the opaque op at run time.

A backend is a module under :mod:`sne_fast.backends` with

- ``NAME``, ``DEVICES`` (torch device types; empty for all) and ``PRIORITY`` (``auto`` takes the highest);
- ``unavailable() -> list[str]``: why it cannot run on this machine at all;
- ``why_not(op, args) -> list[str]``: why it cannot take this call;
- ``KERNELS``: op name -> function with the schema's arguments and results;
- optional ``AUTO_DEVICES``, where ``auto`` may take it, if not all of ``DEVICES``;
- optional ``SELF_TEST = True``: ``auto`` takes it only once it has passed :mod:`sne_fast.ops.selftest` here, and
  again when one of ``SOURCES`` has changed, files and folders of this package;
- optional ``preferred(op, args) -> bool``: whether ``auto`` asks it before those of higher priority for this call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import selftest
from .schema import FORWARD_OPS, FUSIONS, LIBRARY, SCHEMAS

BACKEND_NAMES = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SNE_FAST_BACKEND"
HAS_TRITON = importlib.util.find_spec("triton") is not None  # the backend of FUSIONS; found, not imported

# One choice for the whole process, as torch's own backend flags: autograd runs backward in threads of its own, and
# a choice kept per thread would be lost there.
_choice: str | None = None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run an op; the message joins all its reasons."""


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in BACKEND_NAMES:
        raise ValueError(f"{where}: backend must be one of {', '.join(('auto', *BACKEND_NAMES))}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block, forward and backward, on one backend.

    The choice holds for the whole process (autograd runs backward in its own threads) and never falls back: an op
    that the backend cannot run raises :class:`sne_fast.BackendError` with the reasons. The environment variable
    ``SNE_FAST_BACKEND`` makes the same choice where no ``with`` block is active.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or ``"auto"``, the fastest that can run.

    Raises:
        ValueError: for any other name.

    Example::

        with sne_fast.use_backend("reference"):
            z = encoder(batch)
    """
    global _choice
    _check_name(name, "use_backend")
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


def current_backend() -> str:
    """The name chosen by :func:`use_backend`, else by ``SNE_FAST_BACKEND``, else ``"auto"``."""
    if _choice is not None:
        return _choice
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def fuses(op: str, device: torch.device) -> bool:
    """Whether a module should call ``op``, one of ``FUSIONS``, for tensors on ``device``, or do without.

    No backend is asked, so that this can be traced: where the one of ``auto`` refuses, the reference takes the call.
    """
    name = current_backend()
    return device.type == "cuda" and HAS_TRITON if name == "auto" else name in FUSIONS[op]


@functools.cache
def _load() -> tuple[dict[str, ModuleType], dict[str, str]]:
    from .. import backends

    loaded: dict[str, ModuleType] = {}
    failed: dict[str, str] = {}
    for info in pkgutil.iter_modules(backends.__path__):
        name = f"{backends.__name__}.{info.name}"
        if info.ispkg:
            name = f"{name}.backend"
            if importlib.util.find_spec(name) is None:
                continue
        elif info.name != "reference":
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # e.g. Triton is not installed: remembered, and explained on first use
            failed[info.name] = f"import failed: {error}"
        else:
            loaded[module.NAME] = module
    return loaded, failed


def _reasons(name: str, op: str, device: torch.device | None, args: tuple[Any, ...] | None) -> list[str]:
    """Why backend ``name`` cannot run ``op`` on ``device``; empty if it can. ``args`` None asks in general."""
    loaded, failed = _load()
    if name in failed:
        return [failed[name]]
    if name not in loaded:
        return ["this build of sne_fast has no such backend"]
    backend = loaded[name]
    reasons = list(backend.unavailable())
    if op not in backend.KERNELS:
        without = "; modules do it by ordinary torch operations" if op.removesuffix("_backward") in FUSIONS else ""
        reasons.append(f"does not implement {op}{without}")
    if device is not None and backend.DEVICES and device.type not in backend.DEVICES:
        reasons.append(f"runs on {' or '.join(backend.DEVICES)}, the inputs are on {device.type}")
    if not reasons and args is not None:
        reasons.extend(backend.why_not(op, args))
    return reasons


def _device_of(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device
    return torch.device("cpu")


def _auto_reasons(backend: ModuleType, op: str, device: torch.device, args: tuple[Any, ...]) -> list[str]:
    """Why ``auto`` passes ``backend`` by, which an explicit choice of it would not ask about all of."""
    if device.type not in getattr(backend, "AUTO_DEVICES", (device.type,)):
        return [f"is chosen by name only on {device.type}"]
    reasons = _reasons(backend.NAME, op, device, args)
    if not reasons and getattr(backend, "SELF_TEST", False):
        reasons = selftest.reasons(backend, op, args, device)
    return reasons


def _in_turn(loaded: dict[str, ModuleType], op: str, device: torch.device, args: tuple[Any, ...]) -> list[ModuleType]:
    """The backends as ``auto`` asks them: those that prefer this call, then by priority."""

    def place(backend: ModuleType) -> tuple[bool, int]:
        prefers = getattr(backend, "preferred", None)
        here = device.type in getattr(backend, "AUTO_DEVICES", (device.type,))
        return not (prefers is not None and here and prefers(op, args)), -backend.PRIORITY

    return sorted(loaded.values(), key=place)


def _choose(op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    loaded, _ = _load()
    device = _device_of(args)
    name = current_backend()
    forward = op.removesuffix("_backward")
    if name != "auto" and op != forward and name not in FUSIONS.get(forward, (name,)):
        name = "reference"  # modules called the fusion by the backend of the forward; this one has no backward of it
    if name != "auto":
        reasons = _reasons(name, op, device, args)
        if reasons:
            raise BackendError(f"{op}: backend {name!r} cannot run it: " + "; ".join(reasons))
        return loaded[name].KERNELS[op]
    refusals = []
    for backend in _in_turn(loaded, op, device, args):
        reasons = _auto_reasons(backend, op, device, args)
        if not reasons:
            return backend.KERNELS[op]
        refusals.append(f"{backend.NAME}: {'; '.join(reasons)}")
    raise BackendError(f"{op}: no backend can run it: " + " | ".join(refusals))


def _run(op: str, *args: Any) -> Any:
    kernel = _choose(op, args)
    device_type = _device_of(args).type
    with torch.no_grad():
        # The caller has chosen the dtypes already; under a live autocast, products inside would be cast once more.
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return kernel(*args)
        return kernel(*args)


for _name in SCHEMAS:
    LIBRARY.impl(_name, functools.partial(_run, _name), "CompositeExplicitAutograd")


@dataclass(frozen=True)
class BackendReport:
    """What one backend says of one op: ``reasons`` is empty where it can run."""

    op: str
    backend: str
    reasons: tuple[str, ...]


class Explanation(tuple[BackendReport, ...]):
    """Reports for every op and backend; ``print`` shows them as a table."""

    def __str__(self) -> str:
        lines = []
        for op in dict.fromkeys(report.op for report in self):
            lines.append(op)
            for report in self:
                if report.op == op:
                    lines.append(
                        f"  {report.backend:<10} {'ready' if not report.reasons else '; '.join(report.reasons)}"
                    )
        return "\n".join(lines)


def explain(device: torch.device | str | None = None) -> Explanation:
    """Say for every op which backends can run it here and, of the others, why not.

    Args:
        device: ask for inputs on this device; None asks about the machine only.

    Returns:
        A tuple of :class:`BackendReport`, printed as a table.

    Example::

        print(sne_fast.explain("cpu"))
    """
    where = None if device is None else torch.device(device)

    def reasons(name: str, op: str) -> tuple[str, ...]:
        forward = _reasons(name, op, where, None)
        backward = [reason for reason in _reasons(name, f"{op}_backward", where, None) if reason not in forward]
        reasons = (*forward, *(backward if not forward else ()))
        return reasons or tuple(f"self-test: {text}" for text in selftest.failures(name, op))

    return Explanation(BackendReport(op, name, reasons(name, op)) for op in FORWARD_OPS for name in BACKEND_NAMES)
