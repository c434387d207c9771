"""`sne-fast task`."""

from __future__ import annotations

from ..tasks.settings import TaskSettings
from .options import options_of
from .running import stdout


@options_of(TaskSettings)
def task(settings: TaskSettings) -> None:
    """Run an experiment of the paper: zoos, SNE, ablations and baselines over several seeds, a table and plots.

    What is already in the folder is not done again; calls with other seeds or methods add to it.
    """
    from ..reports.terminal import say
    from ..tasks import run_task

    console = stdout()
    run_task(
        settings.name,
        settings.out,
        console,
        seeds=settings.seeds,
        methods=settings.methods,
        networks=settings.networks,
        epochs=settings.epochs,
        curves=settings.curves,
    )
    say(
        console,
        f"Written to {settings.out}: results.json, results.md, plots, runs/ (predictions and predictors), zoos/",
    )
