"""The plain PyTorch reference: the ops, to which every backend is held, and the encoder as padded eager modules."""

from .nn.padded import PaddedSNE
from .ops.reference import (
    chunk_encode,
    chunk_encode_backward,
    feed_forward,
    feed_forward_backward,
    gather_chunks,
    gather_chunks_backward,
    pool_block,
    pool_block_backward,
    segment_pool,
    segment_pool_backward,
    set_attention,
    set_attention_backward,
    set_block,
    set_block_backward,
    tensor_statistics,
)

__all__ = [
    "PaddedSNE",
    "chunk_encode",
    "chunk_encode_backward",
    "feed_forward",
    "feed_forward_backward",
    "gather_chunks",
    "gather_chunks_backward",
    "pool_block",
    "pool_block_backward",
    "segment_pool",
    "segment_pool_backward",
    "set_attention",
    "set_attention_backward",
    "set_block",
    "set_block_backward",
    "tensor_statistics",
]
