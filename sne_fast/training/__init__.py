"""Training on packed networks: `fit` of predictors, `fit_contrastive` of encoders without labels, and their batches."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from ..data.buckets import pad_to_bucket
    from ..data.weight_budgets import batches_by_weights, network_sizes, shards_by_weights, stratified_split
    from .calibration import calibrate
    from .child_views import ChildViews, children_of
    from .contrastive import Contrastive, ContrastiveModel, linear_probe
    from .contrastive_fit import fit_contrastive
    from .estimators import SNEClassifier, SNERegressor
    from .loop import fit
    from .objective import Augment
    from .prediction import predict
    from .progress import CsvLog, TensorBoardLog
    from .recipe_predictors import augmentation_of, make_predictor, preparation_of
    from .recipes import RECIPES, TrainingRecipe, find_recipe
    from .settings import FitSettings, History
    from .streams import NetworkStream
    from .views import Views
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "..data.buckets": ["pad_to_bucket"],
            "..data.weight_budgets": [
                "batches_by_weights",
                "network_sizes",
                "shards_by_weights",
                "stratified_split",
            ],
            ".calibration": ["calibrate"],
            ".child_views": ["ChildViews", "children_of"],
            ".contrastive": ["Contrastive", "ContrastiveModel", "linear_probe"],
            ".contrastive_fit": ["fit_contrastive"],
            ".estimators": ["SNEClassifier", "SNERegressor"],
            ".loop": ["fit"],
            ".objective": ["Augment"],
            ".prediction": ["predict"],
            ".progress": ["CsvLog", "TensorBoardLog"],
            ".recipe_predictors": ["augmentation_of", "make_predictor", "preparation_of"],
            ".recipes": ["RECIPES", "TrainingRecipe", "find_recipe"],
            ".settings": ["FitSettings", "History"],
            ".streams": ["NetworkStream"],
            ".views": ["Views"],
        },
    )

__all__ = [
    "RECIPES",
    "Augment",
    "ChildViews",
    "Contrastive",
    "ContrastiveModel",
    "CsvLog",
    "FitSettings",
    "History",
    "NetworkStream",
    "SNEClassifier",
    "SNERegressor",
    "TensorBoardLog",
    "TrainingRecipe",
    "Views",
    "augmentation_of",
    "batches_by_weights",
    "calibrate",
    "children_of",
    "find_recipe",
    "fit",
    "fit_contrastive",
    "linear_probe",
    "make_predictor",
    "network_sizes",
    "pad_to_bucket",
    "predict",
    "preparation_of",
    "shards_by_weights",
    "stratified_split",
]
