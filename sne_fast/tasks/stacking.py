"""Stacking: the mean of a predictor and of boosted trees on the statistics of all tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.networks import Networks
from ..nn.predictor import Predictor
from ..nn.pretrained import DIGEST, read_config
from ..training import predict
from ..zoo.statistics import layer_statistics
from .trees import BoostedTrees, fit_trees

FILE = "trees-{}.safetensors"
"""Name of the file of the trees of one output, beside the files of the predictor; classes have one file."""
_NEAREST = 1e-6


def average_predictions(predictions: Sequence[np.ndarray], logit: bool = False) -> np.ndarray:
    """Return the mean of several methods' predictions.

    Args:
        predictions: arrays of one shape, `(n,)`, `(n, outputs)` or probabilities `(n, classes)`.
        logit: predictions lie in [0, 1], and their logits are averaged.

    Raises:
        ValueError: no predictions, or arrays of different shapes.

    Example:
        >>> import numpy as np
        >>> average_predictions([np.array([0.5]), np.array([0.9])], logit=True).round(3)
        array([0.75])
    """
    arrays = [np.asarray(p, np.float64) for p in predictions]
    if not arrays or any(array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays) or "none"
        raise ValueError(f"average_predictions: predictions must be arrays of one shape, got {shapes}")
    if not logit:
        return np.asarray(np.mean(arrays, 0))
    inside = [array.clip(_NEAREST, 1 - _NEAREST) for array in arrays]
    mean = np.mean([np.log(array / (1 - array)) for array in inside], 0)
    return np.asarray(1 / (1 + np.exp(-mean)))


class StackedPredictor:
    """The mean of a predictor and of boosted trees on the 23 statistics of every tensor.

    Numbers are averaged as they are, those that the predictor models as logits (`target_transform="logit"` or
    `loss="bce"`) in logits, classes in probabilities. For a predictor of architectures never seen, whose preparation is
    relative, the trees get the 19 statistics that do not name a size, of the last two layers and the whole network.
    Trees are kept as arrays, so that a saved one loads without unpickling and predicts without scikit-learn.

    Args:
        predictor: a trained predictor.
        trees: those of each output, or one of all classes.
        layers: number of layers from the front whose statistics the trees get.

    Example::

        >>> networks = [torch.nn.Linear(4, 3) for _ in range(8)]
        >>> predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32))
        >>> stacked = StackedPredictor.fit(predictor, predictor.pack(networks).detach(), torch.rand(8, 1))
        >>> stacked.save_pretrained("model")
        >>> StackedPredictor.from_pretrained("model")(networks[:2]).shape
        torch.Size([2, 1])
    """

    def __init__(self, predictor: Predictor, trees: Sequence[BoostedTrees], layers: int) -> None:
        self.predictor, self.trees, self.layers = predictor, tuple(trees), layers
        wanted = 1 if predictor.loss == "cross_entropy" else len(predictor.target_names)
        if len(self.trees) != wanted:
            raise ValueError(f"StackedPredictor: trees must be {wanted}, one for each output, got {len(self.trees)}")

    @classmethod
    def fit(
        cls,
        predictor: Predictor,
        batch: WeightBatch,
        targets: Tensor,
        *,
        rows: Sequence[int] | None = None,
        seed: int = 0,
    ) -> StackedPredictor:
        """Fit the trees to the networks that a predictor was trained on.

        Args:
            predictor: a trained predictor.
            batch: n networks, packed by `predictor.pack`; those of training and validation, which trees do not need
                apart.
            targets: `(n, outputs)`, or classes `(n,)`.
            rows: positions of the networks to fit; all by default.
            seed: of the boosting.

        Raises:
            ModuleNotFoundError: scikit-learn is missing.
            ValueError: not one row of targets for each network.
        """
        values = targets.detach().cpu().double().numpy()
        if len(values) != len(batch):
            raise ValueError(
                f"StackedPredictor: targets must have {len(batch)} rows, one per network, got {len(values)}"
            )
        chosen = np.arange(len(batch)) if rows is None else np.asarray(rows, np.int64)
        known = predictor.prepare(batch)[chosen.tolist()]
        layers = 0 if _is_relative(predictor) else int(known.network_ptr_host.diff().max())
        features = _features(predictor, known, layers)
        if predictor.loss == "cross_entropy":
            trees = [fit_trees(features, values[chosen], seed=seed, classes=len(predictor.target_names))]
        else:
            logit = _in_logits(predictor)
            trees = [fit_trees(features, column, seed=seed, logit=logit) for column in values[chosen].T]
        return cls(predictor, trees, layers)

    def __call__(self, networks: WeightBatch | Networks) -> Tensor:
        """Predict `(B, outputs)` in the targets' units, on the CPU; `networks` as for :class:`sne_fast.Predictor`."""
        predictor = self.predictor
        batch = predictor.prepare(networks if isinstance(networks, WeightBatch) else predictor.pack(networks))
        with torch.no_grad():
            own = predict(predictor, batch)[0].cpu()
        of_trees = self.predict_trees(batch)
        mean = average_predictions([own.double().numpy(), of_trees], logit=_in_logits(predictor))
        return torch.from_numpy(mean).to(own.dtype)

    def predict_trees(self, batch: WeightBatch) -> np.ndarray:
        """Return what the trees alone predict, `(B, outputs)` float64."""
        features = _features(self.predictor, self.predictor.prepare(batch), self.layers)
        found = [trees.predict(features) for trees in self.trees]
        return found[0] if self.predictor.loss == "cross_entropy" else np.stack(found, 1)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the predictor as :meth:`sne_fast.Predictor.save_pretrained` does, which reads it alone, and the trees.

        The trees are arrays in files of safetensors, so that loading them runs no code.
        """
        folder = Path(save_directory)
        self.predictor.save_pretrained(folder)
        for i, trees in enumerate(self.trees):
            trees.save(folder / FILE.format(i), {"layers": self.layers, DIGEST: read_config(folder).get(DIGEST)})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> StackedPredictor:
        """Load what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: no such folder, or one without trees.
            ValueError: a damaged file, or trees that do not fit the predictor.
        """
        if not (Path(folder) / FILE.format(0)).is_file():
            raise FileNotFoundError(f"StackedPredictor: {os.fspath(folder)!r} has no {FILE.format(0)}")
        predictor = Predictor.from_pretrained(folder, device=device)
        count = 1 if predictor.loss == "cross_entropy" else len(predictor.target_names)
        found = [BoostedTrees.load(Path(folder) / FILE.format(i)) for i in range(count)]
        written = read_config(folder).get(DIGEST)
        if any(about.get(DIGEST) != written for _, about in found):
            raise ValueError(
                f"StackedPredictor: the trees in {os.fspath(folder)!r} were saved with another predictor than the one "
                "there; save both again"
            )
        layers = {about.get("layers") for _, about in found}
        if len(layers) != 1 or type(number := layers.pop()) is not int or number < 0:
            raise ValueError(f"StackedPredictor: the trees in {os.fspath(folder)!r} must say how many layers they get")
        return cls(predictor, [trees for trees, _ in found], number)


def _in_logits(predictor: Predictor) -> bool:
    return predictor.target_transform == "logit" or predictor.loss == "bce"


def _is_relative(predictor: Predictor) -> bool:
    return bool(predictor.preparation.relative)


def _features(predictor: Predictor, batch: WeightBatch, layers: int) -> np.ndarray:
    return layer_statistics(batch, layers, "relative" if _is_relative(predictor) else "all")
