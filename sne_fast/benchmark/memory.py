"""Peak memory, measured in a process of its own, and the memory that the padded form would need, predicted."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from typing import Any

from ..data.batch import WeightBatch
from ..nn.encoder import SNE

RESERVE = 0.8
"""The share of the memory now available that a baseline may use by default."""


# ---------------------------------------------------------------------------------------------------------- prediction


def padded_bytes(encoder: SNE, batch: WeightBatch, training: bool) -> float:
    """Predicted peak of :class:`sne_fast.reference.PaddedSNE` in float32, without parameters: bytes.

    Per attention block of S sets with a queries and l keys: the weights `(S, H, a, l)` and the rows
    `(S, max(a, l), h)`. A forward pass holds two of the former and ten of the latter of its largest block; training
    keeps one and sixteen of every block, and one more of the largest while it goes back (fitted to measured peaks).
    """
    width, heads = encoder.hidden_dim, encoder.config["num_heads"]
    induced = encoder.config["num_inducing"] if encoder.config["set_attention"] == "isab" else None
    blocks: list[tuple[float, float]] = []  # bytes of weights and rows of each block

    def attention(sets: int, queries: int, keys: int) -> None:
        blocks.append((4.0 * sets * heads * queries * keys, 4.0 * sets * max(queries, keys) * width))

    for _ in range(4):
        attention(batch.chunk_ptr.shape[0] - 1, batch.chunk_size, batch.chunk_size)
    for ptr in (batch.tensor_ptr_host, batch.layer_ptr_host, batch.network_ptr_host):
        lengths = ptr.diff()
        sets, longest = lengths.numel(), int(lengths.max()) if lengths.numel() else 0
        for _ in range(2):
            if induced is None:
                attention(sets, longest, longest)
            else:
                attention(sets, induced, longest)
                attention(sets, longest, induced)
    largest = max(2 * weights + 10 * rows for weights, rows in blocks)
    if not training:
        return largest
    return sum(weights + 16 * rows for weights, rows in blocks) + max(weights for weights, _ in blocks)


def available_bytes() -> float:
    """Memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4.0 * 2**30


def default_memory_limit() -> float:
    return RESERVE * available_bytes()


# --------------------------------------------------------------------------------------------------------- measurement


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


def _peak_bytes() -> float:
    """The highest resident memory of this process."""
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
    import torch

    from .cases import find_case
    from .contenders import DoesNotFit, contender

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
        entrant = contender(
            options.contender, encoder, batch, backend=options.backend, training=training, memory_limit=options.limit
        )
        return (entrant.step() if training else entrant.forward())["total"]

    run(case.batch(encoder, "tiny"))
    encoder.zero_grad()
    batch = case.batch(encoder, options.size)
    _reset_peak()
    loaded = _peak_bytes()
    try:
        seconds = run(batch)
    except DoesNotFit as refusal:
        print(json.dumps({"skipped": str(refusal)}))
        return
    found = {"seconds": seconds, "peak_bytes": _peak_bytes() - loaded, "loaded_bytes": loaded}
    print(json.dumps({**found, "weights": batch.num_weights}))
