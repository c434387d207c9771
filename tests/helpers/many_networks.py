"""Small networks and encoders for tests of many networks."""

from __future__ import annotations

import torch

from sne_fast import SNE


def network(seed: int, width: int = 8, depth: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(depth):
        state[f"layers.{i}.weight"] = torch.randn(width, width, generator=generator)
        state[f"layers.{i}.bias"] = torch.randn(width, generator=generator)
    return state


def encoder_of(**options: object) -> SNE:
    torch.manual_seed(0)
    return SNE(hidden_dim=16, num_heads=2, chunk_size=8, set_attention="isab", **options).eval()  # type: ignore[arg-type]
