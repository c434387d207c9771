"""The networks of a task: those of all its zoos in one row, with their targets, symmetries, batches and splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..data.batch import WeightBatch
from ..data.choices import Chunking, Scale
from ..data.packing import pack
from ..data.weight_budgets import stratified_split
from ..nn.preparation import Preparation
from ..symmetry import Symmetry
from ..training.digests import of_values
from ..training.fingerprint import of_batch, of_targets
from ..training.recipe_predictors import preparation_of
from ..training.recipes import TrainingRecipe
from ..zoo.runnable import Runnable, runnable
from ..zoo.splits import PARTS, SHARES
from ..zoo.symmetries import symmetries_of
from ..zoo.table import Zoo
from .definitions import Experiment

WATCHED = 0.1
"""Share of the networks to learn from that choose the epoch, where the test networks are others."""


class Networks:
    """All networks of a task's zoos in one row.

    Args:
        zoos: the zoos.
        target: the column to predict.
        classes: the column holds classes; `classes` then has their names, and `targets` positions among these.
    """

    def __init__(self, zoos: Sequence[Zoo], target: str, classes: bool = False) -> None:
        self.zoos = list(zoos)
        self.classes: tuple[str, ...] = ()
        if classes:
            values, places = np.unique(self.column(target), return_inverse=True)
            self.classes = tuple(f"{value:g}" if values.dtype.kind == "f" else str(value) for value in values)
            self.targets = places.astype(np.float64)
        else:
            self.targets = self.column(target).astype(np.float64)
        self.groups = [str(name) for name in self.column("architecture")]
        self._batches: dict[tuple[object, ...], tuple[WeightBatch, dict[str, Any]]] = {}
        self._preparations: dict[tuple[object, ...], Preparation] = {}
        self._latest: tuple[tuple[object, ...], WeightBatch] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def symmetries(self) -> list[Symmetry]:
        """The symmetry of every network."""
        return [symmetry for zoo in self.zoos for symmetry in symmetries_of(zoo)]

    @cached_property
    def runnable(self) -> Runnable | None:
        """How the networks are run, or None where that is not known or they are of several architectures."""
        try:
            return runnable(self.zoos)
        except ValueError:
            return None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the zoos' tables and of the targets, which all runs share."""
        tables = [(zoo.about, zoo.rows) for zoo in self.zoos]
        return {
            "zoos": {"size": f"{len(self)} networks", "sha256": of_values(tables)},
            "targets": of_targets(torch.from_numpy(self.targets)),
        }

    def column(self, name: str) -> np.ndarray:
        """Return a column of the zoos, `(n,)`.

        Raises:
            KeyError: a zoo without it.
        """
        return np.concatenate([zoo.column(name) for zoo in self.zoos])

    def packed(self, recipe: TrainingRecipe, scale: Scale | None = None) -> WeightBatch:
        """Return all networks as one batch, packed and prepared as the recipe say; it is cached.

        Args:
            scale: the scale of `pack`, if not that of the recipe.
        """
        return self._packed(recipe, scale)[0]

    def fingerprint_of(self, recipe: TrainingRecipe, scale: Scale | None = None) -> dict[str, Any]:
        """Return the fingerprint of what `packed` returns."""
        return self._packed(recipe, scale)[1]

    def _packed(self, recipe: TrainingRecipe, scale: Scale | None) -> tuple[WeightBatch, dict[str, Any]]:
        scale = scale or recipe.scale
        key = scale, recipe.chunk_size, recipe.chunking, recipe.units, recipe.odd, recipe.relative
        if key not in self._batches:
            batch = self._raw(scale, recipe.chunk_size, recipe.chunking)
            batch = self.preparation(recipe).apply(batch)
            self._batches[key] = batch, of_batch(batch)
        return self._batches[key]

    def preparation(self, recipe: TrainingRecipe) -> Preparation:
        """Return what the recipe ask to be done to the networks, with the symmetries that it needs; it is cached."""
        key = recipe.units, recipe.odd, recipe.jitter, recipe.relative
        if key not in self._preparations:
            batch = self._raw(recipe.scale, recipe.chunk_size, recipe.chunking)
            symmetries = self.symmetries if recipe.units == "canonical" else []
            self._preparations[key] = preparation_of(recipe, batch, symmetries)
        return self._preparations[key]

    def _raw(self, scale: Scale, chunk_size: int, chunking: Chunking) -> WeightBatch:
        """Return all networks as they are packed; the last of these batches is kept."""
        key = scale, chunk_size, chunking
        if self._latest is None or self._latest[0] != key:
            batches = [pack(zoo, scale=scale, chunk_size=chunk_size, chunking=chunking).detach() for zoo in self.zoos]
            self._latest = key, WeightBatch.cat(batches)
        return self._latest[1]

    def where(self, wanted: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        """Return the positions of the networks whose columns have one of the values wanted."""
        mask = np.ones(len(self), bool)
        for name, values in wanted.items():
            mask &= np.isin(self.column(name).astype(str), values)
        return np.flatnonzero(mask)

    def split(self, experiment: Experiment, seed: int) -> dict[str, list[int]]:
        """Return the positions of the training, validation and test networks of an experiment, by part."""
        pool, test = self.where(experiment.train), self.where(experiment.test)
        groups = [self.groups[i] for i in pool]
        if experiment.train == experiment.test:
            parts = [pool[part].tolist() for part in stratified_split(groups, SHARES, seed)]
        else:
            known = stratified_split(groups, (1 - WATCHED, WATCHED), seed)
            parts = [*(pool[part].tolist() for part in known), test.tolist()]
        return dict(zip(PARTS, parts, strict=True))
