"""Train on a zoo ten times larger than memory may grow: `bench/large_zoo.py --help`.

Makes a zoo of random networks in shards, and trains a predictor of the spread of their weights in a process of its own,
which limits its own data segment (RLIMIT_DATA) to what it holds with everything loaded plus the limit. It tells its
peak of resident memory (VmHWM), and that packing the zoo under the same limit fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sne_fast import SNE, Predictor
from sne_fast.benchmark.memory import peak_bytes
from sne_fast.free_memory import parse_bytes, shown_bytes
from sne_fast.reports.machine import machine
from sne_fast.training import FitSettings, fit
from sne_fast.zoo import Zoo, ZooDataset, ZooWriter, pack_options

OUT = Path(__file__).parent / "results" / "large_zoo.json"
SHAPES = {"0.weight": (256, 256), "0.bias": (256,), "2.weight": (256, 256), "2.bias": (256,)}
WEIGHTS = sum(torch.Size(shape).numel() for shape in SHAPES.values())
HELD_OUT = 10  # every tenth network validates


def make(folder: Path, networks: int, per_shard: int) -> None:
    """Write a zoo of random networks whose label is the logarithm of the spread of their weights."""
    generator = torch.Generator().manual_seed(0)
    with ZooWriter(folder, source="bench/large_zoo.py", targets=["spread"]) as writer:
        for first in range(0, networks, per_shard):
            count = min(per_shard, networks - first)
            spread = torch.rand(count, generator=generator) - 0.5
            scale = spread.exp()
            stacked = {
                name: torch.randn(count, *shape, generator=generator) * scale.view(-1, *[1] * len(shape))
                for name, shape in SHAPES.items()
            }
            rows = [(f"n{first + i:07d}", {"spread": spread[i].item()}) for i in range(count)]
            writer.add_group(f"{first:07d}", first, stacked, rows)


def train(folder: Path, limit: int, epochs: int) -> dict[str, Any]:
    """Train in this process, whose data may grow by `limit` bytes, and return what was measured."""
    zoo = Zoo.open(folder)
    zoo.source.mapped_bytes = limit // 4  # type: ignore[attr-defined]
    torch.manual_seed(0)
    predictor = Predictor(SNE(hidden_dim=32, statistics="tensor", chunks=False), target_names=["spread"])
    settings = FitSettings(epochs=epochs, batch_weights=min(1_000_000, limit // 64))

    def part(rows: list[int]) -> ZooDataset:
        return ZooDataset(zoo[rows], "spread", pack_options(predictor))

    fit(predictor, part([0, 1]), settings=FitSettings(epochs=1), validation=part([2]))  # loads what is loaded once
    known = part([i for i in range(len(zoo)) if i % HELD_OUT])
    watched = part(list(range(0, len(zoo), HELD_OUT)))
    loaded = peak_bytes()
    most = _data_bytes() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    begin = time.perf_counter()
    history = fit(predictor, known, settings=settings, validation=watched)
    found = {
        "seconds": time.perf_counter() - begin,
        "validation_loss": history.validation_loss,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
    }
    try:
        predictor.pack(zoo)
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises the second
        why = str(error).splitlines()[0].partition(" from file")[0]
        return {**found, "all at once": f"{type(error).__name__}: {why[:200]}"}
    return {**found, "all at once": "fits"}


def _data_bytes() -> int:
    """Return the bytes that RLIMIT_DATA counts."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))


def main() -> None:
    """Make the zoo, train on it in a process of its own, and write what that has measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the zoo, made if missing")
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("4G"), help="of the zoo, 4G")
    parser.add_argument("--limit", type=parse_bytes, help="by which the data of the process may grow, size / 10")
    parser.add_argument("--shard", type=parse_bytes, default=parse_bytes("16M"), help="size of a shard, 16M")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="train in this process and print what was measured")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    limit = options.limit or options.size // 10
    if options.here:
        print(json.dumps(train(options.folder, limit, options.epochs)))
        return
    if not options.folder.exists():
        make(options.folder, options.size // (4 * WEIGHTS), max(1, options.shard // (4 * WEIGHTS)))
    same = [str(options.folder), "--limit", str(limit), "--epochs", str(options.epochs), "--here"]
    done = subprocess.run([sys.executable, __file__, *same], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    zoo = Zoo.open(options.folder)
    held = 4 * int(zoo.sizes.sum())
    grown = found["peak_bytes"] - found["loaded_bytes"]
    print(
        f"{len(zoo)} networks of {shown_bytes(held)}: peak {shown_bytes(found['peak_bytes'])}, "
        f"{shown_bytes(grown)} more than loaded; limit {shown_bytes(limit)}; {found['seconds']:.0f} s for "
        f"{options.epochs} epochs, validation and statistics; all at once: {found['all at once']}"
    )
    about = {"networks": len(zoo), "zoo_bytes": held, "limit_bytes": limit, "epochs": options.epochs}
    options.out.write_text(json.dumps({**about, **found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
