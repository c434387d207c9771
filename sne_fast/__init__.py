"""Set-based Neural Network Encoder (SNE): one vector for the weights of any network, with fused kernels.

Names and subpackages are imported when they are first used: `import sne_fast` alone does not import torch.
"""

from typing import TYPE_CHECKING

from .lazy import attach
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import backends as backends
    from . import benchmark as benchmark
    from . import cli as cli
    from . import data as data
    from . import embedding as embedding
    from . import functional as functional
    from . import nn as nn
    from . import ops as ops
    from . import reference as reference
    from . import reports as reports
    from . import similarity as similarity
    from . import symmetry as symmetry
    from . import tasks as tasks
    from . import training as training
    from . import zoo as zoo
    from .data.batch import WeightBatch
    from .data.checkpoints import CheckpointError
    from .data.packing import pack
    from .data.tensor_statistics import tensor_statistics
    from .nn.blocks import ISAB, MAB, PMA, SAB
    from .nn.encoder import SNE
    from .nn.layer_encodings import LayerEncodings
    from .nn.predictor import Predictor, PredictorHead
    from .ops.dispatch import BackendError, explain, use_backend
    from .training.estimators import SNEClassifier, SNERegressor
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            ".data.batch": ["WeightBatch"],
            ".data.checkpoints": ["CheckpointError"],
            ".data.packing": ["pack"],
            ".data.tensor_statistics": ["tensor_statistics"],
            ".nn.blocks": ["ISAB", "MAB", "PMA", "SAB"],
            ".nn.encoder": ["SNE"],
            ".nn.layer_encodings": ["LayerEncodings"],
            ".nn.predictor": ["Predictor", "PredictorHead"],
            ".ops.dispatch": ["BackendError", "explain", "use_backend"],
            ".training.estimators": ["SNEClassifier", "SNERegressor"],
        },
        submodules=[
            "backends", "benchmark", "cli", "data", "embedding", "functional", "nn", "ops", "reference", "reports",
            "similarity", "symmetry", "tasks", "training", "zoo",
        ],
    )  # fmt: skip


__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "SNE",
    "BackendError",
    "CheckpointError",
    "LayerEncodings",
    "Predictor",
    "PredictorHead",
    "SNEClassifier",
    "SNERegressor",
    "WeightBatch",
    "explain",
    "pack",
    "tensor_statistics",
    "use_backend",
]
