"""Cost of the statistics of tensors beside a forward pass of the encoder, on the CPU.

python bench/statistics_cost.py             # writes bench/results/cpu_statistics.json
python bench/statistics_cost.py --rounds 2 --show

Every round runs a forward pass of the case's encoder without statistics, then the op `tensor_statistics` on the same
batch, with the same number of threads. Before it, the op is compared with the reference in float64: on the smaller form
of a case, since the reference takes minutes for large matrices, and on one matrix of every size from 65 to 512 rows or
columns that the timed form has, whose spectral norms the op finds by iteration and the smaller form lacks. CPU time is
that of all threads of the process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sne_fast
from sne_fast.atomic_files import to_json, write_json
from sne_fast.benchmark import CASES
from sne_fast.benchmark.cases import Case
from sne_fast.data.batch import WeightBatch
from sne_fast.reports.machine import machine

RESULT = Path(__file__).parent / "results" / "cpu_statistics.json"
NAMES = ("zoo", "mixed", "resnet")
TOLERANCE = 1e-5


def statistics(batch: WeightBatch, backend: str) -> torch.Tensor:
    """Compute the statistics anew, which a batch would keep."""
    fresh = batch.with_fields(values=batch.values)
    with sne_fast.use_backend(backend):
        found: torch.Tensor = sne_fast.tensor_statistics(fresh)
    return found


def iterated(case: Case) -> list[WeightBatch]:
    """Return one matrix of every smaller side from 65 to 512 that the timed form of a case has."""
    found: dict[int, torch.Tensor] = {}
    for network in case.networks("full"):
        state = network.state_dict() if isinstance(network, torch.nn.Module) else network
        for w in state.values():
            side = min(w.shape[0], w[0].numel()) if w.dim() > 1 else 0
            if 64 < side <= 512:
                found.setdefault(side, w)
    return [sne_fast.pack([{"weight": w}]).detach() for w in found.values()]


def error(batches: list[WeightBatch]) -> float | None:
    """Return the largest difference between the op and the reference, None without batches."""
    return max((float((statistics(b, "cpu") - statistics(b, "reference")).abs().max()) for b in batches), default=None)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Check one case, then time it."""
    case = CASES[name]
    encoder = case.encoder()
    errors = {
        "largest_error": error([case.batch(encoder, "check")]),
        "largest_error_iterated": error(iterated(case)),
    }
    for found in errors.values():
        if found is not None and not found <= TOLERANCE:
            raise SystemExit(f"{name}: statistics are off by {found:g}; not timed")
    batch = case.batch(encoder)
    times: dict[str, list[tuple[float, float]]] = {"forward": [], "statistics": []}
    with torch.no_grad(), sne_fast.use_backend("cpu"):
        encoder(batch)
        statistics(batch, "cpu")
        for _ in range(rounds):
            times["forward"].append(seconds(lambda: encoder(batch)))
            times["statistics"].append(seconds(lambda: statistics(batch, "cpu")))
    ratios = sorted(s[1] / f[1] for f, s in zip(times["forward"], times["statistics"], strict=True))
    return {
        "weights": batch.num_weights,
        **errors,
        "rounds": rounds,
        **{f"{what}_seconds": median(t[0] for t in taken) for what, taken in times.items()},
        **{f"{what}_cpu_seconds": median(t[1] for t in taken) for what, taken in times.items()},
        "share_of_forward": median(ratios),
        "share_of_forward_range": [ratios[0], ratios[-1]],
    }


def main() -> None:
    """Measure all cases and write the result, or show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--show", action="store_true", help="print the result instead of writing it")
    arguments = parser.parse_args()
    found = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "cases": {name: measure(name, arguments.rounds) for name in arguments.cases},
    }
    if arguments.show:
        print(to_json(found))
    else:
        write_json(RESULT, found)


if __name__ == "__main__":
    main()
