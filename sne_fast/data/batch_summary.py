"""What was left out of the networks of a batch, in one line."""

from __future__ import annotations

import re
from collections import Counter

from .batch import WeightBatch
from .names import Skipped

__all__ = ["skipped_summary", "summary_of"]

_TAKEN = ("quantised weight", "adapter")  # whose values are there in another form
_KINDS = (  # of what readers of files say, in the words that count
    (re.compile(r"no tensor \("), "plain value"),
    (re.compile(r"an object of |the name "), "object of an unknown class"),
    (re.compile(r"an optimiser's state"), "optimiser state"),
    (re.compile(r"numbers beside"), "plain value"),
    (re.compile(r"a tensor beside"), "tensor beside the weights"),
    (re.compile(r"a moving average"), "moving average"),
    (re.compile(r"bookkeeping"), "entry of the training's bookkeeping"),
    (re.compile(r"the same tensors"), "repetition of the weights"),
    (re.compile(r".* by its name$"), "other file"),
)
_HEAD = re.compile(r"(.*?)( (?:of|beside) .*)?$")


def skipped_summary(batch: WeightBatch) -> str:
    """Return how many entries were left out of a batch's networks and what they are; "" if none.

    Args:
        batch: as `pack` made it, or parts of it; `batch.skipped` has the names.

    Returns:
        A line such as `left out: 12 num_batches_tracked counters, 2 masks`, the most frequent first. Tensors of which
        a weight was decoded or the canonical form of an adapter made are not counted: their values are there.
    """
    return summary_of(batch.skipped)


def summary_of(skipped: Skipped) -> str:
    """Return the line of `skipped_summary` for what was left out of networks that may be of many batches."""
    kinds = Counter(_kind(reason) for network in skipped for _, reason in network)
    for kind in _TAKEN:
        kinds.pop(kind, None)
    counts = [f"{count} {_plural(kind) if count > 1 else kind}" for kind, count in kinds.most_common()]
    return f"left out: {', '.join(counts)}" if counts else ""


def _kind(reason: str) -> str:
    return next((kind for said, kind in _KINDS if said.match(reason)), reason.partition(":")[0])


def _plural(kind: str) -> str:
    head, rest = _HEAD.fullmatch(kind).groups(default="")  # type: ignore[union-attr]
    return f"{head[:-1]}ies{rest}" if head.endswith("y") else f"{head}s{rest}"
