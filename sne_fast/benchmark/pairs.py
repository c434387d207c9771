"""Interleaved measurement: in every round each contender runs once, so that noise hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from .contenders import Phases
from .limits import product_rate


class Pairs:
    """Rounds of the baselines, the machine's product rate, then the backend, in this order.

    `operations` are those of the backend's run that the limit counts. Call :meth:`before` and :meth:`backend` in turn
    (as the setup and the target of pytest-benchmark's `pedantic`), or :meth:`run`.
    """

    def __init__(
        self, backend: Callable[[], Phases], baselines: Mapping[str, Callable[[], Phases]], operations: float
    ) -> None:
        self._backend, self._baselines, self.operations = backend, dict(baselines), operations
        self.runs: dict[str, list[Phases]] = {name: [] for name in ("sne_fast", *self._baselines)}
        self.rates: list[float] = []

    @property
    def rounds(self) -> int:
        """Number of rounds so far."""
        return len(self.runs["sne_fast"])

    def before(self) -> None:
        """Run the baselines and measure the machine's product rate."""
        for name, run in self._baselines.items():
            self.runs[name].append(run())
        self.rates.append(product_rate())

    def backend(self) -> None:
        """Run this package once, right after :meth:`before`."""
        self.runs["sne_fast"].append(self._backend())

    def run(self, rounds: int) -> None:
        """Run rounds of all contenders."""
        for _ in range(rounds):
            self.before()
            self.backend()

    def seconds(self, phase: str = "total") -> dict[str, float]:
        """Return the median seconds of every contender."""
        return {name: median(run[phase] for run in runs) for name, runs in self.runs.items()}

    def ratios(self, phase: str = "total") -> dict[str, float]:
        """Return by baseline how many times longer it took than the backend beside it, median over the rounds."""
        backend = self.runs["sne_fast"]
        return {
            name: median(slow[phase] / fast[phase] for slow, fast in zip(runs, backend, strict=True))
            for name, runs in self.runs.items()
            if name != "sne_fast"
        }

    def fraction(self, phase: str = "total") -> float:
        """Return the fraction of the product rate, measured just before, that the backend reached; a median."""
        return median(
            self.operations / run[phase] / rate for run, rate in zip(self.runs["sne_fast"], self.rates, strict=True)
        )

    def summary(self, phase: str = "total") -> dict[str, Any]:
        """Return everything above, for the JSON."""
        return {
            "rounds": self.rounds,
            "seconds": self.seconds(phase),
            "ratios": self.ratios(phase),
            "fraction_of_limit": self.fraction(phase),
            "fraction_of_best_product": self.operations / self.seconds(phase)["sne_fast"] / max(self.rates),
            "product_rate_median": median(self.rates),
            "product_rate_best": max(self.rates),
        }
