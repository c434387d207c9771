"""Forward, training step, backward and peak memory of every case, backend against baselines in the same rounds."""

from __future__ import annotations

from typing import Any

import pytest
from suite import Suite, describe

from sne_fast.benchmark import CASES, Case, Pairs, contender

EVERY = list(CASES.values())
TRAINED = [case for case in EVERY if case.trains]


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_forward(case: Case, suite: Suite, benchmark: Any) -> None:
    loaded = suite.load(case)
    backend, fitting, skipped = suite.contenders(loaded, suite.baselines, training=False)
    pairs = Pairs(backend.forward, {name: b.forward for name, b in fitting.items()}, loaded.operations)
    suite.measure(benchmark, pairs, suite.rounds_of(case))
    describe(benchmark, loaded, "forward", {**pairs.summary(), "skipped": skipped})


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_training(case: Case, suite: Suite, benchmark: Any) -> None:
    """Time one step: forward, backward, Adam."""
    steps = suite.steps(case)
    suite.measure(benchmark, steps.pairs, suite.rounds_of(case))
    phases = {phase: steps.pairs.seconds(phase) for phase in ("forward", "backward", "optimizer")}
    describe(
        benchmark, suite.load(case), "training", {**steps.pairs.summary(), "phases": phases, "skipped": steps.skipped}
    )


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_backward(case: Case, suite: Suite, benchmark: Any) -> None:
    """Time the backend alone; ratios are those of the backward phases of the interleaved training steps."""
    loaded, steps = suite.load(case), suite.steps(case)
    if not steps.pairs.rounds:
        steps.pairs.run(suite.rounds_of(case))
    backend = contender("sne_fast", loaded.encoder, loaded.batch, backend=suite.backend, training=True, memory_limit=0)
    benchmark.pedantic(
        lambda loss: loss.backward(), setup=lambda: ((backend.loss(),), {}), rounds=suite.rounds_of(case)
    )
    summary = steps.pairs.summary("backward")
    for share in ("fraction_of_limit", "fraction_of_best_product"):  # a backward is three of the step's four forwards
        summary[share] *= 3 / 4
    describe(benchmark, loaded, "backward", {**summary, "skipped": steps.skipped})


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_memory(case: Case, suite: Suite, benchmark: Any) -> None:
    """Measure the peak memory above that of the loaded batch, each contender in a process of its own."""
    mode = "training" if case.trains else "forward"
    loaded = suite.load(case)
    names = ("sne_fast", *(name for name in suite.baselines if name == "eager"))
    found: dict[str, dict[str, Any]] = {}

    def run() -> None:
        found["sne_fast"] = suite.probe(case, mode, "sne_fast")

    benchmark.pedantic(run, rounds=1)
    for name in names[1:]:
        found[name] = suite.probe(case, mode, name)
    describe(
        benchmark, loaded, f"memory of {mode}",
        {
            "peak_bytes": {name: f["peak_bytes"] for name, f in found.items() if "peak_bytes" in f},
            "loaded_bytes": found["sne_fast"]["loaded_bytes"],
            "probe_seconds": {name: f["seconds"] for name, f in found.items() if "seconds" in f},
            "skipped": {name: f["skipped"] for name, f in found.items() if "skipped" in f},
        },
    )  # fmt: skip
