"""Boosted trees that predict targets from features, fitted by scikit-learn, kept as plain arrays.

As arrays they are saved without pickling, loaded from untrusted files, independent of the version of scikit-learn, and
predict without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..data.checkpoints import load_state_dict, save_state_dict
from ..extras import require
from ..nn.predictor import LOGIT_MARGIN

Link = Literal["identity", "sigmoid", "softmax"]

ABSENT = -1e3
"""Value of the features that a network lacks, NaN; far from all others, so that a tree can split it off."""
_BLOCK = 1 << 20
_ARRAYS = {"feature": torch.int64, "threshold": torch.float64, "left": torch.int64, "right": torch.int64,
           "value": torch.float64, "roots": torch.int64, "output": torch.int64, "base": torch.float64}  # fmt: skip


@dataclass(frozen=True)
class BoostedTrees:
    """Trees whose values add up: `link(base + sum over trees of the value of the leaf that a row of features reaches)`.

    A row goes from node i to `left[i]` if its feature `feature[i]`, as float32, is at most `threshold[i]`, else to
    `right[i]`. A leaf leads to itself; all other nodes lead to nodes behind them.

    Args:
        feature, threshold, left, right, value: of each of N nodes, `(N,)`; int64, float64, int64, int64, float64.
        roots: the first node of each of K trees, `(K,)` int64.
        output: the output that each tree adds to, `(K,)` int64.
        base: value of each output before any tree, `(outputs,)` float64.
        features: number of features.
        link: from sums to predictions; "sigmoid" of one output gives numbers in [0, 1], "softmax" probabilities.

    Raises:
        ValueError: arrays that are no trees.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray
    roots: np.ndarray
    output: np.ndarray
    base: np.ndarray
    features: int
    link: Link = "identity"

    def __post_init__(self) -> None:
        nodes, trees, outputs = len(self.feature), len(self.roots), len(self.base)
        of_nodes = (self.feature, self.threshold, self.left, self.right, self.value)
        alike = all(array.shape == (nodes,) for array in of_nodes) and self.output.shape == (trees,)
        if (
            not alike
            or self.roots.ndim != 1
            or self.base.ndim != 1
            or self.link not in ("identity", "sigmoid", "softmax")
        ):
            raise ValueError("BoostedTrees: the arrays must have one entry per node, tree and output")
        own = np.arange(nodes)
        leaf = self.left == own
        within = ((self.left >= own) & (self.left < nodes) & (self.right >= own) & (self.right < nodes)).all()
        if not within or ((self.right == own) != leaf).any():
            raise ValueError("BoostedTrees: left and right must lead to later nodes, and from leaves to themselves")
        for name, array, count in (
            ("feature", self.feature, self.features), ("roots", self.roots, nodes), ("output", self.output, outputs)
        ):  # fmt: skip
            if len(array) and not (array.min() >= 0 and array.max() < count):
                raise ValueError(f"BoostedTrees: {name} must lie in [0, {count}), got {array.min()} to {array.max()}")

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return predictions `(n,)` float64, or with "softmax" probabilities `(n, outputs)`, for `(n, features)`.

        NaN stands for features that a network lacks.

        Raises:
            ValueError: another number of features.
        """
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"BoostedTrees: features must be of shape (n, {self.features}), got {features.shape}")
        x = filled(features)
        size = max(1, _BLOCK // max(1, len(self.roots)))
        blocks = [self._sums(x[start : start + size]) for start in range(0, len(x), size)]
        sums = np.concatenate(blocks) if blocks else np.zeros((0, len(self.base)))
        if self.link == "softmax":
            powers = np.exp(sums - sums.max(1, keepdims=True, initial=-np.inf))
            return np.asarray(powers / powers.sum(1, keepdims=True))
        return np.asarray(1 / (1 + np.exp(-sums[:, 0])) if self.link == "sigmoid" else sums[:, 0])

    def _sums(self, x: np.ndarray) -> np.ndarray:
        rows = np.arange(len(x))[:, None]
        at = np.tile(self.roots, (len(x), 1))  # [n, K]
        while True:
            goes_left = x[rows, self.feature[at]] <= self.threshold[at]
            after = np.where(goes_left, self.left[at], self.right[at])
            if (after == at).all():
                break
            at = after
        sums = np.tile(self.base, (len(x), 1))
        for k in range(len(self.base)):
            sums[:, k] += self.value[at[:, self.output == k]].sum(1)
        return sums

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write the arrays as safetensors, with `features`, `link` and `about` in its metadata."""
        known = {"features": self.features, "link": self.link, **(about or {})}
        tensors = {name: torch.from_numpy(getattr(self, name)).to(dtype) for name, dtype in _ARRAYS.items()}
        save_state_dict(tensors, path, {"boosted_trees": json.dumps(known)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[BoostedTrees, dict[str, Any]]:
        """Read what `save` wrote: the trees, and what else is known of them.

        Raises:
            ValueError: the file is damaged or holds no trees.
        """
        from safetensors import safe_open

        tensors = load_state_dict(path)
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get("boosted_trees", "null")
        try:
            known = json.loads(text)
            features, link = known.pop("features"), known.pop("link")
            arrays = {name: tensors[name].numpy() for name, dtype in _ARRAYS.items() if tensors[name].dtype == dtype}
            return cls(**arrays, features=int(features), link=link), known
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"BoostedTrees: {os.fspath(path)!r} is damaged or holds no trees: {error}") from error


def fit_trees(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    seed: int = 0,
    logit: bool = False,
    classes: int = 0,
    max_features: float = 0.3,
) -> BoostedTrees:
    """Fit boosted trees with scikit-learn.

    Args:
        features: `(n, features)`; NaN stands for features that a network lacks.
        targets: `(n,)`.
        seed: of the boosting.
        logit: targets lie in [0, 1] and are modelled as logits, with the margin that the predictor has too.
        classes: number of classes, if targets are classes, whole numbers from 0.
        max_features: share of the features that each split of a regression tree chooses from.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    require("sklearn", extra="sklearn", why="fitting boosted trees")
    x = filled(features)
    if classes:
        return _fit_classes(x, targets.astype(np.int64), seed, classes)
    goals = np.asarray(targets, np.float64)
    if logit:
        goals = np.clip(goals, LOGIT_MARGIN, 1 - LOGIT_MARGIN)
        goals = np.log(goals / (1 - goals))
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=400, learning_rate=0.03, max_depth=4, subsample=0.5, max_features=max_features, random_state=seed
    ).fit(x, goals)
    trees = [tree.tree_ for tree in model.estimators_[:, 0]]
    rate = model.learning_rate
    nodes = [(t.feature, t.threshold, t.children_left, t.children_right, rate * t.value[:, 0, 0]) for t in trees]
    base = np.asarray(model.init_.constant_, np.float64).ravel()
    return _joined(nodes, [0] * len(trees), base, x.shape[1], "sigmoid" if logit else "identity")


def _fit_classes(x: np.ndarray, targets: np.ndarray, seed: int, classes: int) -> BoostedTrees:
    """Fit trees on histograms of features; classes without a network get the probability 0."""
    known = np.unique(targets)
    base = np.full(classes, -np.inf)
    if len(known) == 1:  # which the classifier refuses
        base[known] = 0.0
        return _joined([], [], base, x.shape[1], "softmax")
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.05, max_leaf_nodes=15, min_samples_leaf=5, early_stopping=False, random_state=seed
    ).fit(x, targets)
    start = np.asarray(model._baseline_prediction, np.float64).ravel()
    # Of two classes the trees give the logit of the second.
    base[known] = [0.0, *start] if len(known) == 2 else start
    places = known[1:] if len(known) == 2 else known
    nodes, outputs = [], []
    for of_round in model._predictors:
        for place, tree in zip(places, of_round, strict=True):
            n = tree.nodes
            leaf = n["is_leaf"].astype(bool)
            left, right = (np.where(leaf, -1, n[side].astype(np.int64)) for side in ("left", "right"))
            nodes.append((np.where(leaf, -2, n["feature_idx"]), n["num_threshold"], left, right, n["value"]))
            outputs.append(int(place))
    return _joined(nodes, outputs, base, x.shape[1], "softmax")


def _joined(
    trees: Sequence[tuple[np.ndarray, ...]], outputs: Sequence[int], base: np.ndarray, features: int, link: Link
) -> BoostedTrees:
    """Join trees whose children count from their own root, -1 at leaves."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("feature", "threshold", "left", "right", "value")}
    roots, first = [], 0
    for feature, threshold, left, right, value in trees:
        own, leaf = np.arange(len(feature)), np.asarray(left) < 0
        parts["feature"].append(np.where(leaf, 0, feature).astype(np.int64))
        parts["threshold"].append(np.where(leaf, 0.0, threshold).astype(np.float64))
        parts["left"].append(first + np.where(leaf, own, left).astype(np.int64))
        parts["right"].append(first + np.where(leaf, own, right).astype(np.int64))
        parts["value"].append(np.where(leaf, value, 0.0).astype(np.float64))
        roots.append(first)
        first += len(own)
    kinds = {"feature": np.int64, "threshold": np.float64, "left": np.int64, "right": np.int64, "value": np.float64}
    joined = {name: np.concatenate(p) if p else np.zeros(0, kinds[name]) for name, p in parts.items()}
    return BoostedTrees(
        **joined, roots=np.array(roots, np.int64), output=np.array(outputs, np.int64), base=base, features=features,
        link=link,
    )  # fmt: skip


def filled(features: np.ndarray) -> np.ndarray:
    """Return features as float32, as trees compare them, with `ABSENT` for NaN."""
    return np.where(np.isnan(features), ABSENT, features).astype(np.float32)
