"""Encoders with random parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sne_fast
from helpers.networks import randomise_

F64 = torch.float64


def encoder_for(config: dict[str, Any], dtype: torch.dtype = F64, seed: int = 0) -> nn.Module:
    """Make an encoder without a zero among its parameters; without layer norm every block would double the rows."""
    encoder = randomise_(
        sne_fast.SNE(**{"order": "definition", **config}), seed, 1.0 if config.get("layer_norm", True) else 0.35
    ).to(dtype)
    assert all(p.count_nonzero() == p.numel() for p in encoder.parameters())
    return encoder
