"""`sne-fast task`."""

from __future__ import annotations

import typer

from ..tasks.settings import TaskSettings
from .options import options_of


@options_of(TaskSettings)
def task(settings: TaskSettings) -> None:
    """Run an experiment of the paper: zoos, SNE, ablations and baselines over several seeds, a table and plots.

    What is already in the folder is not done again; calls with other seeds or methods add to it.
    """
    from rich.console import Console

    from ..tasks import run_task

    run_task(
        settings.name,
        settings.out,
        Console(),
        seeds=settings.seeds,
        methods=settings.methods,
        networks=settings.networks,
        epochs=settings.epochs,
    )
    typer.echo(f"Written to {settings.out}: results.json, results.md, plots, runs/ (predictions and predictors), zoos/")
