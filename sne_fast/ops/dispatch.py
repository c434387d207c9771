"""Choice of the backend that runs an op, made inside the opaque op at run time.

A backend is declared by a :class:`sne_fast.ops.backend.Backend` in a folder of :mod:`sne_fast.backends`.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import selftest
from .backend import Arguments, Backend, Kernel, never_preferred
from .schema import CONSTANT_OPS, FORWARD_OPS, LIBRARY, OPTIONAL_OPS, SCHEMAS
from .transforms import carries_tangent

ENVIRONMENT_VARIABLE = "SNE_FAST_BACKEND"
REFERENCE = "reference"
BackendName = Literal["auto", "reference", "cpu", "triton", "cuda"]
"""The backends of the package, which editors complete; a backend that is added has a name of its own."""


class _Block:
    """One `with use_backend(...)` block that has been entered; left in any order, it takes only itself away."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.active = True


# Blocks of the running thread, generator or asyncio task, the innermost last. A block may be left in another context
# than it was entered in, so that blocks that are not active any more may be among them.
_own_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("sne_fast_use_backend", default=())
# Blocks of the whole process in the order in which they were entered. Autograd runs backward in threads of its own, and
# pools of threads do the work of their caller: threads without a block follow the one entered last.
_all_blocks: list[_Block] = []
_blocks_lock = threading.Lock()
# The name of the last of them: `torch.compile` traces `fuses`, and makes a new graph where this has changed.
_latest: str | None = None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run an op; the message joins all its reasons."""


# Functions import found_backends late, because that imports all backends, which `import sne_fast` must not do.


def _found() -> tuple[dict[str, Backend], dict[str, str]]:
    """Return the backends by name, and the reasons of those that cannot be imported."""
    from .found_backends import BACKENDS, FAILED

    return BACKENDS, FAILED


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends that were found, by ascending priority."""
    from .found_backends import NAMES

    return NAMES


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in backend_names():
        raise ValueError(f"{where}: backend must be one of {', '.join(('auto', *backend_names()))}, got {name!r}")
    return name


@contextmanager
def use_backend(name: BackendName | str) -> Iterator[None]:
    """Run every op inside the ``with`` block, forward and backward, on one backend.

    The choice never falls back: an op that the backend cannot run raises :class:`sne_fast.BackendError` with the
    reasons. Threads and asyncio tasks with blocks of their own follow these; all others, such as the threads in which
    autograd runs backward, follow the block that the process has entered last. Blocks may be left in any order. The
    environment variable ``SNE_FAST_BACKEND`` makes the same choice where no block is active.

    Args:
        name: ``"auto"`` for the fastest that can run, or a backend: ``"reference"``, ``"cpu"``, ``"cuda"``,
            ``"triton"``.

    Raises:
        ValueError: for any other name.

    Example::

        >>> import torch
        >>> encoder = sne_fast.SNE(hidden_dim=32)
        >>> with sne_fast.use_backend("reference"):
        ...     z = encoder([torch.nn.Linear(3, 2)])
        >>> z.shape
        torch.Size([1, 32])
    """
    block = _Block(_check_name(name, "use_backend"))
    _own_blocks.set((*(own for own in _own_blocks.get() if own.active), block))
    _change_blocks(entered=block)
    try:
        yield
    finally:
        block.active = False
        _own_blocks.set(tuple(own for own in _own_blocks.get() if own.active))
        _change_blocks(left=block)


def _change_blocks(entered: _Block | None = None, left: _Block | None = None) -> None:
    global _latest
    with _blocks_lock:
        if entered is not None:
            _all_blocks.append(entered)
        if left is not None:
            _all_blocks.remove(left)
        _latest = _all_blocks[-1].name if _all_blocks else None


def current_backend() -> str:
    """Return the name chosen by :func:`use_backend`, else by ``SNE_FAST_BACKEND`` if not empty, else ``"auto"``."""
    for block in reversed(_own_blocks.get()):
        if block.active:
            return block.name
    return _choice_of_the_process()


def _choice_of_the_process() -> str:
    if _latest is not None:
        return _latest
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def fuses(op: str, device: torch.device) -> bool:
    """Return whether a module should call ``op``, one of ``OPTIONAL_OPS``, for tensors on ``device``.

    No backend is asked about the call, so that ``torch.compile`` can trace this function. Where the backend that
    ``auto`` expects refuses the call, the reference takes it.
    """
    from .found_backends import AUTO_FUSIONS, FUSIONS

    # Dynamo cannot read context variables.
    name = _choice_of_the_process() if torch.compiler.is_compiling() else current_backend()
    return op in (AUTO_FUSIONS.get(device.type, ()) if name == "auto" else FUSIONS.get(name, ()))


def _reasons(name: str, op: str, device: torch.device | None, args: Arguments | None) -> list[str]:
    """Return why backend ``name`` cannot run ``op`` on ``device``; None for either asks in general."""
    backends, failed = _found()
    if name in failed:
        return [failed[name]]
    backend = backends[name]
    reasons = list(backend.unavailable())
    if op not in backend.kernels:
        optional = op.removesuffix("_backward") in OPTIONAL_OPS
        without = "; modules do it by ordinary torch operations" if optional else ""
        without = "; the reference does it" if op in CONSTANT_OPS else without
        reasons.append(f"does not implement {op}{without}")
    if device is not None and not backend.computes_on(device.type):
        reasons.append(f"runs on {' or '.join(backend.devices)}, the inputs are on {device.type}")
    if not reasons and args is not None:
        reasons.extend(backend.why_not(op, args))
    return reasons


