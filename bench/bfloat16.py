"""Speed of bfloat16 products on the CPU beside float32 and padded encoders, and what they change in vectors.

python bench/bfloat16.py                     # writes the four results bench/results/cpu_bfloat16*.json
python bench/bfloat16.py --parts sets        # one of them: cases, padded, blocks, sets
python bench/bfloat16.py --page              # the tables of docs/benchmarks.md from them
python bench/bfloat16.py --rounds 2 --show   # prints them instead

On a processor that multiplies bfloat16. Every round runs the op `chunk_encode` on a case in float32, then the same in
bfloat16: the forward alone, and forward and backward; then a forward pass and a training step of the whole encoder,
in float32 and under autocast. Then both run on the smaller batch of the case in turn with what a user would write,
the encoder padded in plain PyTorch under autocast, and `torch.compile` of that, for half of the rounds. `blocks`
are the six calls of `set_block` in a pass over networks of 4,970 weights, `sets` calls of `set_attention` and
`segment_pool`, on tensors of the dtype. Before it, results are compared with the reference in float64. Times are CPU
time of the process with one thread. `z_error` is the distance of the encoder's vectors under autocast from those in
float32, relative to their size; `z_error_centred` is relative to their spread over the networks of the case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from report import insert
from torch import Tensor

import sne_fast
from sne_fast.atomic_files import to_json, write_json
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.benchmark import CASES, Contender, contender
from sne_fast.benchmark.cases import Case
from sne_fast.benchmark.networks import randomise_, zoo_cnn
from sne_fast.ops import functional, functional_set_block, reference
from sne_fast.reports.machine import machine, processor

RESULTS = Path(__file__).parent / "results"
FILES = {
    "cases": "cpu_bfloat16.json",
    "padded": "cpu_bfloat16_padded.json",
    "blocks": "cpu_bfloat16_set_block.json",
    "sets": "cpu_bfloat16_sets.json",
}
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
NAMES = ("zoo", "mixed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
WIDTHS = (32, 64)
BATCHES = (4, 64)
"""Networks in the batches of `set_block`: 20,000 weights, and those of the case zoo."""
SETS = {2: 4000, 16: 500, 155: 60, 1000: 3}
"""Rows of a set, and how many such sets."""
MEMORY = 8 << 30
"""Bytes that the padded encoder may use."""
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}


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


def times_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of runs that take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def paired(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Time two runs in turn, after one of each; return medians and the ratios of the first to the second."""
    for run in runs.values():
        run()
    times = times_of(runs, rounds)
    first, second = times.values()
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    return {
        **{f"{name}_seconds": median(taken) for name, taken in times.items()},
        "ratio": median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def beside(runs: dict[str, Callable[[], object]], rounds: int, own: str) -> dict[str, Any]:
    """Time runs in turn; return medians, and medians of the ratios of each to ``own`` in the same round."""
    times = times_of(runs, rounds)
    ratios = {
        name: sorted(a / b for a, b in zip(taken, times[own], strict=True))
        for name, taken in times.items()
        if name != own
    }
    return {
        "seconds": {name: median(taken) for name, taken in times.items()},
        "ratios": {name: median(found) for name, found in ratios.items()},
        "ratio_ranges": {name: [found[0], found[-1]] for name, found in ratios.items()},
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


def measure_padded(name: str, rounds: int) -> dict[str, Any]:
    """Check and time the smaller batch of a case: this package in both dtypes, and padded encoders in bfloat16."""
    case = CASES[name]
    encoder = case.encoder()
    batch = case.batch(encoder, "check")
    with torch.no_grad():
        exact = encoder(batch).double()

    def made(kind: str, training: bool, autocast: torch.dtype | None) -> Contender:
        return contender(kind, encoder, batch, training=training, memory_limit=MEMORY, autocast=autocast)

    found: dict[str, Any] = {"weights": batch.num_weights, "networks": len(batch)}
    for mode in ("forward", "training"):
        contenders = {dtype: made("sne_fast", mode == "training", AUTOCAST[dtype]) for dtype in DTYPES}
        for kind in ("eager", "compile"):
            contenders[kind] = made(kind, mode == "training", torch.bfloat16)
        for kind, one in contenders.items():
            if mode == "training":
                if kind != "eager":  # which is long, and has nothing to warm up
                    one.step()
                continue
            off = error(one.output(), exact)
            if not off <= (TOLERANCE["bfloat16"] if one.autocast else TOLERANCE["float32"]):
                raise SystemExit(f"{name}: {kind} is off by {off:g}; not timed")
        runs = {kind: one.step if mode == "training" else one.forward for kind, one in contenders.items()}
        found[mode] = beside(runs, rounds, own="bfloat16")
    return found


def measure_sets(rows: int, sets: int, rounds: int) -> dict[str, Any]:
    """Check and time `set_attention` and `segment_pool` on so many sets of ``rows`` rows, width 64, four heads."""
    generator = torch.Generator().manual_seed(0)
    ptr = torch.arange(sets + 1) * rows
    q, k, v, grad = (torch.randn(rows * sets, 64, generator=generator) for _ in range(4))
    logits, pooled = (torch.randn(n, 4, *more, generator=generator) for n, more in ((rows * sets, ()), (sets, (64,))))
    calls = {
        "set_attention": (cpu.set_attention, cpu.set_attention_backward, (q, k, v), (ptr, ptr, ptr, ptr, 4), grad),
        "segment_pool": (cpu.segment_pool, cpu.segment_pool_backward, (q, logits), (ptr, ptr), pooled),
    }
    found: dict[str, Any] = {}
    for op, (forward, backward, inputs, more, upstream) in calls.items():
        runs: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "training": {}}
        errors = {}
        for name, dtype in DTYPES.items():
            args, g = cast(inputs, dtype), upstream.to(dtype)
            exact = getattr(reference, op)(*cast(args, torch.float64), *more)[0]
            errors[name] = error(forward(*args, *more)[0], exact)
            if not errors[name] <= TOLERANCE[name]:
                raise SystemExit(f"{op} in {name} is off by {errors[name]:g}; not timed")

            def train(forward=forward, backward=backward, args=args, g=g, more=more) -> None:
                backward(g, *args, *forward(*args, *more), *more)

            runs["forward"][name] = lambda forward=forward, args=args, more=more: forward(*args, *more)
            runs["training"][name] = train
        found[op] = {"errors": errors, **{mode: paired(both, rounds) for mode, both in runs.items()}}
    return found


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


def seconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms" if value < 0.1 else f"{value:.3f} s"


def pair_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of rows that :func:`paired` found, by title."""
    lines = ["| | float32 | bfloat16 | ratio | range |", "|---|---:|---:|---:|---:|"]
    for title, row in rows.items():
        low, high = row["ratio_range"]
        both = f"{seconds(row['float32_seconds'])} | {seconds(row['bfloat16_seconds'])}"
        lines.append(f"| {title} | {both} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |")
    return lines


def tables(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the tables of the page, by the name of their markers."""
    cases, beside_padded, blocks, sets = (found[part]["cases"] for part in FILES)
    modes = {"forward": "forward", "training": "forward and backward"}
    kinds = {"float32": "float32", "eager": "padded, bfloat16", "compile": "its `torch.compile`"}
    padded = [f"| | bfloat16 | {' | '.join(kinds.values())} |", "|---|" + "---:|" * (1 + len(kinds))]
    for name, case in beside_padded.items():
        for mode in modes:
            row = case[mode]
            cells = [f"{seconds(row['seconds'][kind])} ({row['ratios'][kind]:.2f})" for kind in kinds]
            title = {"forward": "forward", "training": "training step"}[mode]
            padded.append(f"| {title}, `{name}`, {case['weights']:,} weights | "
                          f"{seconds(row['seconds']['bfloat16'])} | {' | '.join(cells)} |")  # fmt: skip
    products = {
        f"{title} {after}, `{name}`": case[f"{what}_{mode}"]
        for what, title in (("chunk_encode", "`chunk_encode`"), ("encoder", "encoder,"))
        for mode, after in modes.items()
        for name, case in cases.items()
    }
    of_blocks = {f"{after}, {name}": case[mode] for name, case in blocks.items() for mode, after in modes.items()}
    of_sets = {
        f"`{op}` {after}, {name}": case[op][mode]
        for op in ("set_attention", "segment_pool")
        for name, case in sets.items()
        for mode, after in modes.items()
    }
    lines = {
        "bfloat16": pair_table(products),
        "bfloat16-padded": padded,
        "bfloat16-blocks": pair_table(of_blocks),
        "bfloat16-sets": pair_table(of_sets),
    }
    return {name: "\n".join(table) for name, table in lines.items()}


def committed() -> dict[str, dict[str, Any]]:
    """Return the committed results."""
    return {part: json.loads((RESULTS / file).read_text(encoding="utf-8")) for part, file in FILES.items()}


def main() -> None:
    """Measure the parts that are asked for and write the results, show them, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=FILES, default=[*FILES])
    parser.add_argument("--show", action="store_true", help="print the results instead of writing them")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/benchmarks.md and end")
    options = parser.parse_args()
    if options.page:
        for name, text in tables(committed()).items():
            insert(PAGE, f"\n{text}\n\n", f"<!-- {name}:begin -->", f"<!-- {name}:end -->")
        return
    if not library.multiplies_bf16():
        raise SystemExit(f"bfloat16: the instruction set {library.isa()} has no products of bfloat16")
    torch.set_num_threads(1)
    about = {"machine": machine(), "device": processor(), "instruction_set": library.isa()}
    parts: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
        "cases": {name: lambda name=name: measure(name, options.rounds) for name in NAMES},
        "padded": {name: lambda name=name: measure_padded(name, max(1, options.rounds // 2)) for name in NAMES},
        "blocks": {
            f"h = {width}, {networks} networks": lambda w=width, n=networks: measure_blocks(w, n, 3 * options.rounds)
            for width in WIDTHS
            for networks in BATCHES
        },
        "sets": {
            f"{sets:,} sets of {rows:,}": lambda r=rows, n=sets: measure_sets(r, n, 3 * options.rounds)
            for rows, sets in SETS.items()
        },
    }
    for part in options.parts:
        result: dict[str, Any] = {**about, "cases": {}}
        for name, run in parts[part].items():
            result["cases"][name] = run()
            if not options.show:  # some take minutes: what is there is kept
                write_json(RESULTS / FILES[part], result)
        if options.show:
            print(to_json(result))


if __name__ == "__main__":
    main()
