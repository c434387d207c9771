"""SNE as a row of a task's tables: training, predictions and encodings, and their change under permutations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.batch import WeightBatch
from ..nn.encoder import SNE
from ..nn.predictor import Predictor
from ..nn.preparation import Preparation
from ..symmetry import PermutationAugmentation, Symmetry, permute
from ..training import FitSettings, History, fit, predict
from ..training.loop import Augment
from .baselines import Problem
from .definitions import SneSettings
from .settings import scale_of_predictor

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


def augmentation(symmetries: Sequence[Symmetry], settings: SneSettings, preparation: Preparation) -> Augment | None:
    """Return the change of training batches that `settings.units` asks for, given the training networks' symmetries."""
    if settings.units == "permuted":
        return PermutationAugmentation(symmetries)
    return preparation.augment if preparation.draws else None


def train_sne(
    problem: Problem,
    settings: SneSettings,
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
        problem: its batch is packed with the scale and chunks of the settings, and may be prepared.
        settings: of the encoder and the training.
        preparation: what the predictor does to networks, that of the settings.
        symmetries: the symmetry of each of the n networks.
        test: positions of the networks whose permuted copies are compared, see `invariance_error`.
        target: name of the target; that of an output is its class, where the target is one.
        checkpoint: as in :func:`sne_fast.training.fit`.
        on_epoch: as in :func:`sne_fast.training.fit`.
    """
    batch, train, watched = problem.batch, list(problem.train), list(problem.validation)
    targets = torch.tensor(problem.targets, dtype=torch.get_default_dtype())
    targets = targets.long() if problem.classes else targets[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        encoder = SNE(
            hidden_dim=settings.hidden_dim, chunk_size=settings.chunk_size, chunking=settings.chunking,
            scale=settings.scale,
            element_order=settings.order, chunk_order=settings.order,
        )  # fmt: skip
        encoder.fill_code_gains(settings.code_gain)
        predictor = Predictor(
            encoder,
            problem.outputs,
            settings.head,
            problem.classes or [target],
            "logit" if problem.logit else "identity",
            "cross_entropy" if problem.classes else "mse",
            normalise_inputs=scale_of_predictor(settings.input_scale),
            preparation=preparation,
        )
    augment = augmentation([symmetries[i] for i in train], settings, preparation)
    history = fit(
        predictor, batch[train], targets[train],
        FitSettings(
            epochs=settings.epochs, lr=settings.lr, warmup=settings.warmup, batch_weights=settings.batch_weights,
            invariance=settings.invariance, keep_best=settings.keep_best, seed=problem.seed,
        ),
        validation=(batch[watched], targets[watched]) if watched else None,
        augment=augment, checkpoint=checkpoint, on_epoch=on_epoch,
    )  # fmt: skip
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
