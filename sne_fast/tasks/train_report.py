"""What `sne-fast train` reports besides the predictor: its measures, baselines on the same split, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..extras import installed
from ..reports.measures import measures, why_undefined
from ..reports.plots import confusion_matrix, learning_curve, predicted_against_true
from ..training.settings import History
from .baselines import BASELINES, Problem
from .run_folder import RunFolder
from .settings import TrainSettings

SHOWN = ("mean", "statistics")
"""Baselines beside the predictor, keys of `baselines.BASELINES`."""


def evaluate(values: Tensor, targets: Tensor, names: Sequence[str], classes: bool) -> dict[str, Any]:
    """Return the accuracy of class predictions, or by target Kendall's tau, R2, MAE and RMSE.

    Where some of these are None, "undefined" says which and why.
    """
    if classes:
        return {"accuracy": (values.argmax(1) == targets).double().mean().item()}
    found: dict[str, Any] = {}
    for i, name in enumerate(names):
        pair = values[:, i].numpy(), targets[:, i].numpy()
        undefined = why_undefined(*pair)
        found[name] = {**measures(*pair), **({"undefined": undefined} if undefined else {})}
    return found


def baselines(
    batch: WeightBatch,
    targets: Tensor,
    parts: Mapping[str, Sequence[int]],
    settings: TrainSettings,
    classes: Sequence[str] | None,
) -> dict[str, Tensor]:
    """Fit the baselines to the training and validation networks.

    Args:
        batch: n networks, as they are packed.
        targets: `(n, t)`, or classes `(n,)`.
        parts: positions of the networks by part.
        settings: of the command.
        classes: the names of the classes, None for numbers.

    Returns:
        Predictions of all networks by the name of the baseline, `(n, t)` or probabilities `(n, classes)`; without
        those that need a package that is not installed.
    """
    logit = settings.transform == "logit" or settings.loss == "bce"
    found: dict[str, Tensor] = {}
    for key in SHOWN:
        baseline, columns = BASELINES[key], []
        for values in [targets] if classes is not None else targets.unbind(1):
            problem = Problem(
                batch,
                values.double().numpy(),
                parts["train"],
                parts["validation"],
                settings.seed,
                logit,
                classes=tuple(classes or ()),
            )
            if baseline.why_not(problem):
                break
            columns.append(torch.from_numpy(baseline.fit_predict(problem)))
        else:
            found[baseline.name] = columns[0] if classes is not None else torch.stack(columns, 1)
    return found


def write_plots(
    folder: RunFolder, history: History, values: Tensor, targets: Tensor, names: Sequence[str], classes: bool
) -> None:
    """Write `learning-curve.png` and `scatter.png` or, of classes, `confusion.png`, if matplotlib is installed.

    Args:
        folder: the folder of the training.
        history: its losses.
        values: predictions of the test networks, `(n, t)` or probabilities `(n, classes)`.
        targets: of the same, `(n, t)` or `(n,)`.
        names: of the targets, or the classes.
        classes: whether the targets are classes.
    """
    if not installed("matplotlib"):
        return
    losses = {"training": history.train_loss, "validation": history.validation_loss}
    learning_curve(folder.plot("learning-curve"), losses, history.kept)
    if classes:
        confusion_matrix(folder.plot("confusion"), targets.numpy(), values.argmax(1).numpy(), names)
        return
    panels: dict[str, tuple[np.ndarray, np.ndarray]] = {
        name: (targets[:, i].numpy(), values[:, i].numpy()) for i, name in enumerate(names)
    }
    predicted_against_true(folder.plot("scatter"), panels, names[0] if len(names) == 1 else "value")
