"""Recipes: everything that makes a predictor and trains it, as one named set of values that can be saved.

`sne-fast train --recipe`, `sne-fast demo`, the tasks and :func:`sne_fast.training.fit` share them. This module imports
neither torch nor any other heavy library, so that the help of a command appears at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..atomic_files import write_json
from ..data.choices import Chunking, Scale
from ..nn.choices import FittedScale, SetAttention, Statistics
from ..regular_files import FileError, read_json
from .settings import AmpDtype, FitSettings

InputScale = Literal["tensor", FittedScale, "none"]
UnitOrder = Literal["given", "canonical", "permuted"]


def check_choices(settings: Any, where: str) -> None:
    """Check every field of a `Literal` type.

    Raises:
        ValueError: a value that is not among the field's choices; the message begins with `where`.
    """
    for name, hint in get_type_hints(type(settings)).items():
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        value = getattr(settings, name)
        if choices and value not in choices and not (value is None and get_origin(hint) is not Literal):
            raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {value!r}")


def scale_of_encoder(input_scale: InputScale) -> Scale:
    """Return the `scale` of :class:`sne_fast.SNE` that an input scale asks for."""
    return "tensor" if input_scale == "tensor" else "none"


def scale_of_predictor(input_scale: InputScale) -> FittedScale | Literal[False]:
    """Return the `normalise_inputs` of :class:`sne_fast.Predictor` that an input scale asks for."""
    return False if input_scale == "tensor" or input_scale == "none" else input_scale


OLDER_VALUES = {"accumulate": 1, "ranking": 0.0}
"""Values that recipes mean which were saved before these fields existed."""


@dataclass(frozen=True)
class TrainingRecipe:
    """All settings of a predictor and of its training, but for the target, the seed and the device.

    Names that are not listed are those of :class:`sne_fast.SNE` and :class:`sne_fast.training.FitSettings`.

    Args:
        input_scale: "tensor" divides the weights of each tensor by their root mean square; "zoo" by that of tensors of
            its kind in the training networks, and "fan_in" by one over the root of its layer's fan-in, see
            `normalise_inputs` of :class:`sne_fast.Predictor`; "none" by nothing.
        code_gain: initial gain of the position codes, see :meth:`sne_fast.SNE.fill_code_gains`.
        order: give codes to elements and chunks; False is the paper's ablation.
        head: widths of the hidden layers of the predictor's head.
        units: order of the hidden units: "given" as the networks have them; "canonical", that of
            :func:`sne_fast.symmetry.canonicalise`, with `odd` also its signs, and in training with `jitter`;
            "permuted", random, drawn anew for every training batch. The last two need the networks' symmetries.
        relative: replace types and levels by :func:`sne_fast.nn.preparation.relative_places`, for architectures that no
            training network has.
        threads: threads of torch while it trains; None leaves them as they are. Batches of few small networks are made
            of operations too small to share: two threads train a third slower than one.

    Raises:
        TypeError, ValueError: a value that is not among a field's choices, or that `FitSettings` refuses.

    Example:
        >>> from sne_fast.training import RECIPES
        >>> RECIPES["paper"].statistics, RECIPES["best"].replace(epochs=5).epochs
        ('none', 5)
    """

    statistics: Statistics = "tensor"
    chunks: bool = False
    hidden_dim: int = 32
    num_heads: int = 4
    chunk_size: int = 32
    chunking: Chunking = "flat"
    set_attention: SetAttention = "sab"
    order: bool = True
    input_scale: InputScale = "tensor"
    code_gain: float = 1.0
    head: tuple[int, ...] = (128, 128)
    units: UnitOrder = "given"
    odd: bool = False
    jitter: float = 0.0
    relative: bool = False
    epochs: int = 40
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 1e-2
    batch_weights: int = 24_000
    accumulate: int = 1
    clip: float = 1.0
    patience: int | None = None
    keep_best: bool = True
    invariance: float = 0.0
    ranking: float = 0.0
    threads: int | None = 1

    def __post_init__(self) -> None:
        if isinstance(self.head, (str, bytes)) or not all(type(width) is int for width in self.head):
            raise ValueError(f"recipe: head must be a list of integers, got {self.head!r:.80}")
        object.__setattr__(self, "head", tuple(self.head))
        check_choices(self, "recipe")
        for name in ("chunks", "order", "odd", "relative"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"recipe: {name} must be True or False, got {getattr(self, name)!r:.80}")
        for name in ("code_gain", "jitter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"recipe: {name} must be a number, got {value!r:.80}")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"recipe: threads must be at least 1, or None, got {self.threads!r:.80}")
        self.fit_settings()
        if self.invariance and self.units == "given":
            raise ValueError(
                "recipe: the invariance loss compares copies that are drawn; it needs units 'permuted' or 'canonical'"
            )

    @property
    def scale(self) -> Scale:
        """The scale of `pack`."""
        return scale_of_encoder(self.input_scale)

    @property
    def encoder(self) -> dict[str, Any]:
        """Arguments of :class:`sne_fast.SNE`."""
        names = ("hidden_dim", "num_heads", "chunk_size", "chunking", "set_attention", "statistics", "chunks")
        own = {name: getattr(self, name) for name in names}
        return {**own, "scale": self.scale, "element_order": self.order, "chunk_order": self.order}

    def fit_settings(
        self, seed: int = 0, amp: AmpDtype | None = None, buckets: bool = False, capture: bool = False
    ) -> FitSettings:
        """Return the settings of :func:`sne_fast.training.fit`; those that are given are no part of a recipe."""
        given = {"seed": seed, "amp": amp, "buckets": buckets, "capture": capture}
        names = {field.name for field in dataclasses.fields(FitSettings)} - set(given)
        return FitSettings(**{name: getattr(self, name) for name in names}, **given)  # type: ignore[arg-type]

    def replace(self, **changes: Any) -> TrainingRecipe:
        """Return the recipe with some values changed."""
        return dataclasses.replace(self, **changes)

    @property
    def values(self) -> dict[str, Any]:
        """All values by name, as JSON holds them."""
        return {**dataclasses.asdict(self), "head": list(self.head)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainingRecipe:
        """Return the recipe of `values`; the message of a ValueError names what is unknown, missing or out of range."""
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: must be an object, got {values!r:.80}")
        values = {**OLDER_VALUES, **values}
        wanted = {field.name for field in dataclasses.fields(cls)}
        for what, names in (("unknown", set(values) - wanted), ("missing", wanted - set(values))):
            if names:
                raise ValueError(f"recipe: {what} {', '.join(sorted(map(str, names)))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"recipe: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON, which `find_recipe` reads."""
        write_json(Path(path), self.values)


