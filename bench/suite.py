"""State shared by the benchmark's tests: checked cases, training rounds, memory probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sne_fast import SNE, WeightBatch
from sne_fast.benchmark import (
    FORWARDS_PER_STEP,
    Case,
    Check,
    Contender,
    DoesNotFit,
    Pairs,
    check_agreement,
    chunk_operations,
    contender,
    probe,
    run_check,
)

SMALL = 10_000  # weights


@dataclass
class Loaded:
    """A case that passed its check, at the size asked for."""

    case: Case
    encoder: SNE
    batch: WeightBatch
    check: Check
    agreed: set[str] = field(default_factory=set)  # baselines whose output equalled the backend's

    @property
    def operations(self) -> float:
        return chunk_operations(self.batch, self.encoder.hidden_dim)


@dataclass
class Steps:
    """Interleaved training steps of a case; `skipped` says why a baseline is missing."""

    pairs: Pairs
    skipped: dict[str, str]


@dataclass
class Suite:
    rounds: int
    size: str
    backend: str
    threads: int
    memory_limit: float
    baselines: tuple[str, ...]
    training_baselines: tuple[str, ...]
    _checks: dict[str, Check | Exception] = field(default_factory=dict)
    _loaded: Loaded | None = None
    _steps: dict[str, Steps] = field(default_factory=dict)

    def check(self, case: Case) -> Check:
        """Check the backend on a case, once; raise again what the check raised."""
        if case.name not in self._checks:
            try:
                self._checks[case.name] = run_check(case, self.backend, "tiny" if self.size == "tiny" else "check")
            except Exception as error:
                self._checks[case.name] = error
        found = self._checks[case.name]
        if isinstance(found, Exception):
            raise found
        return found

    def load(self, case: Case) -> Loaded:
        """Check first, then load; one case is held at a time."""
        check = self.check(case)
        if self._loaded is None or self._loaded.case.name != case.name:
            self._loaded = None
            self._steps.clear()
            encoder = case.encoder()
            self._loaded = Loaded(case, encoder, case.batch(encoder, self.size), check)
        return self._loaded

    def rounds_of(self, case: Case) -> int:
        """Return the number of rounds of a case: more where one takes milliseconds, fewer where it takes minutes."""
        few = self._loaded is not None and self._loaded.batch.num_weights < SMALL
        return min(self.rounds * (10 if few and self.rounds > 2 else 1), case.rounds or 10 * self.rounds)

    def contenders(
        self, loaded: Loaded, names: tuple[str, ...], training: bool
    ) -> tuple[Any, dict[str, Any], dict[str, str]]:
        """Return the contender under test, the baselines that fit, and why others do not; all have agreed once."""

        def make(name: str) -> Contender:
            return contender(
                name, loaded.encoder, loaded.batch,
                backend=self.backend, training=training, memory_limit=self.memory_limit,
            )  # fmt: skip

        backend, fitting, skipped = make("sne_fast"), {}, {}
        for name in names:
            try:
                fitting[name] = make(name)
            except DoesNotFit as refusal:
                skipped[name] = str(refusal)
        if not fitting and loaded.case.rounds == 1:  # minutes long: no warm-up of its own
            return backend, fitting, skipped
        z = backend.output()
        if not torch.isfinite(z).all():
            raise RuntimeError(f"{loaded.case.name}: the backend's output is not finite; nothing is reported")
        for name, baseline in list(fitting.items()):
            try:  # also the warm-up; the padded training of a large case is too long to warm up more than this
                z_baseline = z if name in loaded.agreed else baseline.output()
                if training and name == "compile":
                    baseline.step()
            except Exception as error:
                if name != "compile":
                    raise
                # Inductor needs a compiler at run time; without one the others still count.
                skipped[name] = f"torch.compile failed: {str(error).splitlines()[0][:200]}"
                del fitting[name]
            else:
                if name not in loaded.agreed:
                    check_agreement(loaded.case, name, z, z_baseline)
                    loaded.agreed.add(name)
        if training and loaded.batch.num_weights < 1_000_000:
            backend.step()
        return backend, fitting, skipped

    def steps(self, case: Case) -> Steps:
        if case.name not in self._steps:
            loaded = self.load(case)
            backend, fitting, skipped = self.contenders(loaded, self.training_baselines, training=True)
            pairs = Pairs(
                backend.step, {name: b.step for name, b in fitting.items()}, FORWARDS_PER_STEP * loaded.operations
            )
            self._steps[case.name] = Steps(pairs, skipped)
        return self._steps[case.name]

    def at_full_size(self) -> Suite:
        """Return a suite for scaling cases, whose own names give their size."""
        return dataclasses.replace(self, size="full")

    def measure(self, benchmark: Any, pairs: Pairs, rounds: int) -> None:
        """Run rounds of `pairs`; pytest-benchmark times the run of this package."""
        benchmark.pedantic(pairs.backend, setup=pairs.before, rounds=rounds)

    def probe(self, case: Case, mode: str, name: str) -> dict[str, Any]:
        return probe(
            case.name, mode, name,
            size=self.size, backend=self.backend, threads=self.threads, limit=self.memory_limit,
        )  # fmt: skip


def describe(benchmark: Any, loaded: Loaded, mode: str, result: Mapping[str, Any]) -> None:
    """Store what the report reads; without a passed check it reads nothing."""
    benchmark.group = loaded.case.name
    benchmark.extra_info.update(
        case=loaded.case.name,
        title=loaded.case.title,
        mode=mode,
        networks=len(loaded.batch),
        weights=loaded.batch.num_weights,
        set_attention=loaded.case.set_attention,
        check={**dataclasses.asdict(loaded.check), "passed": loaded.check.passed},
        **result,
    )
