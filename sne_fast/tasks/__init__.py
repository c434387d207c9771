"""The paper's experiments, end to end: zoos, SNE and its ablations, baselines on the same split, tables and plots.

`sne-fast task NAME` runs one; `TASKS` lists them. Each prediction is a file of its own, so that an interrupted run
resumes, and several commands may share the work.
"""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .definitions import TASKS, Task
    from .runner import run_task
    from .stacking import StackedPredictor, average_predictions
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            ".definitions": ["TASKS", "Task"],
            ".runner": ["run_task"],
            ".stacking": ["StackedPredictor", "average_predictions"],
        },
    )

__all__ = ["TASKS", "StackedPredictor", "Task", "average_predictions", "run_task"]
