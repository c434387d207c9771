"""Speed of bfloat16 products on the CPU beside float32, and what they change in the vectors of an encoder.

python bench/bfloat16.py             # writes bench/results/cpu_bfloat16.json and cpu_bfloat16_set_block.json
python bench/bfloat16.py --cases     # the second alone
python bench/bfloat16.py --rounds 2 --show

On a processor that multiplies bfloat16. Every round runs the op `chunk_encode` on a case in float32, then the same in
bfloat16: the forward alone, and forward and backward; then a forward pass and a training step of the whole encoder, in
float32 and under autocast. The six calls of `set_block` in a pass over networks of 4,970 weights follow, as passes over
the op alone. Before it, results are compared with the reference in float64. Times are CPU time of the process with one
thread. `z_error` is the distance of the encoder's vectors under autocast from those in float32,
relative to their size; `z_error_centred` is relative to their spread over the networks of the case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sne_fast
from sne_fast.atomic_files import to_json, write_json
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.benchmark import CASES
from sne_fast.benchmark.cases import Case
from sne_fast.benchmark.networks import randomise_, zoo_cnn
from sne_fast.ops import functional, functional_set_block, reference
from sne_fast.reports.machine import machine, processor

RESULT = Path(__file__).parent / "results" / "cpu_bfloat16.json"
BLOCKS = Path(__file__).parent / "results" / "cpu_bfloat16_set_block.json"
NAMES = ("zoo", "mixed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
WIDTHS = (32, 64)
BATCHES = (4, 64)
"""Networks in the batches of `set_block`: 20,000 weights, and those of the case zoo."""


def calls(encoder: sne_fast.SNE, batch: sne_fast.WeightBatch, op: str) -> list[tuple[Any, ...]]:
    """Return the arguments of the calls of an op in a forward pass."""
    found = []
    ops = functional.OPS

    class Recording:
        def __getattr__(self, name: str) -> Any:
            function = getattr(ops, name)
            if name != op:
                return function

            def call(*args: Any) -> Any:
                found.append(args)
                return function(*args)

            return call

    recording = Recording()
    with (
        mock.patch.object(functional, "OPS", recording),
        mock.patch.object(functional_set_block, "OPS", recording),
        torch.no_grad(),
    ):
        encoder(batch)
    return found


def arguments(case: Case, size: str) -> tuple[Tensor, ...]:
    """Return the arguments of the op `chunk_encode` in a forward pass of a case."""
    encoder = case.encoder()
    return calls(encoder, case.batch(encoder, size), "chunk_encode")[0]


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def error(got: Tensor, want: Tensor) -> float:
    """Return ||got - want|| / ||want||."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(case: Case) -> dict[str, float]:
    """Return the error of the op in each dtype against the reference in float64, on the smaller form of a case."""
    args = arguments(case, "check")
    found = {}
    for name, dtype in DTYPES.items():
        inputs = cast(args, dtype)
        found[name] = error(cpu.chunk_encode(*inputs), reference.chunk_encode(*cast(inputs, torch.float64)))
        if not found[name] <= TOLERANCE[name]:
            raise SystemExit(f"{case.name}: chunk_encode in {name} is off by {found[name]:g}; not timed")
    return found


def paired(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Time runs in turn; return medians and the ratio of the first to the second of each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    first, second = times.values()
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    return {
        **{f"{name}_seconds": median(taken) for name, taken in times.items()},
        "ratio": median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def step(encoder: sne_fast.SNE, batch: sne_fast.WeightBatch, autocast: bool, train: bool) -> Tensor:
    """Run a forward pass, or one with its backward, and return the vectors."""
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = encoder(batch)
    if train:
        encoder.zero_grad()
        z.square().mean().backward()
    return z


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Check one case, then time it."""
    case = CASES[name]
    errors = check(case)
    args = {dtype: cast(arguments(case, "full"), DTYPES[dtype]) for dtype in DTYPES}
    grads = {dtype: torch.randn_like(cpu.chunk_encode(*args[dtype])) for dtype in DTYPES}
    encoder = case.encoder()
    batch = case.batch(encoder)
    z, rounded = (step(encoder, batch, autocast, train=False).double() for autocast in (False, True))
    spread = float((z - z.mean(0)).norm())
    return {
        "weights": batch.num_weights,
        "errors": errors,
        "chunk_encode_forward": paired({d: lambda d=d: cpu.chunk_encode(*args[d]) for d in DTYPES}, rounds),
        "chunk_encode_training": paired(
            {
                d: lambda d=d: (cpu.chunk_encode(*args[d]), cpu.chunk_encode_backward(grads[d], *args[d]))
                for d in DTYPES
            },
            rounds,
        ),
        "encoder_forward": paired({d: lambda d=d: step(encoder, batch, d != "float32", False) for d in DTYPES}, rounds),
        "encoder_training": paired({d: lambda d=d: step(encoder, batch, d != "float32", True) for d in DTYPES}, rounds),
        "z_error": error(rounded, z),
        "z_error_centred": float((rounded - z).norm()) / spread,
    }


def measure_blocks(width: int, networks: int, rounds: int) -> dict[str, Any]:
    """Check the calls of `set_block` for a batch, then time them."""
    encoder = randomise_(sne_fast.SNE(hidden_dim=width), seed=1).requires_grad_(False)
    batch = encoder.pack([randomise_(zoo_cnn(), seed=seed) for seed in range(networks)]).detach()
    found = calls(encoder, batch, "set_block")
    args = {name: [cast(call, dtype) for call in found] for name, dtype in DTYPES.items()}
    grads = {name: [torch.randn_like(cpu.set_block(*call)) for call in args[name]] for name in DTYPES}
    errors = {}
    for name in DTYPES:
        exact = [reference.set_block(*cast(call, torch.float64)) for call in args[name]]
        errors[name] = max(error(cpu.set_block(*call), want) for call, want in zip(args[name], exact, strict=True))
        if not errors[name] <= TOLERANCE[name]:
            raise SystemExit(f"set_block in {name} is off by {errors[name]:g}; not timed")

    def train(name: str) -> None:
        for call, grad in zip(args[name], grads[name], strict=True):
            cpu.set_block(*call)
            cpu.set_block_backward(grad, *call)

    return {
        "weights": batch.num_weights,
        "errors": errors,
        "forward": paired({d: lambda d=d: [cpu.set_block(*call) for call in args[d]] for d in DTYPES}, rounds),
        "training": paired({d: lambda d=d: train(d) for d in DTYPES}, rounds),
    }


def main() -> None:
    """Measure all cases and write the result, or show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--show", action="store_true", help="print the result instead of writing it")
    options = parser.parse_args()
    if not library.multiplies_bf16():
        raise SystemExit(f"bfloat16: the instruction set {library.isa()} has no products of bfloat16")
    torch.set_num_threads(1)
    about = {"machine": machine(), "device": processor(), "instruction_set": library.isa()}
    results: dict[Path, dict[str, Any]] = {
        BLOCKS: {
            f"h = {width}, {networks} networks": measure_blocks(width, networks, 3 * options.rounds)
            for width in WIDTHS
            for networks in BATCHES
        }
    }
    if options.cases:
        results[RESULT] = {name: measure(name, options.rounds) for name in options.cases}
    for path, cases in results.items():
        if options.show:
            print(to_json({**about, "cases": cases}))
        else:
            write_json(path, {**about, "cases": cases})


if __name__ == "__main__":
    main()
