"""SNE as a row of a task's tables: training, predictions and encodings, and their change under permutations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.batch import WeightBatch
from ..nn.predictor import Predictor
from ..nn.preparation import Preparation
from ..symmetry import Symmetry, permute
from ..training import History, fit, predict
from ..training.recipe_predictors import augmentation_of, make_predictor
from ..training.recipes import TrainingRecipe
from .baselines import Problem

DRAWS = 5
"""Number of permuted copies of every test network in `invariance_error`."""


@dataclass(frozen=True)
class SneRun:
    """Predictions and encodings `(n, h)` of all networks, the record of the training, and the predictor.

    Predictions are `(n,)`, or probabilities `(n, classes)`.
    """

    predicted: np.ndarray
    encodings: np.ndarray
    about: dict[str, Any]
    predictor: Predictor


def train_sne(
    problem: Problem,
    recipe: TrainingRecipe,
    preparation: Preparation,
    symmetries: Sequence[Symmetry],
    test: Sequence[int],
    *,
    target: str,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
) -> SneRun:
    """Train SNE on a problem.

    Args:
        problem: its batch is packed with the scale and chunks of the recipe, and may be prepared.
        recipe: of the encoder and the training.
        preparation: what the predictor does to networks, that of the recipe.
        symmetries: the symmetry of each of the n networks.
        test: positions of the networks whose permuted copies are compared, see `invariance_error`.
        target: name of the target; that of an output is its class, where the target is one.
        checkpoint: as in :func:`sne_fast.training.fit`.
        on_epoch: as in :func:`sne_fast.training.fit`.
    """
    batch, train, watched = problem.batch, list(problem.train), list(problem.validation)
    if not recipe.keep_best and recipe.patience is None:  # nothing is chosen by them, so they are learnt from as well
        train, watched = [*train, *watched], []
    targets = torch.tensor(problem.targets, dtype=torch.get_default_dtype())
    targets = targets.long() if problem.classes else targets[:, None]
    predictor = make_predictor(
        recipe,
        problem.classes or [target],
        transform="logit" if problem.logit else "identity",
        loss="cross_entropy" if problem.classes else "mse",
        preparation=preparation,
        seed=problem.seed,
    )
    history = fit(
        predictor,
        batch[train],
        targets[train],
        recipe.fit_settings(problem.seed),
        validation=(batch[watched], targets[watched]) if watched else None,
        augment=augmentation_of(recipe, [symmetries[i] for i in train], preparation),
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    predicted, encodings = predict(predictor, batch)
    about = {
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        "kept_epoch": history.kept,
        "weights_per_second": history.weights_per_second,
        "invariance_rms": invariance_error(predictor, batch, symmetries, test),
    }
    predicted = predicted if problem.classes else predicted[:, 0]
    return SneRun(predicted.double().numpy(), encodings.double().numpy(), about, predictor)


def invariance_error(
    predictor: Predictor,
    batch: WeightBatch,
    symmetries: Sequence[Symmetry],
    rows: Sequence[int],
) -> float:
    """Return the root mean square difference between predictions of networks and of their permuted copies."""
    part, own = batch[list(rows)], [symmetries[i] for i in rows]
    plain = predict(predictor, part)[0]
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(DRAWS):
        permuted = permute(part, own, generator)
        squares.append((predict(predictor, permuted)[0] - plain).double().square().mean())
    return torch.stack(squares).mean().sqrt().item()
