"""Tests of the Triton kernels in Triton's interpreter, which is switched on before Triton is imported.

Plain ``pytest`` runs them by test_interpreted.py beside this folder, in a process of their own:
``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/interpreted``.
"""

import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Modules of kernels are decorated at import, by the switch: without it they are not even collected.
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


@pytest.fixture(autouse=True)
def always_poisoned_outputs(poisoned_outputs: None) -> None:
    """Of every test here."""
