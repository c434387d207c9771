"""Training of predictors on packed networks: `fit`, on one process or several, its batches and splits."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from ..data.weight_budgets import batches_by_weights, network_sizes, shards_by_weights, stratified_split
    from .estimators import SNEClassifier, SNERegressor
    from .loop import fit
    from .objective import Augment
    from .prediction import predict
    from .progress import CsvLog, TensorBoardLog
    from .recipe_predictors import augmentation_of, make_predictor, preparation_of
    from .recipes import RECIPES, TrainingRecipe, find_recipe
    from .settings import FitSettings, History
    from .streams import NetworkStream
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
            ".loop": ["fit"],
            ".objective": ["Augment"],
            ".prediction": ["predict"],
            ".progress": ["CsvLog", "TensorBoardLog"],
            ".recipe_predictors": ["augmentation_of", "make_predictor", "preparation_of"],
            ".recipes": ["RECIPES", "TrainingRecipe", "find_recipe"],
            ".settings": ["FitSettings", "History"],
            ".streams": ["NetworkStream"],
        },
    )

__all__ = [
    "RECIPES",
    "Augment",
    "CsvLog",
    "FitSettings",
    "History",
    "NetworkStream",
    "SNEClassifier",
    "SNERegressor",
    "TensorBoardLog",
    "TrainingRecipe",
    "augmentation_of",
    "batches_by_weights",
    "find_recipe",
    "fit",
    "make_predictor",
    "network_sizes",
    "predict",
    "preparation_of",
    "shards_by_weights",
    "stratified_split",
]
