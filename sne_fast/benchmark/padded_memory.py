"""Memory that the padded eager encoder would need, predicted, and memory that it may use."""

from __future__ import annotations

from ..data.batch import WeightBatch
from ..free_memory import available_bytes
from ..nn.encoder import SNE

RESERVE = 0.8
"""Share of the memory now available that a baseline may use by default."""


def padded_bytes(encoder: SNE, batch: WeightBatch, training: bool) -> float:
    """Predict the peak memory of :class:`sne_fast.reference.PaddedSNE` in float32, without parameters, in bytes.

    Per attention block of S sets with a queries and l keys: the weights `(S, H, a, l)` and the rows
    `(S, max(a, l), h)`. A forward pass holds two of the former and ten of the latter of its largest block; training
    keeps one and sixteen of every block, and one more of the largest while it goes back (fitted to measured peaks).
    """
    width, heads = encoder.hidden_dim, encoder.config["num_heads"]
    induced = encoder.config["num_inducing"] if encoder.config["set_attention"] == "isab" else None
    blocks: list[tuple[float, float]] = []  # bytes of weights and rows of each block

    def attention(sets: int, queries: int, keys: int) -> None:
        blocks.append((4.0 * sets * heads * queries * keys, 4.0 * sets * max(queries, keys) * width))

    for _ in range(4):
        attention(batch.chunk_ptr.shape[0] - 1, batch.chunk_size, batch.chunk_size)
    for ptr in (batch.tensor_ptr_host, batch.layer_ptr_host, batch.network_ptr_host):
        lengths = ptr.diff()
        sets, longest = lengths.numel(), int(lengths.max()) if lengths.numel() else 0
        for _ in range(2):
            if induced is None:
                attention(sets, longest, longest)
            else:
                attention(sets, induced, longest)
                attention(sets, longest, induced)
    largest = max(2 * weights + 10 * rows for weights, rows in blocks)
    if not training:
        return largest
    return sum(weights + 16 * rows for weights, rows in blocks) + max(weights for weights, _ in blocks)


def default_memory_limit() -> float:
    """Return the bytes that a baseline may use by default, a share of what is available."""
    return RESERVE * available_bytes()
