"""What a recipe asks for: the predictor, the preparation of its networks, and the augmentation of its training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.batch import WeightBatch
from ..nn.choices import Loss, Transform
from ..nn.encoder import SNE
from ..nn.predictor import Predictor
from ..nn.preparation import Preparation
from ..symmetry import PermutationAugmentation, Symmetry
from .objective import Augment
from .recipes import TrainingRecipe, scale_of_predictor


def make_predictor(
    recipe: TrainingRecipe,
    target_names: Sequence[str],
    *,
    transform: Transform = "identity",
    loss: Loss = "mse",
    preparation: Preparation | None = None,
    seed: int = 0,
) -> Predictor:
    """Make the predictor of a recipe, on the CPU; torch's own random generator is left as it was.

    Args:
        recipe: its settings.
        target_names: one name per output, or the classes.
        transform: of the targets, see :class:`sne_fast.Predictor`.
        loss: see :class:`sne_fast.Predictor`.
        preparation: what `preparation_of` returns; needed where the recipe's units are "canonical".
        seed: of the initial parameters.

    Raises:
        ValueError: canonical units without a preparation, or values that the encoder or the predictor refuses.

    Example:
        >>> from sne_fast.training import RECIPES, make_predictor
        >>> make_predictor(RECIPES["best"], ["accuracy"], transform="logit").out_features
        1
    """
    if preparation is None:
        preparation = preparation_of(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        encoder = SNE(**recipe.encoder)
        encoder.fill_code_gains(recipe.code_gain)
        return Predictor(
            encoder,
            len(target_names),
            recipe.head,
            target_names,
            transform,
            loss,
            normalise_inputs=scale_of_predictor(recipe.input_scale),
            preparation=preparation,
        )


def preparation_of(
    recipe: TrainingRecipe, batch: WeightBatch | None = None, symmetries: Sequence[Symmetry] = ()
) -> Preparation:
    """Return what a recipe asks to be done to networks before they are encoded.

    Args:
        recipe: its settings.
        batch: the networks as they are packed, for "canonical" units.
        symmetries: the symmetry of each, for "canonical" units.

    Raises:
        ValueError: canonical units without networks.
    """
    if recipe.units != "canonical":
        return Preparation(relative=recipe.relative)
    if batch is None:
        raise ValueError("preparation_of: the recipe's units are canonical, which needs the networks: give batch")
    return Preparation.for_networks(batch, symmetries, odd=recipe.odd, jitter=recipe.jitter, relative=recipe.relative)


def augmentation_of(recipe: TrainingRecipe, symmetries: Sequence[Symmetry], preparation: Preparation) -> Augment | None:
    """Return the change of training batches that a recipe asks for, given the training networks' symmetries."""
    if recipe.units == "permuted":
        return PermutationAugmentation(symmetries)
    return preparation.augment if preparation.draws else None
