"""The paper's experiments, end to end: zoos, SNE and its ablations, baselines on the same split, tables and plots.

`sne-fast task NAME` runs one; `TASKS` lists them. Each prediction is a file of its own, so that a run that was killed
goes on, and several commands may share the work.
"""

from .definitions import TASKS, Task
from .runner import run_task

__all__ = ["TASKS", "Task", "run_task"]
