"""Cost of threads in a training step of a small batch: `bench/small_batches.py --help`.

Counts how often the team of threads is woken (calls of `GOMP_parallel` for more than one thread, by a library that is
loaded before all others), takes the time of one thread, and that of two. Blocks of stages 2 to 4 run part by part as
under backends without `set_block`, as one op each, and as one op each with one thread between ops, as `fit` trains
small batches; all ways in turn, in one process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sne_fast
from sne_fast.benchmark.networks import randomise_, zoo_cnn
from sne_fast.ops import functional
from sne_fast.ops.op_threads import one_thread_between_ops
from sne_fast.reports.machine import machine
from sne_fast.training.optimiser import adamw

OUT = Path(__file__).parent / "results" / "small_batches.json"
NETWORKS = 4  # of 4,970 weights
WAYS = {"as trained": (True, True), "one op": (True, False), "parts": (False, False)}
"""Whether blocks are one op, and whether one thread does the operations between ops, as `fit` does for small parts."""
COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <string.h>
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
static parallel *real;
static long meetings;
static int look(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size, (void)data;
  if (real || !strstr(info->dlpi_name, "libgomp")) return 0;
  void *library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
  if (library) real = (parallel *)dlsym(library, "GOMP_parallel");
  return 0;
}
long thread_meetings(void) { return meetings; }
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
  if (!real) dl_iterate_phdr(look, 0);
  if (threads != 1) ++meetings;
  real(body, data, threads, flags);
}
"""


class Step:
    """One training step of a predictor: loss, gradients, clipping, AdamW."""

    def __init__(self, hidden_dim: int) -> None:
        torch.manual_seed(0)
        encoder = sne_fast.SNE(hidden_dim=hidden_dim)
        self.model = randomise_(sne_fast.Predictor(encoder, 1), spread=0.7)
        self.batch = encoder.pack([randomise_(zoo_cnn(), seed=seed) for seed in range(NETWORKS)]).detach()
        self.targets = torch.linspace(-1, 1, NETWORKS)[:, None]
        self.optimiser = adamw(self.model, 1e-4, 1e-4)

    def __call__(self) -> float:
        self.optimiser.zero_grad()
        loss = nn.functional.mse_loss(self.model(self.batch).reshape(self.targets.shape), self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return float(loss.detach())


@contextmanager
def blocks_as(way: str) -> Iterator[None]:
    """Run steps in one of the ways."""
    whole, quiet = WAYS[way]
    with ExitStack() as stack:
        if not whole:
            stack.enter_context(mock.patch.object(functional, "fuses_set_block", lambda *args: False))
        if quiet:
            stack.enter_context(one_thread_between_ops())
        yield


class ByOperation(TorchDispatchMode):
    """Counts meetings by operation of PyTorch."""

    def __init__(self, meetings: Callable[[], int]) -> None:
        super().__init__()
        self.meetings, self.found = meetings, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.meetings()
        result = function(*args, **(kwargs or {}))
        if met := self.meetings() - before:
            self.found[str(function.name())] += met
        return result


def count(hidden_dim: int) -> dict[str, Any]:
    """Return the meetings of a step, with the counter loaded."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.thread_meetings.restype = ctypes.c_long
    torch.set_num_threads(2)
    step, found = Step(hidden_dim), {}
    for way in WAYS:
        with blocks_as(way):
            for _ in range(2):
                step()
            before = library.thread_meetings()
            step()
            total = library.thread_meetings() - before
            with ByOperation(library.thread_meetings) as mode:
                step()
        found[way] = {"meetings": total, "by operation": dict(mode.found.most_common())}
    return found


def counted(hidden_dim: int) -> dict[str, Any]:
    """Count in a process of its own, in which the counter is loaded before all libraries."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "counter.c"), Path(folder, "counter.so")
        source.write_text(COUNTER)
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
        command = [sys.executable, __file__, "--count", "--hidden-dim", str(hidden_dim)]
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def timed(step: Step, clock: Callable[[], float], steps: int) -> float:
    """Return milliseconds of a step."""
    start = clock()
    for _ in range(steps):
        step()
    return (clock() - start) / steps * 1e3


def times(hidden_dim: int, rounds: int, steps: int, walls: bool) -> dict[str, Any]:
    """Return the process time of one thread by way, and the time that one and two threads take, paired by round."""
    step = Step(hidden_dim)
    one: dict[str, list[float]] = {way: [] for way in WAYS}
    wall: dict[str, dict[int, list[float]]] = {way: {1: [], 2: []} for way in WAYS}
    before = torch.get_num_threads()
    for number in range(rounds + 1):
        for way in WAYS:
            torch.set_num_threads(1)
            with blocks_as(way):
                process = timed(step, time.process_time, steps)
            both = {}
            for threads in (1, 2) if walls else ():
                torch.set_num_threads(threads)
                with blocks_as(way):
                    both[threads] = timed(step, time.perf_counter, steps)
            if number:  # the first round warms up
                one[way].append(process)
                for threads, value in both.items():
                    wall[way][threads].append(value)
    torch.set_num_threads(before)

    def ratio(a: list[float], b: list[float]) -> dict[str, float]:
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        return {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}

    found: dict[str, Any] = {
        "process ms of one thread": {way: statistics.median(values) for way, values in one.items()},
        "parts over as trained, process time of one thread": ratio(one["parts"], one["as trained"]),
    }
    if not walls:
        return found
    return found | {
        "wall ms": {way: {str(n): statistics.median(v) for n, v in wall[way].items()} for way in WAYS},
        "one thread over two, wall time": {way: ratio(wall[way][1], wall[way][2]) for way in WAYS},
    }


def agree(hidden_dim: int) -> float:
    """Return the largest difference of gradients between one op and its parts, over the size of the largest.

    Raises:
        SystemExit: where they do not agree.
    """
    found = {}
    for way in ("as trained", "parts"):
        step = Step(hidden_dim)
        with blocks_as(way):
            step()
        found[way] = [p.grad for p in step.model.parameters() if p.grad is not None]
    largest = max(float(p.norm()) for p in found["parts"])
    worst = max(float((a - b).norm()) / largest for a, b in zip(found["as trained"], found["parts"], strict=True))
    if not worst < 1e-4:
        raise SystemExit(f"small_batches: gradients of both ways differ by {worst:.1e}; nothing is measured")
    return worst


def main() -> None:
    """Print the results, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps of each measurement")
    parser.add_argument("--busy", action="store_true", help="leave out times of two threads, as other programs run")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(count(options.hidden_dim)))
        return
    about = {
        "batch": f"{NETWORKS} CNNs of 4,970 weights, hidden_dim {options.hidden_dim}",
        "meetings": "calls of GOMP_parallel for more than one thread in one training step",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "load of the machine before": os.getloadavg()[0],
        "rounds": options.rounds,
        "steps of a round": options.steps,
        "largest difference of gradients": agree(options.hidden_dim),
    }
    found = {
        "meetings": counted(options.hidden_dim),
        **times(options.hidden_dim, options.rounds, options.steps, not options.busy),
    }
    print(json.dumps(found, indent=1))
    options.out.write_text(json.dumps({"about": about, **found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
