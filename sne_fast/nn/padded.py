"""The encoder as a user would write it, padded and eager.

It proves that padding changes nothing (:mod:`sne_fast.reference` offers it), and is the baseline of benchmarks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ISAB, MAB, PMA, SAB
from .position_codes import position_code, reversed_position_code
from .statistics_channel import LARGEST

if TYPE_CHECKING:
    from ..data.batch import WeightBatch
    from .encoder import SNE
    from .stages import ChunkEncoder, TensorEncoder


def _padded(rows: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Pad sets of rows ``(rows, ...)`` with zeros to ``(S, longest, ...)``; return the mask ``(S, longest)`` too."""
    length = ptr.diff()
    place = torch.arange(int(length.max()) if length.numel() else 0, device=rows.device)
    mask = place < length[:, None]
    padded = rows.new_zeros((*mask.shape, *rows.shape[1:]))
    padded[mask] = rows
    return padded, mask


def _padded_mab(mab: MAB, q_in: Tensor, k_in: Tensor, mask: Tensor) -> Tensor:
    """Apply a MAB to dense ``q_in (S, a, dq)``, ``k_in (S, l, dk)``; keys outside ``mask (S, l)`` are ignored."""
    q, k, v = (
        fc(t).unflatten(-1, (mab.num_heads, -1)).transpose(1, 2)
        for fc, t in ((mab.fc_q, q_in), (mab.fc_k, k_in), (mab.fc_v, k_in))
    )
    logits = (q @ k.mT / math.sqrt(mab.dim_v)).masked_fill(~mask[:, None, None, :], -math.inf)
    o = q + torch.softmax(logits, dim=-1) @ v
    return mab.feed_forward(o.transpose(1, 2).flatten(2))


def _padded_block(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    if isinstance(block, SAB):
        return _padded_mab(block.mab, x, x, mask)
    assert isinstance(block, ISAB)
    points = _padded_mab(block.mab0, block.I.expand(x.shape[0], -1, -1), x, mask)
    return _padded_mab(block.mab1, x, points, mask.new_ones(points.shape[:2]))


def _padded_pool(pool: PMA, x: Tensor, mask: Tensor) -> Tensor:
    return _padded_mab(pool.mab, pool.S.expand(x.shape[0], -1, -1), x, mask)[:, 0]


class PaddedSNE(nn.Module):
    """The encoder as a user would write it: the same modules and weights, every level padded to its longest set.

    Args:
        encoder: the :class:`sne_fast.SNE` whose parameters it shares.

    Forward takes a :class:`sne_fast.WeightBatch` and returns z ``(B, out_features)``, equal to the encoder's; memory
    grows with the longest chunk, tensor, layer and network of the batch.

    Example::

        >>> encoder = sne_fast.SNE(hidden_dim=32)
        >>> batch = encoder.pack([torch.nn.Linear(4, 3)])
        >>> torch.testing.assert_close(PaddedSNE(encoder)(batch), encoder(batch))
    """

    def __init__(self, encoder: SNE) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: WeightBatch) -> Tensor:
        """Encode a batch to z ``(B, out_features)``."""
        encoder = self.encoder
        dtype = encoder.sample_parameter.dtype
        level = position_code(batch.layer_level, encoder.hidden_dim, dtype)  # [L, h]
        tensor_level = torch.repeat_interleave(level, batch.layer_ptr.diff(), dim=0)  # [T, h]
        parts = []
        if encoder.chunk_encoder is not None and encoder.tensor_encoder is not None:
            parts.append(self._tensors(encoder.chunk_encoder, encoder.tensor_encoder, batch, tensor_level))
        pooled = None
        if encoder.tensor_statistics is not None:
            channel, type_code = encoder.tensor_statistics, encoder.type_embedding(batch.tensor_type)
            standard = (channel.columns_of(batch).to(dtype) - channel.mean) / channel.std
            a = F.relu(channel.hidden(torch.cat([standard.clamp(-LARGEST, LARGEST), type_code, tensor_level], 1)))
            parts.append(channel.to_tensor(a))
            a, mask = _padded(channel.to_pool(a), batch.layer_ptr[batch.network_ptr])  # [B, longest, 2h]
            pooled = a.sum(1) / mask.sum(1, keepdim=True)
        x = sum(parts[1:], parts[0])  # [T, h]
        for stage, ptr in ((encoder.layer_encoder, batch.layer_ptr), (encoder.network_encoder, batch.network_ptr)):
            if stage is encoder.network_encoder:
                x = x + stage.code_gain * level
            x, mask = _padded(x, ptr)
            for block in stage.blocks:
                x = _padded_block(block, x, mask)
            x = _padded_pool(stage.pool, x, mask)
        return (x if pooled is None else torch.cat([x, pooled], 1)).to(dtype)

    def _tensors(self, stage1: ChunkEncoder, stage2: TensorEncoder, batch: WeightBatch, tensor_level: Tensor) -> Tensor:
        """Encode the chunks of every tensor to ``(T, h)``; ``tensor_level (T, h)`` is ``P(level)``."""
        c, dtype, width, device = batch.chunk_size, tensor_level.dtype, tensor_level.shape[1], batch.values.device
        tensor_code = self.encoder.type_embedding(batch.tensor_type) + tensor_level
        chunk_code = torch.repeat_interleave(tensor_code, batch.tensor_ptr.diff(), dim=0)[:, None, :]  # [N, 1, h]
        if stage1.element_order:
            chunk_code = chunk_code + reversed_position_code(torch.arange(c, device=device), width, dtype)  # [N, c, h]
        x, mask = _padded(batch.values[:, None], batch.chunk_ptr)  # [N, longest, 1]
        x = F.pad(x, (0, 0, 0, c - x.shape[1]))
        mask = F.pad(mask, (0, c - mask.shape[1]))
        for block in stage1.blocks[:2]:
            x = _padded_block(block, x, mask)
        x = x + stage1.code_gain * chunk_code
        for block in stage1.blocks[2:]:
            x = _padded_block(block, x, mask)
        x, mask = _padded(_padded_pool(stage1.pool, x, mask), batch.tensor_ptr)  # [T, longest, h]
        for block in stage2.blocks:
            x = _padded_block(block, x, mask)
        magnitude = batch.tensor_scale.log().to(dtype)[:, None] * stage2.magnitude_code
        code = (tensor_level + magnitude)[:, None, :]
        if stage2.chunk_order:
            code = code + reversed_position_code(torch.arange(x.shape[1], device=device), width, dtype)
        return _padded_pool(stage2.pool, x + stage2.code_gain * code, mask)  # [T, h]
