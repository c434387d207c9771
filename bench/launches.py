"""Launches of a forward pass and of a training step on the Triton backend, and the host's time: needs no GPU.

python bench/launches.py                    # writes bench/results/launches.json

Kernels of Triton are recorded instead of run, so results are garbage and only what the host does counts: how often each
kernel is launched, and each operation of torch whose result is new memory, which is a launch on a GPU. Those on whole
numbers are apart, since some of them work on the host's copies of pointers. Under float16 autocast, which launches what
bfloat16 does. The host's time is the CPU time of one thread, the best of some rounds, on one network, whose tensors are
so small that their arithmetic on this CPU hardly counts; what Triton's launcher and a driver take is not in it. A step
of `fit(capture=True)` is counted from a batch on the device to the read losses: padding to a bucket, copies to the
memory of its graph, and graphs, which are counted and not launched. Its time is that of the whole batch, copies on
this CPU included.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # kernels take CPU tensors; read when Triton is imported

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import sne_fast
from sne_fast.atomic_files import write_json
from sne_fast.backends.triton.backend import BACKEND
from sne_fast.benchmark import CASES
from sne_fast.reports.machine import machine
from sne_fast.training.capture import CapturedSteps
from sne_fast.training.objective import Supervised
from sne_fast.training.optimiser import adamw
from sne_fast.training.settings import FitSettings

OUT = Path(__file__).parent / "results" / "launches.json"
NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "detach", "_local_scalar_dense", "resize", "lift", "is_same_size")
CAPTURED = "captured step"
_kernels: Counter[str] = Counter()
_graphs: Counter[str] = Counter()


def record(self: Any, *args: Any, **kwargs: Any) -> None:
    """Count the launch of a Triton kernel, in place of running it."""
    _kernels[self.fn.__name__] += 1


def makes_memory(operation: Any) -> bool:
    """Return whether an operation of torch writes numbers, into new memory or in place."""
    name = operation.__name__.partition(".")[0]
    aliases = [result.alias_info for result in operation._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return operation.namespace != "sne_fast" and not is_view and not name.startswith(NO_LAUNCH)


class Graphs:
    """Counts graphs in place of launching them; what they record has run before."""

    def run(self, work: Callable[[], None]) -> None:
        """Do the work."""
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what counts one launch."""
        return lambda: _graphs.update(["graph"])

    def later(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Copy the numbers, as to the host."""
        return numbers.clone().tolist


class Launches(TorchDispatchMode):
    """Counts operations of torch, also those inside of the package's ops, by floating-point and other results."""

    def __init__(self) -> None:
        super().__init__()
        self.floating: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(first, Tensor) and makes_memory(func):
            kind = self.floating if first.is_floating_point() else self.others
            kind[func.__name__.partition(".")[0]] += 1
        return result


def counted(run: Callable[[], Any]) -> dict[str, Any]:
    """Return the launches of one call."""
    run()  # tables that later calls find
    _kernels.clear()
    _graphs.clear()
    seen = Launches()

    def inside(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with seen:
                return kernel(*args)

        return call

    kernels = dict(BACKEND.kernels)
    BACKEND.kernels.update({op: inside(kernel) for op, kernel in kernels.items()})
    with seen:
        run()
    BACKEND.kernels.update(kernels)
    return {
        "graphs": _graphs.total(), "triton": sum(_kernels.values()), "torch": sum(seen.floating.values()),
        "whole numbers": sum(seen.others.values()),
        "triton kernels": dict(_kernels.most_common()), "torch operations": dict(seen.floating.most_common()),
        "operations on whole numbers": dict(seen.others.most_common()),
    }  # fmt: skip


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """Return the least CPU time of a call."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return round(1e3 * min(found), 2)


def calls(name: str, size: str) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return a forward pass and a training step of a case, and its number of weights."""
    case = CASES[name]
    encoder = case.encoder()
    batch = case.batch(encoder, size)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6, fused=True)

    def encode() -> Tensor:
        with torch.autocast("cpu", torch.float16):
            z: Tensor = encoder(batch)
        return z

    def forward() -> None:
        with torch.no_grad(), sne_fast.use_backend("triton"):
            encode()

    def step() -> None:
        with sne_fast.use_backend("triton"):
            optimizer.zero_grad()
            encode().square().mean().backward()
            optimizer.step()

    return {
        "forward": forward,
        "training step": step,
        CAPTURED: captured_step(encoder, batch),
    }, batch.num_weights


def captured_step(encoder: sne_fast.SNE, batch: sne_fast.WeightBatch) -> Callable[[], None]:
    """Return a training step of `fit(capture=True)`: padded, copied to the memory of its graph, and replayed."""
    predictor = sne_fast.Predictor(encoder, hidden_features=(64,))
    settings = FitSettings(buckets=True, amp="float16")
    objective = Supervised(predictor, torch.rand(len(batch), 1), settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    captured = CapturedSteps(predictor, objective, adamw(predictor, 1e-3, 1e-2), scaler, settings, Graphs())
    rows, generator = list(range(len(batch))), torch.Generator()

    def step() -> None:
        with sne_fast.use_backend("triton"):
            captured.begin(len(rows), 1e-3)
            captured.part(objective.inputs(batch, rows, generator))
            captured.update()()

    step()  # a new bucket runs as usual, and is recorded when it comes again
    return step


def main() -> None:
    """Print the counts, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="zoo", choices=sorted(CASES))
    parser.add_argument("--size", default="full", choices=["full", "check", "tiny"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    interpreter.InterpretedFunction.run = record
    many, weights = calls(options.case, options.size)
    one, weights_of_one = calls(options.case, "tiny")
    rows = {}
    for name, run in many.items():
        timed = run if name == CAPTURED else one[name]
        rows[name] = counted(run) | {"host_ms": milliseconds(timed, options.rounds)}
        row = rows[name]
        print(f"{name}: {row['graphs']} graphs, {row['triton']} launches of Triton, {row['torch']} of torch, "
              f"{row['whole numbers']} with whole numbers; host {row['host_ms']} ms")  # fmt: skip
    about = {"case": options.case, "weights": weights, "weights of the timed network": weights_of_one,
             "rounds": options.rounds, "backend": "triton", "machine": machine()}  # fmt: skip
    write_json(options.out, about | {"rows": rows})


if __name__ == "__main__":
    main()
