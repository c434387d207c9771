"""Set-based Neural Network Encoder (SNE): one vector for the weights of any network, with fused kernels."""

from .data.batch import WeightBatch
from .data.checkpoints import CheckpointError
from .data.packing import pack
from .nn.blocks import ISAB, MAB, PMA, SAB
from .nn.encoder import SNE
from .nn.predictor import Predictor, PredictorHead
from .ops.dispatch import BackendError, explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "SNE",
    "BackendError",
    "CheckpointError",
    "Predictor",
    "PredictorHead",
    "WeightBatch",
    "explain",
    "pack",
    "use_backend",
]