RECIPES: dict[str, TrainingRecipe] = {
    # Properties that show in how a network was trained, such as its accuracy: statistics carry them.
    "best": TrainingRecipe(epochs=25),
    # For architectures that no training network has: neither sizes nor places of their own.
    # Their order carries over better than their values do; batches hold networks enough to be put in order.
    "across": TrainingRecipe(
        statistics="relative",
        relative=True,
        input_scale="fan_in",
        epochs=20,
        keep_best=False,
        ranking=5.0,
        lr=2e-3,
        batch_weights=80_000,
    ),
    # For data sets that no training network saw, on which no epoch can be chosen either.
    "datasets": TrainingRecipe(epochs=40, keep_best=False, ranking=8.0, lr=2e-3, batch_weights=80_000),
    # For implicit neural representations, whose label is what each weight does.
    "inr": TrainingRecipe(
        chunks=True, input_scale="zoo", units="canonical", odd=True, jitter=0.2, invariance=0.5, epochs=150
    ),
    "paper": TrainingRecipe(statistics="none", chunks=True, hidden_dim=64, code_gain=0.1, head=(512, 512)),
}
"""Name -> recipe, as `sne-fast train --recipe` takes them."""

CONTRASTIVE = TrainingRecipe(
    statistics="relative", chunks=True, hidden_dim=64, set_attention="isab", head=(), epochs=40, lr=1.5e-3,
    batch_weights=1_000_000,
)  # fmt: skip
"""Recipe of encoders that are trained without labels; its batches are the networks that are compared."""


def find_recipe(name: str | os.PathLike[str]) -> TrainingRecipe:
    """Return the recipe of a name in `RECIPES`, or of a JSON file that `TrainingRecipe.save` wrote.

    Raises:
        ValueError: no such name, and no file of a recipe.
    """
    if str(name) in RECIPES:
        return RECIPES[str(name)]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"recipe: must be one of {', '.join(RECIPES)}, or a JSON file, got {str(name)!r}")
    try:
        return TrainingRecipe.from_values(read_json(path))
    except (FileError, json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"recipe: {str(path)!r}: {error}") from error
