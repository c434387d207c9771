"""Cost and use of buckets: how often the sizes of batches repeat, with padding and without; needs no GPU.

python bench/buckets.py                    # writes bench/results/buckets.json

Batches of `fit` over some epochs, of three collections: the CNNs of one architecture, networks of four architectures
with 1,153 to 210,304 weights, and multilayer perceptrons whose widths are drawn. Two batches are of one size where all
that launches depend on is equal. A step is replayed where its size came twice before and is among the graphs that are
kept.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sne_fast import WeightBatch
from sne_fast.atomic_files import write_json
from sne_fast.benchmark.cases import CASES
from sne_fast.benchmark.networks import Transformer, inr, randomise_, small_lenet, zoo_cnn
from sne_fast.data.buckets import bucket_of, pad_to_bucket
from sne_fast.reports.machine import machine
from sne_fast.training.capture import MOST_GRAPHS
from sne_fast.training.networks import PackedNetworks
from sne_fast.training.planning import Plan
from sne_fast.training.settings import FitSettings

OUT = Path(__file__).parent / "results" / "buckets.json"


def drawn_mlps(count: int) -> list[nn.Module]:
    """Return multilayer perceptrons of one to four hidden layers, of 8 to 96 units."""
    generator, found = np.random.default_rng(0), []
    for k in range(count):
        hidden = np.exp(generator.uniform(np.log(8), np.log(96), int(generator.integers(1, 5)))).astype(int).tolist()
        widths = [int(generator.integers(4, 64)), *hidden, 10]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        found.append(randomise_(nn.Sequential(*layers), seed=k))
    return found


def collections() -> dict[str, list[nn.Module]]:
    """Return the networks by the name of their collection."""
    mixed = [(inr, 160, ()), (zoo_cnn, 160, ()), (small_lenet, 40, ()), (Transformer, 20, (64, 64, 4, 4, 32))]
    return {
        "zoo": [randomise_(zoo_cnn(), seed=k) for k in range(640)],
        "mixed": [randomise_(make(*args), seed=k) for make, count, args in mixed for k in range(count)],
        "mlps": drawn_mlps(400),
    }


def lengths_of(batch: WeightBatch) -> Hashable:
    """Return what launches for a batch depend on that is not padded."""
    host = batch.pointers_host
    longest = tuple(int(ptr.diff().max()) for ptr in host.values())
    return (
        batch.num_weights,
        *(len(ptr) for ptr in host.values()),
        longest,
        tuple(host["chunk_ptr"].diff().bincount().tolist()),
    )


class Replays:
    """Counts steps that are replayed."""

    def __init__(self) -> None:
        self.seen: set[Hashable] = set()
        self.kept: OrderedDict[Hashable, None] = OrderedDict()
        self.first: set[Hashable] = set()
        self.replayed = 0

    def step(self, key: Hashable, epoch: int) -> None:
        """Take a step of a size."""
        if not epoch:
            self.first.add(key)
        if key in self.kept:
            self.replayed += 1
            self.kept.move_to_end(key)
        elif key in self.seen:
            self.replayed += 1  # as it is recorded
            self.kept[key] = None
            if len(self.kept) > MOST_GRAPHS:
                self.kept.popitem(last=False)
        self.seen.add(key)


def measured(batch: WeightBatch, budget: int, epochs: int) -> dict[str, Any]:
    """Return the counts of one collection."""
    settings = FitSettings(epochs=epochs, batch_weights=budget)
    plan = Plan(PackedNetworks(batch, torch.zeros(len(batch), 1)), settings)
    ways = {"plain": Replays(), "buckets": Replays()}
    sums, seconds, steps = np.zeros((2, 5)), 0.0, [0] * epochs
    for epoch in range(epochs):
        for (part,) in plan.epoch(epoch):
            one = batch[part]
            start = time.process_time()
            padded = pad_to_bucket(one)
            seconds += time.process_time() - start
            ways["plain"].step(lengths_of(one), epoch)
            ways["buckets"].step(bucket_of(padded), epoch)
            rows = (one.num_weights, one.num_chunks, one.num_tensors, one.num_layers, one.num_networks)
            sums += [rows, bucket_of(padded).rows]
            steps[epoch] += 1
    total = sum(steps)
    share = (sums[1] / sums[0] - 1).round(4).tolist()
    return {
        "batch_weights": budget, "networks": len(batch), "weights": batch.num_weights, "epochs": epochs,
        "steps per epoch": total / epochs,
        "sizes in the first epoch": {name: len(way.first) for name, way in ways.items()},
        "sizes in all epochs": {name: len(way.seen) for name, way in ways.items()},
        "share of steps replayed": {name: round(way.replayed / total, 4) for name, way in ways.items()},
        "padding over": dict(zip(("weights", "chunks", "tensors", "layers", "networks"), share, strict=True)),
        "milliseconds to pad a batch": round(1e3 * seconds / total, 3),
    }  # fmt: skip


def main() -> None:
    """Print the counts, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder, rows = CASES["zoo"].encoder(), []
    for name, networks in collections().items():
        with torch.no_grad():
            batch = encoder.pack(networks)
        for budget in (20_000, 100_000):
            rows.append({"collection": name, **measured(batch, budget, options.epochs)})
            print(rows[-1])
    write_json(options.out, {"graphs kept": MOST_GRAPHS, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
