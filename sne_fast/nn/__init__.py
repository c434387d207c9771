"""The modules: set-attention blocks, the encoder and the predictor on top of it."""

from .blocks import ISAB, MAB, PMA, SAB
from .encoder import SNE
from .predictor import Predictor, PredictorHead

__all__ = ["ISAB", "MAB", "PMA", "SAB", "SNE", "Predictor", "PredictorHead"]
