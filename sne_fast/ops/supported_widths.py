"""Widths and heads that the backends have kernels for (SPEC 5); the reference takes any."""

from __future__ import annotations

WIDTHS = (32, 64, 128, 256)


def width_reasons(h: int, heads: int | None = None) -> list[str]:
    """Why no backend has kernels for width h, split into ``heads`` where the op has heads; empty if they have."""
    if h not in WIDTHS:
        return [f"width must be one of {', '.join(map(str, WIDTHS))}, got {h}"]
    if heads is not None and (heads < 1 or heads & (heads - 1) or h % heads or not 8 <= h // heads <= 64):
        return [f"num_heads must be a power of two with {h}/num_heads in 8..64, got {heads}"]
    return []
