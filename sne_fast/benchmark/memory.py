"""Peak memory of a forward pass or training step, measured in a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from typing import Any

import torch

from ..atomic_files import to_json
from ..data.batch import WeightBatch
from .cases import find_case
from .contenders import DoesNotFit
from .contenders import contender as make_contender


def probe(
    case: str, mode: str, contender: str, *, size: str = "full", backend: str = "auto", threads: int, limit: float
) -> dict[str, Any]:
    """Run one forward pass or training step of a case in a fresh process.

    Returns:
        `seconds`, `peak_bytes` (its highest resident memory above `loaded_bytes`, what the process held with encoder
        and batch loaded and a first small batch done), `weights`; or `{"skipped": why}` where a baseline does not fit.

    Raises:
        RuntimeError: the process failed.
    """
    # Not `-m`: from a checkout's own folder that would import the checkout, which has no C++ backend.
    start = f"import sys; sys.path[:] = [p for p in sys.path if p]; from {__name__} import main; main()"
    command = [
        sys.executable, "-c", start, case, mode, contender,
        "--size", size, "--backend", backend, "--threads", str(threads), "--limit", str(limit),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory probe of {case} {mode} {contender} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> float:
    """Return the highest resident memory of this process."""
    try:
        # Linux: not ru_maxrss, which starts at the peak of the process that started this one
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _reset_peak() -> None:
    """Give back what is free and, on Linux, let the high-water mark start again from here."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
    except (OSError, AttributeError, TypeError):
        pass  # elsewhere the mark of loading stays: peaks below it are not seen


def main() -> None:
    """Run one case in this process and print what it took as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("mode", choices=["forward", "training"])
    parser.add_argument("contender")
    parser.add_argument("--size", default="full")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=float("inf"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = find_case(options.case)
    encoder = case.encoder()

    def run(batch: WeightBatch) -> float:
        training = options.mode == "training"
        entrant = make_contender(
            options.contender, encoder, batch, backend=options.backend, training=training, memory_limit=options.limit
        )
        return (entrant.step() if training else entrant.forward())["total"]

    run(case.batch(encoder, "tiny"))
    encoder.zero_grad()
    batch = case.batch(encoder, options.size)
    _reset_peak()
    loaded = peak_bytes()
    try:
        seconds = run(batch)
    except DoesNotFit as refusal:
        print(to_json({"skipped": str(refusal)}, indent=None))
        return
    found = {"seconds": seconds, "peak_bytes": peak_bytes() - loaded, "loaded_bytes": loaded}
    print(to_json({**found, "weights": batch.num_weights}, indent=None))
