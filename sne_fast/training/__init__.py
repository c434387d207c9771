"""Training of predictors on packed networks: `fit`, on one process or several, its batches and splits."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from ..data.weight_budgets import batches_by_weights, network_sizes, shards_by_weights, stratified_split
    from .estimators import SNEClassifier, SNERegressor
    from .loop import Augment, fit, predict
    from .progress import CsvLog, TensorBoardLog
    from .settings import FitSettings, History
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "..data.weight_budgets": [
                "batches_by_weights",
                "network_sizes",
                "shards_by_weights",
                "stratified_split",
            ],
            ".estimators": ["SNEClassifier", "SNERegressor"],
            ".loop": ["Augment", "fit", "predict"],
            ".progress": ["CsvLog", "TensorBoardLog"],
            ".settings": ["FitSettings", "History"],
        },
    )

__all__ = [
    "Augment",
    "CsvLog",
    "FitSettings",
    "History",
    "SNEClassifier",
    "SNERegressor",
    "TensorBoardLog",
    "batches_by_weights",
    "fit",
    "network_sizes",
    "predict",
    "shards_by_weights",
    "stratified_split",
]
