"""Baselines beside a predictor of a zoo that does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights
from ..extras import installed
from ..zoo.dataset import ZooDataset
from ..zoo.statistics import layer_statistics
from .baselines import BASELINES
from .trees import fit_trees

MOST_FITTED = 20_000
"""Networks that trees are fitted to; more are drawn from at random."""
READ_WEIGHTS = 1_000_000


def stream_baselines(
    known: ZooDataset, test: ZooDataset, *, logit: bool, seed: int, classes: Sequence[str] | None
) -> dict[str, Tensor]:
    """Fit the baselines of `train_report.baselines` to streams, trees to a sample of at most `MOST_FITTED` networks.

    Args:
        known: the training and validation networks.
        test: the networks to predict.
        logit: targets lie in [0, 1] and are modelled as logits.
        seed: of the sample and of the boosting.
        classes: the names of the classes, None for numbers.

    Returns:
        Predictions of the test networks by the name of the baseline, `(n, t)` or probabilities `(n, classes)`; trees
        where scikit-learn is installed.
    """
    goals = known.targets.double()
    if classes is None:
        mean = goals.mean(0, keepdim=True).expand(len(test), -1)
    else:
        mean = torch.bincount(known.targets, minlength=len(classes)).double()[None].expand(len(test), -1) / len(goals)
    found = {BASELINES["mean"].name: mean}
    if not installed("sklearn"):
        return found
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:MOST_FITTED].sort().values
    rows = drawn.tolist()
    depth = max(int(batch.network_ptr_host.diff().max()) for _, batch in _read(known, rows))
    features = np.concatenate([layer_statistics(batch, depth) for _, batch in _read(known, rows)])
    columns = [goals] if classes is not None else goals.unbind(1)
    trees = [
        fit_trees(features, column[drawn].numpy(), seed=seed, logit=logit, classes=len(classes or ()))
        for column in columns
    ]
    parts = []
    for _, batch in _read(test, range(len(test))):
        of_batch = layer_statistics(batch, depth)
        predicted = [one.predict(of_batch) for one in trees]
        parts.append(predicted[0] if classes is not None else np.stack(predicted, 1))
    name = BASELINES["statistics"].name + (f", of {len(rows)} networks" if len(rows) < len(known) else "")
    return {**found, name: torch.from_numpy(np.concatenate(parts))}


def _read(networks: ZooDataset, rows: Sequence[int]) -> Iterator[tuple[list[int], WeightBatch]]:
    """Yield some networks in batches of bounded size, with their positions."""
    chosen = torch.tensor(list(rows), dtype=torch.int64)
    cut = [chosen[places].tolist() for places in batches_by_weights(networks.sizes[chosen], READ_WEIGHTS)]
    return zip(cut, networks.parts(cut), strict=True)
