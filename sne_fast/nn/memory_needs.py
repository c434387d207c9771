"""Memory and time that encoding a network layer by layer takes, from the sizes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..data.layer_stream import LayerStream
from .bounded_memory import ROWS

__all__ = ["Need", "attention_seconds", "describe", "memory_needed"]

_BASE = 64 * 2**20  # folded parameters, buffers of files
_MATRICES = 12  # of a run of rows that are there at once, besides one per head
_PAIR = 1.25e-8  # seconds of one core for a pair of chunks in both blocks, h = 64 (12.2 s for 31,250 chunks)


class Need(NamedTuple):
    """Bytes that are needed at once, and the layer that needs them: its name and its weights."""

    total: float
    layer: str
    weights: int


def memory_needed(
    stream: LayerStream, config: Mapping[str, Any], max_chunks: int | None = None, itemsize: int = 4
) -> Need:
    """Return the bytes that encoding layer by layer needs at its peak, and for which layer.

    A layer needs its bytes as they are stored while it is packed, its values, pointers, and a vector per chunk, of
    which stage 2 with `"sab"` holds six. The next layer is read meanwhile.

    Args:
        stream: the network.
        config: of the encoder.
        max_chunks: chunks of a tensor that are encoded; None is all.
        itemsize: bytes of a parameter of the encoder.
    """
    stored, sizes = stream.stored_bytes(), stream.tensor_sizes()
    counts = stream.chunk_counts(config["chunk_size"], config["chunking"])
    copies = (1.25 if config["set_attention"] == "isab" else 6.0) + (0.0 if max_chunks is None else 0.5)
    vector = itemsize * config["hidden_dim"]
    base = _BASE + (ROWS["cpu"] * vector * (_MATRICES + config["num_heads"]) if config["chunks"] else 0)
    worst = Need(0.0, "", 0)
    for i, (held, tensors, chunks) in enumerate(zip(stored, sizes, counts, strict=True)):
        weights = sum(tensors)
        encoded = sum(chunks if max_chunks is None else (min(n, max_chunks) for n in chunks))
        packed = float(itemsize) * weights + 32.0 * sum(chunks)
        vectors = vector * copies * encoded if config["chunks"] else 0.0
        # While it is packed, a copy in its own dtype may be there as well.
        total = packed + max(2.0 * held, vectors) + (stored[i + 1] if i + 1 < len(stored) else 0)
        if total + base > worst.total:
            worst = Need(total + base, stream.network.layers[i].name, weights)
    return worst


def describe(label: str, need: Need, allowed: float, config: Mapping[str, Any], max_chunks: int | None) -> str:
    """Return the sentence that says what is needed, what may be used, and what would help."""
    remedies = []
    if config["set_attention"] != "isab":
        remedies.append("an encoder with set_attention='isab'")
    if max_chunks is None and config["chunks"]:
        remedies.append("max_chunks= (--max-chunks), which encodes a sample of its chunks")
    remedies.append("a larger max_memory= (--max-memory) where more is free")
    return (
        f"{label}: encoding needs {_gib(need.total)} for layer {need.layer!r} of {need.weights:,} weights, and "
        f"{_gib(allowed)} may be used; what would help: {', or '.join(remedies)}"
    )


def attention_seconds(stream: LayerStream, config: Mapping[str, Any], max_chunks: int | None = None) -> float:
    """Estimate the seconds of one core that attention between all chunks of each tensor takes."""
    most = float("inf") if max_chunks is None else max_chunks
    layers = stream.chunk_counts(config["chunk_size"], config["chunking"])
    counts = [min(count, most) for layer in layers for count in layer]
    pairs = sum(count * count for count in counts)
    return float(_PAIR * config["hidden_dim"] / 64 * pairs)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
