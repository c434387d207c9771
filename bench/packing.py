"""Time from the headers of many small checkpoints to a batch, and what encoding them spends outside the encoder.

    python bench/packing.py [--networks 1000] [--out bench/results/packing.json]

Files of three architectures with about 10,000 weights each are packed one by one, as a loop over files does, 20 at once
and all at once, in turn, after the values were checked to be the same. Then `embed_unit` encodes them, and its wall
time is held against the sum of the encoder's own calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import sne_fast
from sne_fast.atomic_files import write_json
from sne_fast.embedding import embed_unit, manifest, plan
from sne_fast.reports.machine import machine


def architectures() -> list[Callable[[], nn.Module]]:
    """Return what makes networks of about 10,000 weights."""
    return [
        lambda: nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 48), nn.ReLU(), nn.Linear(48, 10)),
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 26, 3),
            nn.Linear(26, 10),
        ),
        lambda: nn.Sequential(nn.Embedding(60, 32), nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)),
    ]  # fmt: skip


def packed_by(encoder: sne_fast.SNE, files: list[Path], each: int) -> sne_fast.WeightBatch:
    """Pack so many files at once."""
    parts = [encoder.pack(files[i : i + each]) for i in range(0, len(files), each)]
    return sne_fast.WeightBatch.cat(parts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=64, set_attention="isab").eval()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(arguments.networks):
            make = architectures()[i % 3]
            files.append(Path(folder) / f"{i}.safetensors")
            save_file(make().state_dict(), files[-1])
        found = packing(encoder, files, arguments.rounds) | {"encoding": encoding(encoder, files)}
    result = {"networks": len(files), **found, "machine": {**machine(), "note": arguments.note}}
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)


def packing(encoder: sne_fast.SNE, files: list[Path], rounds: int) -> dict[str, Any]:
    """Time packing in three ways, in turn."""
    ways = {"one by one": 1, "20 at once": 20, "all at once": len(files)}
    batches = [packed_by(encoder, files, each) for each in ways.values()]
    if not all(torch.equal(batch.values, batches[0].values) for batch in batches):
        raise RuntimeError("the ways of packing give different values")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, each in ways.items():
            start = time.process_time()
            packed_by(encoder, files, each)
            seconds[way].append((time.process_time() - start) / len(files))
    return {
        "weights": batches[0].num_weights,
        "cpu microseconds per network": {way: statistics.median(taken) * 1e6 for way, taken in seconds.items()},
        "one by one, over all at once": statistics.median(
            one / whole for one, whole in zip(seconds["one by one"], seconds["all at once"], strict=True)
        ),
    }


def encoding(encoder: sne_fast.SNE, files: list[Path]) -> dict[str, Any]:
    """Time `embed_unit`, and the calls of the encoder in it."""
    inside = 0.0
    forward = encoder.forward

    def timed(*arguments: Any) -> torch.Tensor:
        nonlocal inside
        start = time.perf_counter()
        z = forward(*arguments)
        inside += time.perf_counter() - start
        return z

    units = plan(manifest([file.parent for file in files[:1]]))
    embed_unit(encoder, units[0])  # a first time, which compiles and loads
    encoder.forward = timed  # type: ignore[method-assign]
    start = time.perf_counter()
    rows = sum(embed_unit(encoder, unit).num_rows for unit in units)
    whole = time.perf_counter() - start
    del encoder.forward
    if rows != len(files):
        raise RuntimeError(f"{rows} of {len(files)} networks were encoded")
    return {"wall seconds": whole, "in the encoder": inside, "share outside the encoder": 1 - inside / whole}


if __name__ == "__main__":
    main()
