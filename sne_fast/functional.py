"""The ops as functions, with checks, autocast and gradients; see :mod:`sne_fast.ops.functional`."""

from .ops.functional import (
    chunk_encode,
    feed_forward,
    gather_chunks,
    pool_block,
    segment_pool,
    set_attention,
    set_block,
    tensor_statistics,
)

__all__ = [
    "chunk_encode",
    "feed_forward",
    "gather_chunks",
    "pool_block",
    "segment_pool",
    "set_attention",
    "set_block",
    "tensor_statistics",
]
