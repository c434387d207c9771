"""Widths and heads that the backends have kernels for; the reference takes any."""

from __future__ import annotations

WIDTHS = (32, 64, 128, 256)


def width_reasons(h: int, heads: int | None = None) -> list[str]:
    """Return why no backend has kernels for width h and, where the op has heads, ``heads``; empty if they have."""
    if h not in WIDTHS:
        return [f"width must be one of {', '.join(map(str, WIDTHS))}, got {h}"]
    if heads is not None and (heads < 1 or heads & (heads - 1) or h % heads or not 8 <= h // heads <= 64):
        return [f"num_heads must be a power of two with {h}/num_heads in 8..64, got {heads}"]
    return []


def pool_width_reasons(h: int) -> list[str]:
    """Return why no backend has a kernel for pooling rows of width h; empty if they have."""
    return [f"width must be a multiple of 16, got {h}"] if h % 16 or not h else []
