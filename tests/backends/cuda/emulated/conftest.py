"""Tests of the CUDA kernels on a host, every CUDA thread a fiber (csrc/cuda/emulator/emulator.h).

Plain ``pytest`` builds the library and runs each file in a process of its own, by ../test_emulated.py:
``python csrc/tests/emulate.py OUT.so; SNE_FAST_CUDA_EMULATED=OUT.so python -m pytest tests/backends/cuda/emulated``.
"""

import os
from collections.abc import Iterator

import pytest

EMULATED = bool(os.environ.get("SNE_FAST_CUDA_EMULATED"))
# The backend reads its switch when it is imported.
collect_ignore_glob = [] if EMULATED else ["test_*.py"]


@pytest.fixture(autouse=True)
def always_poisoned_outputs(poisoned_outputs: None) -> None:
    """Poison the outputs of every test here."""


@pytest.fixture(autouse=True)
def numbered_order() -> Iterator[None]:
    """Threads run as numbered unless a test says otherwise; what it says ends with it."""
    from sne_fast.backends.cuda import library

    yield
    if not library.reasons():
        library.library().sne_fast_cuda_emulated_schedule(0)
