"""Share of the time in which processes that train together have work: `bench/busy_share.py --help`.

Plans epochs of three mixes of networks as `sne_fast.training.fit` does, at its default budget, and counts weights: the
time of a step is taken as that of the process with the most of them. Nothing is trained and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sne_fast.reports.machine import machine
from sne_fast.training import FitSettings
from sne_fast.training.planning import Plan

OUT = Path(__file__).parent / "results" / "busy_share.json"
PROCESSES = (1, 2, 8, 64)
NETWORKS = 20_000


def mixes(networks: int = NETWORKS) -> dict[str, Tensor]:
    """Return the numbers of weights of the networks of each mix."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(networks, generator=generator)
    spread = torch.rand(networks, generator=generator)
    return {
        "4,970 weights each": torch.full((networks,), 4970),
        "2k to 60k, uniform": (2_000 + 58_000 * share).long(),
        "10k to 10M, log-uniform": (10 ** (4 + 3 * spread)).long(),
    }


class Sizes:
    """Networks of which only the sizes are known."""

    def __init__(self, sizes: Tensor) -> None:
        self.sizes, self.targets = sizes, torch.zeros(len(sizes), 1)

    def order(self, generator: torch.Generator) -> list[int]:
        """Return all positions in a random order."""
        return torch.randperm(len(self.sizes), generator=generator).tolist()

    def parts(self, rows: Any) -> Any:
        """Refuse to read."""
        raise NotImplementedError

    def network_name(self, row: int) -> str:
        """Return a name."""
        return f"network {row}"

    def fingerprint(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def plan_of(sizes: Tensor, processes: int, accumulate: int = 1) -> Plan:
    """Return the plan of one epoch at the default budget."""
    return Plan(Sizes(sizes), FitSettings(epochs=1, accumulate=accumulate), processes)


def main() -> None:
    """Print the shares, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    rows = []
    for name, sizes in mixes().items():
        for accumulate in (1, 4):
            plans = {str(n): plan_of(sizes, n, accumulate) for n in PROCESSES}
            found = {n: round(plan.busy_share(0), 4) for n, plan in plans.items()}
            split = {n: sum(len(plan.split_places(step)) for step in plan.epoch(0)) for n, plan in plans.items()}
            rows.append({"networks": name, "accumulate": accumulate, "busy share by processes": found, "split": split})
            print(f"{name:26} accumulate {accumulate}  " + "  ".join(f"{n}: {v:.3f}" for n, v in found.items()))
    about = {
        "what": "weights of all processes over processes times those of the busiest, summed over the steps of an epoch",
        "batch_weights": FitSettings().batch_weights,
        "networks": NETWORKS,
        "weights": {name: math.floor(sizes.double().mean()) for name, sizes in mixes().items()},
        "split": "networks that the plan splits by layers count as if every process got layers to its fill",
    }
    out.write_text(json.dumps({"about": about, "rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
