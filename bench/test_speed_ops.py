"""The op chunk_encode against the machine's product rate, measured in the same rounds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from suite import Suite, describe

from sne_fast.benchmark import CASES, FORWARDS_PER_STEP, Pairs
from sne_fast.benchmark.contenders import Phases

TRAINING = {"forward": False, "training": True}


@pytest.mark.parametrize("mode", TRAINING)
@pytest.mark.parametrize("name", ["zoo", "mixed"])
def test_chunk_encode(name: str, mode: str, suite: Suite, benchmark: Any) -> None:
    """Time the forward, or forward and backward counted as four forwards, on the chunks of a case."""
    loaded = suite.load(CASES[name])
    stage, batch, training = loaded.encoder.chunk_encoder, loaded.batch, TRAINING[mode]
    code = torch.randn(len(batch.tensor_type), loaded.encoder.hidden_dim, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        direction = torch.randn_like(stage.pooled_rows(batch, code))

    def run() -> Phases:
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            pooled = stage.pooled_rows(batch, code)
        if training:
            pooled.backward(direction)
        return {"total": time.perf_counter() - start}

    run()
    pairs = Pairs(run, {}, loaded.operations * (FORWARDS_PER_STEP if training else 1))
    suite.measure(benchmark, pairs, 2 * suite.rounds)
    loaded.encoder.zero_grad()
    describe(benchmark, loaded, f"chunk_encode {mode}", {**pairs.summary(), "skipped": {}})
