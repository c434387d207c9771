"""`sne-fast train`."""

from __future__ import annotations

import os

from ..tasks.settings import TrainSettings
from .options import options_of
from .running import stdout

MEASURES = ("tau", "r2", "mae", "rmse")


@options_of(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Train a predictor of a zoo's columns from the networks' weights.

    Run it under torchrun to use several processes.
    """
    from ..data.devices import usable_device
    from ..reports.measures import number_or_dash
    from ..reports.terminal import say, show_table
    from ..tasks.train import train as run

    usable_device(settings.device)
    console = stdout()
    test = run(settings, console)["test"]
    if int(os.environ.get("RANK", "0")):
        return
    if "accuracy" in test and not isinstance(test["accuracy"], dict):
        say(console, f"accuracy on held-out networks {test['accuracy']:.3f}")
    else:
        rows = [[name, *(number_or_dash(m[k], ".4g") for k in MEASURES)] for name, m in test.items()]
        show_table(console, ["held-out networks", *MEASURES], rows)
    say(console, f"Written to {settings.out}: predictor/, metrics.json, predictions.csv, {settings.log} log")
