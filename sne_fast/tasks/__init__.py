"""The paper's experiments, end to end: zoos, SNE and its ablations, baselines on the same split, tables and plots.

`sne-fast task NAME` runs one; `TASKS` lists them. Each prediction is a file of its own, so that an interrupted run
resumes, and several commands may share the work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .definitions import TASKS, Task
    from .runner import run_task

__all__ = ["TASKS", "Task", "run_task"]

_MODULES = {"TASKS": ".definitions", "Task": ".definitions", "run_task": ".runner"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `sne_fast.tasks.settings` is there without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
