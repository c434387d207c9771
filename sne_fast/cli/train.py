"""`sne-fast train`."""

from __future__ import annotations

import os

import typer

from ..tasks.settings import TrainSettings
from .options import options_of
from .running import print_table, usable_device

MEASURES = ("tau", "r2", "mae", "rmse")


@options_of(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Train a predictor of a zoo's columns from the networks' weights.

    Run it under torchrun to use several processes.
    """
    from rich.console import Console

    from ..tasks.train import train as run

    usable_device(settings.device)
    test = run(settings, Console())["test"]
    if int(os.environ.get("RANK", "0")):
        return
    if "accuracy" in test and not isinstance(test["accuracy"], dict):
        typer.echo(f"accuracy on held-out networks {test['accuracy']:.3f}")
    else:
        rows = [[name, *("-" if m[k] is None else f"{m[k]:.4g}" for k in MEASURES)] for name, m in test.items()]
        print_table(["held-out networks", *MEASURES], rows)
    typer.echo(f"Written to {settings.out}: predictor/, metrics.json, predictions.csv, {settings.log} log")
