"""Which predictions a task makes, and the names of their files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .definitions import Experiment


@dataclass(frozen=True)
class Run:
    """One prediction: an experiment, a row of its table, a seed, and the share of the training networks."""

    experiment: Experiment
    method: str
    seed: int
    share: float = 1.0

    def path(self, out: Path) -> Path:
        """Its files without their suffixes: `.json`, `.npz`, and while it trains `.pt`; the share in thousandths."""
        size = "" if self.share == 1 else f"-share{1000 * self.share:.0f}"
        return out / "runs" / slug(self.experiment.name) / f"{slug(self.method)}-seed{self.seed}{size}"


def slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
