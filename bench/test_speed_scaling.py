"""Time and memory of a forward pass as batches grow: more networks, or one larger network with ISAB."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from suite import Loaded, Suite, describe

from sne_fast import WeightBatch
from sne_fast.benchmark import contender, scaling_case
from sne_fast.benchmark.cases import FAMILIES

SIZES = {
    "full": (100_000, 300_000, 1_000_000, 5_000_000, 30_000_000),
    "check": (30_000, 100_000, 300_000),
    "tiny": (5_000, 10_000),
}
FLAT_FROM = 1_000_000
LEAST_WEIGHTS = 1_000_000  # of one timing: smaller batches run several times
ROUNDS = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling(family: str, suite: Suite, benchmark: Any) -> None:
    """Time all sizes in every round, small ones repeated; then measure the memory of each in a process of its own."""
    sizes = SIZES[suite.size]
    cases = {weights: scaling_case(family, weights) for weights in sizes}
    suite.check(cases[sizes[0]])
    encoder = cases[sizes[0]].encoder()
    batches: dict[int, WeightBatch] = {weights: case.batch(encoder) for weights, case in cases.items()}
    seconds: dict[int, list[float]] = {weights: [] for weights in sizes}

    def run() -> None:
        for weights, batch in batches.items():
            backend = contender("sne_fast", encoder, batch, backend=suite.backend, training=False, memory_limit=0)
            repeats = max(1, min(LEAST_WEIGHTS, sizes[-1]) // weights)
            seconds[weights].append(sum(backend.forward()["total"] for _ in range(repeats)) / repeats)

    with torch.no_grad():
        encoder(batches[sizes[0]])
    benchmark.pedantic(run, rounds=min(ROUNDS, suite.rounds))
    held = {weights: batch.num_weights for weights, batch in batches.items()}
    loaded = Loaded(cases[sizes[-1]], encoder, batches[sizes[-1]], suite.check(cases[sizes[0]]))
    batches.clear()
    peaks = {w: suite.at_full_size().probe(case, "forward", "sne_fast")["peak_bytes"] for w, case in cases.items()}
    points = [
        {"weights": held[w], "seconds": median(seconds[w]), "peak_bytes": peaks[w], "runs": len(seconds[w])}
        for w in sizes
    ]
    per_weight = {w: [s / held[w] for s in seconds[w]] for w in sizes}
    # Round by round, so that noise that lasts a round cancels.
    first = next((w for w in sizes if w >= FLAT_FROM), sizes[0])
    growth = {
        str(w): median(a / b for a, b in zip(per_weight[w], per_weight[first], strict=True))
        for w in sizes
        if w >= first
    }
    describe(
        benchmark, loaded, f"scaling by {family}",
        {"family": family, "points": points, "time_per_weight_over_first": growth, "skipped": {}},
    )  # fmt: skip
