"""Tests of the Triton kernels in Triton's interpreter, which is switched on before Triton is imported.

Plain ``pytest`` runs them by test_interpreted.py beside this folder, in a process of their own:
``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/interpreted``.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Modules of kernels are decorated at import, by the switch: without it they are not even collected.
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


@pytest.fixture(autouse=True)
def always_poisoned_outputs(poisoned_outputs: None) -> None:
    """Poison the outputs of every test here."""


@pytest.fixture(scope="session", autouse=True)
def functions_patched_once_per_launch() -> Iterator[None]:
    """Let the interpreter patch ``triton.language`` once per launch, not again in every function that a kernel calls.

    It looks through the whole language each time, which takes longer than the arithmetic of small blocks.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values()} & {id(tl), id(tl.core)}
        if seen <= patched:
            return None  # of a function that a kernel calls, whose launch restores everything
        scope = patch_lang(fn)
        if hasattr(scope, "restore"):
            launch, restore = not patched, scope.restore
            patched.update(seen)
            if launch:
                scope.restore = lambda: (patched.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