def _device_of(args: Arguments) -> torch.device:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device
    return torch.device("cpu")


def _auto_reasons(backend: Backend, op: str, device: torch.device, args: Arguments) -> list[str]:
    """Return the reasons for ``auto`` to skip ``backend``; an explicit choice skips some of these checks."""
    if not backend.serves_auto_on(device.type):
        return [f"is chosen by name only on {device.type}"]
    reasons = _reasons(backend.name, op, device, args)
    if not reasons and backend.self_test:
        reasons = selftest.reasons(backend, op, args, device)
    return reasons


def _in_turn(op: str, device: torch.device, args: Arguments) -> list[Backend]:
    """Return the backends as ``auto`` asks them: those that prefer this call first, then by descending priority."""
    backends, _ = _found()

    def place(backend: Backend) -> tuple[bool, int]:
        asks = backend.preferred is not never_preferred and backend.serves_auto_on(device.type)
        return not (asks and backend.preferred(op, args)), -backend.priority

    return sorted(backends.values(), key=place)


def _choose(op: str, args: Arguments) -> Kernel:
    backends, _ = _found()
    device = _device_of(args)
    name = current_backend()
    forward = op.removesuffix("_backward")
    fusions = backends[name].fusions if name in backends else ()
    if name != "auto" and op != forward and forward in OPTIONAL_OPS and forward not in fusions:
        name = REFERENCE  # the forward ran on the backend of that moment; the one chosen now has no backward of it
    if name in backends and op in CONSTANT_OPS and op not in backends[name].kernels:
        name = REFERENCE
    if name != "auto":
        reasons = _reasons(name, op, device, args)
        if reasons:
            raise BackendError(f"{op}: backend {name!r} cannot run it: " + "; ".join(reasons))
        return backends[name].kernels[op]
    in_turn = _in_turn(op, device, args)
    for backend in in_turn:
        if backend.computes_on(device.type) and not _auto_reasons(backend, op, device, args):
            if backend.name == REFERENCE and forward not in ("gather_chunks", *CONSTANT_OPS):  # which are quick enough
                _warn_of_the_reference(device)
            return backend.kernels[op]
    refusals = [f"{backend.name}: {'; '.join(_auto_reasons(backend, op, device, args))}" for backend in in_turn]
    raise BackendError(f"{op}: no backend can run it: " + " | ".join(refusals))


_warned_of: set[str] = set()  # device types
_has_computed = False


def _warn_of_the_reference(device: torch.device) -> None:
    """Warn once where ``auto`` runs the reference because the backends for the device cannot run on this machine."""
    if device.type in _warned_of:
        return
    made_for = [b for b in _found()[0].values() if device.type in b.devices and b.serves_auto_on(device.type)]
    missing = {backend.name: backend.unavailable() for backend in made_for}
    _warned_of.add(device.type)
    if missing and all(missing.values()):
        whys = " | ".join(f"{name}: {'; '.join(reasons)}" for name, reasons in missing.items())
        warnings.warn(
            f"sne_fast: the reference computes on {device.type}, many times slower than a backend made for it, because "
            f"none is usable: {whys}. With use_backend('reference') or {ENVIRONMENT_VARIABLE}=reference this is "
            f"not said.",
            RuntimeWarning,
            stacklevel=2,
        )


def _after_fork_in_child() -> None:
    global _blocks_lock
    _blocks_lock = threading.Lock()
    _all_blocks[:] = [block for block in _own_blocks.get() if block.active]  # those of other threads are never left
    _change_blocks()
    # OpenMP's threads do not survive a fork, and the first product of torch in the child would wait for them for ever.
    if _has_computed:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _run(op: str, *args: Any) -> Any:
    global _has_computed
    _has_computed = True
    if carries_tangent(args):  # the public functions never call an op so; a compiled graph may
        raise RuntimeError(
            f"{op}: forward-mode differentiation of a compiled or direct call is not supported; call the function that "
            f"is not compiled"
        )
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
    """Report on one op of one backend: ``reasons`` says why it cannot run, and is empty if it can."""

    op: str
    backend: str
    reasons: tuple[str, ...]


class Explanation(tuple[BackendReport, ...]):
    """Reports on every op and backend; ``print`` shows them as a table."""

    def __repr__(self) -> str:
        ready = sum(not report.reasons for report in self)
        return f"Explanation({ready} of {len(self)} ready: str() says which, and why the others are not)"

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
    """Report for every op which backends can run it on this machine and why the others cannot.

    Args:
        device: also ask about inputs on this device; None asks about the machine only.

    Returns:
        A tuple of :class:`BackendReport`, printed as a table.

    Example::

        >>> report = sne_fast.explain("cpu")
        >>> [entry.backend for entry in report if entry.op == "feed_forward" and not entry.reasons]
        ['reference']
    """
    where = None if device is None else torch.device(device)

    def reasons(name: str, op: str) -> tuple[str, ...]:
        forward = _reasons(name, op, where, None)
        both = [] if op in CONSTANT_OPS else _reasons(name, f"{op}_backward", where, None)
        backward = [reason for reason in both if reason not in forward]
        reasons = (*forward, *(backward if not forward else ()))
        return reasons or tuple(f"self-test: {text}" for text in selftest.failures(name, op))

    return Explanation(BackendReport(op, name, reasons(name, op)) for op in FORWARD_OPS for name in backend_names())
