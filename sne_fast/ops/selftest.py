"""Self-test of a backend: a small comparison with the reference on the device at hand, before ``auto`` uses it.

It runs at the first eager call of each variant (op, dtype, width, heads), forward and backward, but never while a CUDA
graph is captured or a call is traced. Passes are stored on disk, in ``selftest.json`` under ``$SNE_FAST_CACHE``, else
``$XDG_CACHE_HOME/sne_fast``, else ``~/.cache/sne_fast``, per device, driver, versions and source of the backend.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..atomic_files import write_json
from ..regular_files import FileError, read_json
from . import devices
from . import selftest_cases as cases
from .backend import Backend
from .precision import product_precision

CACHE_ENVIRONMENT_VARIABLE = "SNE_FAST_CACHE"
NOT_YET = "not tested on this device yet: a first eager call tests it, a capture of a CUDA graph cannot"

# Limits of ||got - reference|| / ||reference|| for results; gradients may be off four times as far. Wrong code is off
# by about one.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.1}
TF32_TOLERANCE = 5e-2

_lock = threading.RLock()
_results: dict[tuple[str, str], list[str]] = {}  # (device key, variant) -> failures


def reasons(backend: Backend, op: str, args: tuple[Any, ...], device: torch.device) -> list[str]:
    """Return why ``auto`` should not take ``backend`` for this call; empty once it has passed on this device."""
    case = cases.variant(op, args)
    precision = product_precision(case.dtype)
    variant = f"{backend.name} {case} {precision}"
    where = device_key(device)
    known = _results.get((where, variant))
    if known is not None:
        return known
    with _lock:
        known = _results.get((where, variant))
        if known is not None:
            return known
        key = _environment_key(where, backend)
        if variant in _passed_before(key):
            _results[where, variant] = []
            return []
        if not _may_run(device):
            return [NOT_YET]
        failures = _run(backend, case, precision, device)
        _results[where, variant] = failures
    if failures:
        warnings.warn(
            f"sne_fast: backend {backend.name!r} failed its self-test on {where} and is not used: "
            + "; ".join(failures),
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        _remember(key, variant)
    return failures


def failures(backend_name: str, op: str) -> list[str]:
    """Return the failures of a backend's op in self-tests of this process, for :func:`sne_fast.explain`."""
    start = f"{backend_name} {op.removesuffix('_backward')} "
    return [text for (_, variant), texts in _results.items() if variant.startswith(start) for text in texts]


def _may_run(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _plain_calls(device: torch.device) -> Iterator[None]:
    """Run outside the caller's autograd, autocast, inference and dispatch modes."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        for context in (_disable_current_modes(), torch.inference_mode(False), torch.no_grad(), guard):
            stack.enter_context(context)
        for device_type in {"cpu", device.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        if mode:  # the comparison waits for the device
            torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            if mode:
                torch.cuda.set_sync_debug_mode(mode)


def _relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double()
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    got, want = got[finite], want[finite]
    error = float((got - want).norm()) / max(float(want.norm()), 1e-3 * want.numel() ** 0.5)
    return error if error == error else float("inf")


def check(backend: Backend, case: cases.Variant, device: torch.device) -> list[str]:
    """Run the self-test of one variant on one device now and return its failures, without storing anything."""
    return _run(backend, case, product_precision(case.dtype), device)


def _run(backend: Backend, case: cases.Variant, precision: str, device: torch.device) -> list[str]:
    tolerance = TF32_TOLERANCE if precision == "tf32" else TOLERANCES.get(case.dtype, 0.1)
    failures = []
    try:
        with _plain_calls(device):
            for pair in cases.comparisons(case, backend.kernels, device):
                error = _relative_error(pair.got, pair.want)
                if error > tolerance * (4 if pair.is_gradient else 1):
                    failures.append(f"{case}: {pair.name} is off by {error:.1e} of its size")
    except Exception as error:  # a compiler or a driver may raise anything: the backend must not be used
        failures.append(f"{case}: {type(error).__name__}: {str(error).strip()[:300]}")
    return failures


# ---------------------------------------------------------------------------------------- device, versions and storage


@functools.cache
def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)())


@functools.cache
def _gpu_key(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} sm_{major}{minor}"


def device_key(device: torch.device) -> str:
    """Return name and capability of a device, so that two equal GPUs of one machine are tested once."""
    if device.type != "cuda":
        return device.type
    return _gpu_key(devices.index(device))


@functools.cache
def _source_digest(sources: tuple[Path, ...]) -> str:
    """Return a digest of a backend's code, tables and library: whoever changes one tests the backend again."""
    digest = hashlib.sha256()
    files = {file for source in sources for file in (source, *source.glob("**/*"))}
    for path in sorted(files):
        if path.suffix in (".py", ".json", ".so") and path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _environment_key(where: str, backend: Backend) -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    return (
        f"{where} | {_driver()} | torch {torch.__version__} | triton {version('triton')} | "
        f"sne_fast {version('sne_fast')} {_source_digest(backend.sources)}"
    )


def cache_file() -> Path:
    """Return the file in which passes are stored."""
    own, shared = os.environ.get(CACHE_ENVIRONMENT_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "sne_fast"
    return folder / "selftest.json"


def _read() -> dict[str, list[str]]:
    """Return the stored passes; a damaged file counts as none, and the next pass replaces it."""
    try:
        found = read_json(cache_file(), dict)
    except (OSError, FileError):
        return {}
    return {
        key: passed
        for key, passed in found.items()
        if isinstance(passed, list) and all(isinstance(variant, str) for variant in passed)
    }


def _passed_before(key: str) -> list[str]:
    return _read().get(key, [])


def _remember(key: str, variant: str) -> None:
    """Store a pass on disk; failures are not stored, since one may be transient."""
    passed = _read()
    passed[key] = sorted({*passed.get(key, []), variant})
    with contextlib.suppress(OSError):  # a folder that cannot be written costs a test per process
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), passed)
