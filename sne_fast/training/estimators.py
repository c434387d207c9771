"""Predictors of networks as estimators of scikit-learn: `SNERegressor` and `SNEClassifier`."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.choices import Chunking, NonFinite, Scale
from ..data.devices import usable_device
from ..data.weight_budgets import stratified_split
from ..extras import installed, require
from ..nn.choices import SetAttention, Statistics, Transform
from ..nn.encoder import SNE
from ..nn.predictor import Predictor
from .loop import fit
from .objective import Augment
from .prediction import predict
from .settings import FitSettings

if TYPE_CHECKING or installed("sklearn"):
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.validation import check_is_fitted
else:  # the names exist, so that `from sne_fast import *` works; making an estimator says what is missing

    class BaseEstimator:
        """Stands for that of scikit-learn."""

    class ClassifierMixin:
        """Stands for that of scikit-learn."""

    class RegressorMixin:
        """Stands for that of scikit-learn."""


__all__ = ["SNEClassifier", "SNERegressor"]


def _of_chosen(
    augment: Augment, chosen: Sequence[int], part: WeightBatch, rows: Sequence[int], generator: torch.Generator
) -> WeightBatch:
    """Call an augmentation of all networks of X where some of them are trained on."""
    return augment(part, [chosen[row] for row in rows], generator)


@dataclass(kw_only=True, eq=False, repr=False)
class _SNEEstimator(BaseEstimator):
    """What both estimators share: their parameters, packing, and the training."""

    hidden_dim: int = 64
    num_heads: int = 4
    chunk_size: int = 32
    chunking: Chunking = "flat"
    scale: Scale = "tensor"
    set_attention: SetAttention = "sab"
    statistics: Statistics = "tensor"
    chunks: bool = True
    code_gain: float | None = None
    head: Sequence[int] = (512, 512)
    epochs: int = 40
    lr: float = 2e-3
    weight_decay: float = 1e-2
    batch_weights: int = 20_000
    validation_fraction: float = 0.0
    patience: int | None = None
    nonfinite: NonFinite = "raise"
    augment: Augment | None = None
    random_state: int | None = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        require("sklearn", extra="sklearn", why=type(self).__name__)

    def __sklearn_tags__(self) -> Any:
        """Return the tags of scikit-learn: X holds networks, so it is no array, and no test with numbers applies."""
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.non_deterministic = self.random_state is None
        return tags

    def transform(self, X: Any) -> np.ndarray:
        """Return the encoding of every network, `(n, h)` float64: h is `hidden_dim`, with statistics three times that.

        Raises:
            NotFittedError: `fit` was not called.
        """
        return self._predict(X)[1]

    def _seed(self) -> int:
        if self.random_state is None:
            return int(torch.seed() % 2**32)
        if isinstance(self.random_state, bool) or not isinstance(self.random_state, (int, np.integer)):
            raise ValueError(
                f"{type(self).__name__}: random_state must be an integer or None, got {self.random_state!r}"
            )
        if not 0 <= self.random_state < 2**63:
            raise ValueError(f"{type(self).__name__}: random_state must lie in [0, 2**63), got {self.random_state}")
        return int(self.random_state)

    def _pack(self, X: Any, encoder: SNE) -> WeightBatch:
        """Return networks as one batch; slices that scikit-learn cut from a batch come as a list of batches."""
        if isinstance(X, WeightBatch):
            return X.detach()
        if isinstance(X, (str, os.PathLike, nn.Module, Mapping)):
            raise TypeError(
                f"{type(self).__name__}: X must be a sequence of networks, a zoo or a WeightBatch, got one "
                f"{type(X).__name__}; put it into a list"
            )
        if isinstance(X, np.ndarray) and X.ndim and X.size != len(X):
            raise TypeError(
                f"{type(self).__name__}: X must have one network in each row, got an array of shape {X.shape}; numpy "
                f"takes a list of nn.Sequential for a table of their layers, so give the list itself"
            )
        items = X.ravel().tolist() if isinstance(X, np.ndarray) else X
        if not hasattr(items, "__len__") or not hasattr(items, "__iter__"):
            raise TypeError(
                f"{type(self).__name__}: X must be a sequence of networks, a zoo or a WeightBatch, got "
                f"{type(X).__name__}"
            )
        if len(items) and all(isinstance(item, WeightBatch) for item in items):
            return WeightBatch.cat(list(items)).detach()
        packed = encoder.pack(items, nonfinite=self.nonfinite, device="cpu")
        return packed.detach()

    def _columns(self, X: Any, y: Any) -> Any:
        """Return `y`, or the column or columns of the zoo X that it names."""
        names = [y] if isinstance(y, str) else y
        named = isinstance(names, (list, tuple)) and len(names) and all(isinstance(name, str) for name in names)
        if not named or not hasattr(X, "column"):
            return y
        columns = [np.asarray(X.column(name)) for name in names]
        return columns[0] if isinstance(y, str) else np.stack(columns, 1)

    def _fit(self, X: Any, goals: Tensor, groups: Sequence[str], **of_predictor: Any) -> None:
        share = self.validation_fraction
        if isinstance(share, bool) or not isinstance(share, (int, float, np.number)) or not 0 <= share < 1:
            raise ValueError(
                f"{type(self).__name__}: validation_fraction must lie in [0, 1), got {self.validation_fraction!r}"
            )
        seed, device = self._seed(), usable_device(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = SNE(
                hidden_dim=self.hidden_dim,
                num_heads=self.num_heads,
                chunk_size=self.chunk_size,
                chunking=self.chunking,
                scale=self.scale,
                set_attention=self.set_attention,
                statistics=self.statistics,
                chunks=self.chunks,
            )
            if self.code_gain is not None:
                encoder.fill_code_gains(self.code_gain)
            predictor = Predictor(encoder, hidden_features=self.head, **of_predictor).to(device)
        batch = self._pack(X, encoder)
        if len(batch) != len(goals):
            raise ValueError(
                f"{type(self).__name__}: X and y must have the same length, got {len(batch)} networks and {len(goals)}"
            )
        validation, rows = None, list(range(len(batch)))
        if self.validation_fraction:
            shares = (1 - self.validation_fraction, self.validation_fraction)
            rows, watched = stratified_split(groups, shares, seed)
            if not rows or not watched:
                raise ValueError(
                    f"{type(self).__name__}: validation_fraction {self.validation_fraction} of {len(batch)} networks "
                    f"leaves none to train on or to validate with"
                )
            validation = batch[watched], goals[watched]
        augment = self.augment
        if augment is not None and self.validation_fraction:
            augment = functools.partial(_of_chosen, augment, rows)
        settings = FitSettings(
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            batch_weights=self.batch_weights,
            patience=self.patience,
            seed=seed,
        )
        self.history_ = fit(predictor, batch[rows], goals[rows], settings, validation=validation, augment=augment)
        self.predictor_ = predictor

    def _predict(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "predictor_")
        batch = self._pack(X, self.predictor_.encoder)
        with torch.no_grad():
            values, z = predict(self.predictor_, batch, self.batch_weights)
        return values.double().cpu().numpy(), z.double().cpu().numpy()


@dataclass(kw_only=True, eq=False, repr=False)
class SNERegressor(RegressorMixin, _SNEEstimator):
    """Regress properties of networks on their weights, as an estimator of scikit-learn.

    X is a zoo, a sequence of modules, state_dicts or paths to checkpoints, or a `WeightBatch`; y holds one row of
    numbers per network, or is the name of a column of the zoo (a list of names for several). Parameters are kept as
    they are given and are checked by `fit`, so that `sklearn.base.clone`, `cross_val_score`, `GridSearchCV` and
    pipelines work.

    Args:
        hidden_dim, num_heads, chunk_size, chunking, scale, set_attention: of :class:`sne_fast.SNE`.
        statistics, chunks: of :class:`sne_fast.SNE`. `chunks=False` trains several times faster, and suits targets that
            show in how a network was trained, such as its accuracy.
        code_gain: see :meth:`sne_fast.SNE.fill_code_gains`; None leaves the encoder's own.
        head: widths of the head's hidden layers.
        target_transform: "identity", or "logit" for targets in [0, 1] such as accuracies.
        epochs, lr, weight_decay, batch_weights, patience: of :class:`sne_fast.training.FitSettings`.
        validation_fraction: share of the networks that choose the epoch whose parameters are kept; 0 keeps the last.
        nonfinite: of :func:`sne_fast.pack`.
        augment: change of every training batch, as in :func:`sne_fast.training.fit`; the positions that it is given are
            those in X.
        random_state: seed of the initial parameters, the split and the order of batches; None draws one.
        device: where to train and predict.

    Attributes:
        predictor_: the trained :class:`sne_fast.Predictor`, which `save_pretrained` saves.
        history_: the :class:`sne_fast.training.History` of the training.
        n_outputs_: number of predicted values.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> networks = [torch.nn.Linear(4, 3) for _ in range(6)]
        >>> norms = [network.weight.norm().item() for network in networks]
        >>> model = sne_fast.SNERegressor(hidden_dim=32, epochs=2).fit(networks, norms)
        >>> model.predict(networks).shape
        (6,)
    """

    target_transform: Transform = "identity"

    def fit(self, X: Any, y: Any) -> SNERegressor:
        """Train on networks and targets `(n,)` or `(n, t)`, and return the estimator.

        Raises:
            TypeError: X is one network, or no sequence.
            ValueError: a network that cannot be packed, targets that are not finite numbers, one for each network, or
                a parameter out of its range.
        """
        values = self._numbers(X, y)
        self.n_outputs_ = values.shape[1] if values.ndim == 2 else 1
        self._flat = values.ndim == 1
        goals = torch.tensor(values.reshape(len(values), self.n_outputs_), dtype=torch.get_default_dtype())
        self._fit(
            X,
            goals,
            ["all"] * len(goals),
            out_features=self.n_outputs_,
            target_names=self._names(y),
            target_transform=self.target_transform,
        )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predict `(n,)`, or `(n, t)` where y had two dimensions, in the units of y.

        Raises:
            NotFittedError: `fit` was not called.
        """
        values = self._predict(X)[0]
        return values[:, 0] if self._flat else values

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R2 of the predictions; y as in `fit`."""
        return float(super().score(X, self._numbers(X, y), sample_weight))

    def _names(self, y: Any) -> list[str] | None:
        if isinstance(y, str):
            return [y]
        return list(y) if isinstance(y, (list, tuple)) and y and all(isinstance(name, str) for name in y) else None

    def _numbers(self, X: Any, y: Any) -> np.ndarray:
        values = self._columns(X, y)
        if np.iscomplexobj(values) or (isinstance(values, Tensor) and values.is_complex()):
            raise ValueError(f"{type(self).__name__}: y must hold real numbers, got complex ones")
        try:
            numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{type(self).__name__}: y must hold numbers: {error}") from error
        if numbers.ndim not in (1, 2) or not len(numbers) or (numbers.ndim == 2 and not numbers.shape[1]):
            raise ValueError(f"{type(self).__name__}: y must have shape (n,) or (n, t), got {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{type(self).__name__}: y must be finite; leave out networks without a target")
        return numbers


class SNEClassifier(ClassifierMixin, _SNEEstimator):
    """Classify networks by their weights, as an estimator of scikit-learn.

    y holds one class per network, of any values that can be sorted, or is the name of a column of the zoo. X, all
    parameters but `target_transform`, and the attributes are those of :class:`SNERegressor`.

    Attributes:
        classes_: the classes, `(k,)`, sorted.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> networks = [torch.nn.Linear(4, 2 + i % 2) for i in range(6)]
        >>> model = sne_fast.SNEClassifier(hidden_dim=32, epochs=2).fit(networks, ["two", "three"] * 3)
        >>> model.classes_.tolist(), model.predict_proba(networks).shape
        (['three', 'two'], (6, 2))
    """

    def fit(self, X: Any, y: Any) -> SNEClassifier:
        """Train on networks and classes `(n,)`, and return the estimator.

        Raises:
            TypeError: X is one network, or no sequence.
            ValueError: a network that cannot be packed, classes that are missing or of which there is only one, or a
                parameter out of its range.
        """
        labels = self._labels(X, y)
        self.classes_, places = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"SNEClassifier: y must hold at least 2 classes, got {self.classes_.tolist()}")
        self._fit(
            X,
            torch.from_numpy(places.astype(np.int64)),
            [str(place) for place in places],
            out_features=len(self.classes_),
            target_names=[str(name) for name in self.classes_],
            loss="cross_entropy",
        )
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every class, `(n, k)` in the order of `classes_`."""
        return self._predict(X)[0]

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of every network, `(n,)`."""
        places = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[places])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy of the predictions; y as in `fit`."""
        return float(super().score(X, self._labels(X, y), sample_weight))

    def _labels(self, X: Any, y: Any) -> np.ndarray:
        labels = self._columns(X, y)
        labels = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"SNEClassifier: y must have shape (n,), got {labels.shape}")
        if any(label is None or label != label for label in labels.tolist()):
            raise ValueError("SNEClassifier: y must name a class for every network; leave out networks without one")
        return labels
