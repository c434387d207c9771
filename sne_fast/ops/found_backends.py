"""The backends of this process, found by folder and imported when this module is first imported.

A backend is a folder NAME of the package ``sne_fast.backends`` with a file ``backend.py`` that declares ``BACKEND``, a
:class:`sne_fast.ops.backend.Backend`. All names and fusions derive from what is found.

The tables are plain constants of a module, not results of a cached function, because ``torch.compile`` traces
:func:`sne_fast.ops.dispatch.fuses`: it runs an import statement as it stands and reads constants, but would trace into
the search.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from .backend import Backend

# Named, not imported: backends stand above the ops, and this search is the one way in which ops reach up to them.
PACKAGE = f"{__name__.rpartition('.ops.')[0]}.backends"


def _load(name: str) -> Backend | str:
    """Import the backend ``name``, or return why that failed, which is explained on first use."""
    try:
        module = importlib.import_module(f"{PACKAGE}.{name}.backend")
    except ImportError as error:
        return f"import failed: {error}"
    backend = getattr(module, "BACKEND", None)
    if not isinstance(backend, Backend) or backend.name != name:
        return f"{module.__file__} must declare BACKEND, a sne_fast.ops.backend.Backend named {name!r}"
    return backend


_files = [file for folder in importlib.import_module(PACKAGE).__path__ for file in Path(folder).glob("*/backend.py")]
_loaded = {name: _load(name) for name in sorted({file.parent.name for file in _files})}

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in sorted(
        (backend for backend in _loaded.values() if isinstance(backend, Backend)), key=lambda backend: backend.priority
    )
}
"""Name -> backend, by ascending priority."""
FAILED: dict[str, str] = {name: reason for name, reason in _loaded.items() if isinstance(reason, str)}
"""Name -> why the backend cannot be imported."""
NAMES: tuple[str, ...] = (*BACKENDS, *FAILED)
FUSIONS: dict[str, tuple[str, ...]] = {name: backend.fusions for name, backend in BACKENDS.items()}
"""Backend name -> ops that modules call under it instead of ordinary torch operations."""
AUTO_FUSIONS: dict[str, tuple[str, ...]] = {
    device_type: tuple(
        op
        for backend in BACKENDS.values()
        if backend.computes_on(device_type) and backend.serves_auto_on(device_type) and backend.has_packages()
        for op in backend.fusions
    )
    for device_type in sorted({kind for backend in BACKENDS.values() for kind in (*backend.devices, "cpu", "cuda")})
}
"""Device type -> the same for ``auto``."""
