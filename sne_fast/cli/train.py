"""`sne-fast train`."""

from __future__ import annotations

import os

from ..tasks.settings import TrainSettings
from .options import options_of
from .running import stdout

MEASURES = ("tau", "r2", "mae", "rmse")


@options_of(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Train a predictor of a zoo's columns from the networks' weights, or an encoder without labels.

    Run it under torchrun to use several processes.
    """
    from ..data.devices import usable_device
    from ..extras import install_command, installed
    from ..reports.measures import number_or_dash
    from ..reports.terminal import say, show_table
    from ..tasks.train import train as run

    usable_device(settings.device)
    console = stdout()
    metrics = run(settings, console)
    if int(os.environ.get("RANK", "0")):
        return
    if settings.objective == "contrastive":
        rows = [[name, number_or_dash(score, ".3f")] for name, score in metrics["linear_probes"].items()]
        if rows:
            show_table(console, ["linear probe of z, held-out networks", "accuracy or R2"], rows)
        say(console, f"Written to {settings.out}: encoder/, recipe.json, metrics.json, {settings.log} log")
        return
    test, others = metrics["test"], metrics["baselines"]
    if "accuracy" in test and not isinstance(test["accuracy"], dict):
        rows = [[name, number_or_dash(m["accuracy"], ".3f")] for name, m in {"SNE": test, **others}.items()]
        show_table(console, ["held-out networks", "accuracy"], rows)
    else:
        rows = []
        for target, own in test.items():
            label = f"{target}, " if len(test) > 1 else ""
            all_ = {"SNE": own, **{name: found[target] for name, found in others.items()}}
            rows += [[f"{label}{name}", *(number_or_dash(m[k], ".4g") for k in MEASURES)] for name, m in all_.items()]
        show_table(console, ["held-out networks", *MEASURES], rows)
    if left_out := metrics["left_out"]:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        say(console, f"Left out for want of a target: {len(left_out)} networks ({shown})")
    for package, what in (("sklearn", "boosted trees beside it"), ("matplotlib", "plots")):
        if not installed(package):
            say(console, f"Without {package} there are no {what}: {install_command('demo')}")
    plots = ", plots" if installed("matplotlib") else ""
    say(
        console,
        f"Written to {settings.out}: predictor/, recipe.json, metrics.json, predictions.csv, {settings.log} log{plots}",
    )
