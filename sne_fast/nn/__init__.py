"""The modules: set-attention blocks, the encoder and the predictor on top of it."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .blocks import ISAB, MAB, PMA, SAB
    from .encoder import SNE
    from .layer_encodings import LayerEncodings
    from .predictor import Predictor, PredictorHead
    from .preparation import Preparation
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            ".blocks": ["ISAB", "MAB", "PMA", "SAB"],
            ".encoder": ["SNE"],
            ".layer_encodings": ["LayerEncodings"],
            ".predictor": ["Predictor", "PredictorHead"],
            ".preparation": ["Preparation"],
        },
    )

__all__ = ["ISAB", "MAB", "PMA", "SAB", "SNE", "LayerEncodings", "Predictor", "PredictorHead", "Preparation"]
