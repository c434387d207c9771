"""Widths and heads that the backends have kernels for; the reference takes any."""

from __future__ import annotations

WIDTHS = (32, 64, 128, 256)
WIDEST_ROW = 1024
"""Largest width of the rows that ``set_block`` projects."""


def width_reasons(h: int, heads: int | None = None) -> list[str]:
    """Return why no backend has kernels for width h and, where the op has heads, ``heads``; empty if they have."""
    if h not in WIDTHS:
        return [f"width must be one of {', '.join(map(str, WIDTHS))}, got {h}"]
    if heads is not None and (heads < 1 or heads & (heads - 1) or h % heads or not 8 <= h // heads <= 64):
        return [f"num_heads must be a power of two with {h}/num_heads in 8..64, got {heads}"]
    return []


def block_width_reasons(dim_q: int, dim_k: int, h: int, heads: int) -> list[str]:
    """Return why no backend has a kernel for a block of width h on rows of widths ``dim_q`` and ``dim_k``."""
    reasons = width_reasons(h, heads)
    for name, dim in (("q", dim_q), ("k", dim_k)):
        if dim % 16 or not 0 < dim <= WIDEST_ROW:
            reasons.append(f"{name} must have rows of a multiple of 16 up to {WIDEST_ROW}, got {dim}")
    return reasons


def pool_width_reasons(h: int) -> list[str]:
    """Return why no backend has a kernel for pooling rows of width h; empty if they have."""
    return [f"width must be a multiple of 16, got {h}"] if h % 16 or not h else []
