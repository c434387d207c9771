"""What was left out of the networks of a batch, in one line."""

from __future__ import annotations

from collections import Counter

from .batch import WeightBatch

__all__ = ["skipped_summary"]

_DECODED = "quantised weight"


def skipped_summary(batch: WeightBatch) -> str:
    """Return how many entries were left out of a batch's networks and what they are; "" if none.

    Args:
        batch: as `pack` made it, or parts of it; `batch.skipped` has the names.

    Returns:
        A line such as `left out: 12 num_batches_tracked counters, 2 masks`, the most frequent first. Tensors of which
        a weight was decoded are not counted: their values are there.
    """
    kinds = Counter(reason.partition(":")[0] for network in batch.skipped for _, reason in network)
    kinds.pop(_DECODED, None)
    counts = [f"{count} {_plural(kind) if count > 1 else kind}" for kind, count in kinds.most_common()]
    return f"left out: {', '.join(counts)}" if counts else ""


def _plural(kind: str) -> str:
    if kind.startswith("entry "):
        return kind.replace("entry", "entries", 1)
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
