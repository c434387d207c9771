"""Measure launch sizes on this GPU and write them into the tables: ``python -m sne_fast.backends.triton.tune``.

For every case, the table's own choice is checked against the reference, then each candidate against that choice, and
those that agree are timed; the fastest becomes a rule for this architecture, in front of the others.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from ...atomic_files import write_text
from ...ops import selftest, selftest_cases
from ...ops.precision import product_precision
from ...regular_files import read_json
from ..gpu_plans.chunks import LONGEST_SHARED, count_lengths
from ..gpu_plans.lengths import Lengths
from . import chunk_encode, feed_forward, gather_chunks, segment_pool, set_attention
from .backend import BACKEND
from .chunk_launches import FUSED_CLASSES, fits_a_tile, length_class
from .launches import TABLES, architecture, launch, table, trial

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("set_attention", "segment_pool", "gather_chunks", "chunk_encode", "feed_forward")
Rule = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One rule to be found: its table and condition, the call to time, and the candidates' sizes."""

    table: str
    when: Mapping[str, Any]
    run: Callable[[], tuple[Tensor, ...]]
    candidates: tuple[Rule, ...]


def sizes(warps: tuple[int, ...], stages: tuple[int, ...], **blocks: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return every combination of warps, stages and blocks."""
    return tuple(
        {"num_warps": w, "num_stages": s, "blocks": dict(zip(blocks, values, strict=True))}
        for w, s, *values in itertools.product(warps, stages, *blocks.values())
    )


def _pointer(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _flat(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for part in result for t in _flat(part))


def attention_cases(h: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of ``set_attention``: kernels by lengths of sets."""
    for length, sets in ((12, 20000), (28, 8000), (60, 3000), (1000, 60)):
        ptr = _pointer([length] * sets)
        q, k, v, grad = (_normal(length * sets, h, dtype=dtype) for _ in range(4))
        pointers = (ptr.cuda(), ptr.cuda(), ptr, ptr)
        out, lse = set_attention.set_attention(q, k, v, *pointers, heads)
        block = set_attention.own_block(Lengths.of(ptr))
        forward = functools.partial(set_attention.set_attention, q, k, v, *pointers, heads)
        backward = functools.partial(set_attention.set_attention_backward, grad, q, k, v, out, lse, *pointers, heads)
        for kernel, run in (("forward", forward), ("query_grad", backward), ("key_grad", backward)):
            when = {"kernel": kernel, "h": h, "heads": heads, "length": block}
            blocks = (16, 32, 64, 128) if block == 128 else tuple({16, block})
            inner = (32, 64) if block < 128 else (32, 64, 128)
            yield Case(
                "set_attention", when, run, sizes((1, 2, 4, 8), (1, 2, 3), BLOCK=blocks, INNER=inner, SPLIT=(1024,))
            )


def pooling_cases(h: int, queries: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of ``segment_pool``."""
    lengths = [1 << 20, *[3000] * 300, *[20] * 20000]
    ptr = _pointer(lengths)
    x, logits = _normal(sum(lengths), h, dtype=dtype), _normal(sum(lengths), queries, dtype=dtype)
    out, lse = segment_pool.segment_pool(x, logits, ptr.cuda(), ptr)
    on_gpu = ptr.cuda()

    def forward() -> tuple[Tensor, ...]:
        return segment_pool.segment_pool(x, logits, on_gpu, ptr)

    def backward() -> tuple[Tensor, ...]:
        return segment_pool.segment_pool_backward(out, x, logits, out, lse, on_gpu, ptr)

    for kernel, run in (("forward", forward), ("backward", backward)):
        elements = (2048, 4096, 8192, 16384)
        yield Case(
            "segment_pool", {"kernel": kernel, "h": h, "heads": queries}, run,
            sizes((2, 4, 8), (1, 2, 3, 4), ELEMENTS=elements, SHORT=(64,)),
        )  # fmt: skip


def gather_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield the case of ``gather_chunks``."""
    plan = torch.tensor([[512 * 512, 9], [1000 * 2048, 1], [64 * 3, 49], *[[256 * 64, 1]] * 200])
    tensors = [_normal(r, k, dtype=torch.float32) for r, k in plan.tolist()]
    scale = torch.rand(len(tensors), device="cuda") + 0.5

    def run() -> tuple[Tensor, ...]:
        values = gather_chunks.gather_chunks(tensors, scale, plan, dtype)
        return _flat((values, gather_chunks.gather_chunks_backward(values, values, tensors, scale, plan)))

    yield Case("gather_chunks", {}, run, sizes((4, 8), (1,), TILE=(1024, 2048, 4096), TILE_K=(8, 16, 32)))


@dataclass(frozen=True)
class ChunkRule:
    """A rule to be found for the chunk kernels: chunks of ``length`` fill the slot class that ``when`` names."""

    table: str
    length: int
    when: Mapping[str, Any]
    candidates: tuple[Rule, ...]


def chunk_rules(h: int, heads: int, dtype: torch.dtype, arch: int) -> Iterator[ChunkRule]:
    """Yield a rule per slot class and kernel that calls of this width use: other warps and stages, the same blocks."""
    precision = product_precision(dtype) if dtype == torch.float32 else ""
    for slot_class in FUSED_CLASSES:
        length = LONGEST_SHARED // 2 if slot_class.multi_chunk else slot_class.longest
        counts, name = count_lengths(_pointer([length])), length_class(slot_class, precision)
        for path in sorted(TABLES.glob("chunk_encode*.json")):
            forward = path.stem == "chunk_encode"
            if not fits_a_tile(h, counts, dtype if forward else None):
                continue
            usual = launch(path.stem, h=h, heads=heads, length=name, dtype=dtype, arch=arch)
            blocks = {block: (value,) for block, value in usual.blocks.items()}
            when = {"h": h, "heads": heads, "length": name}
            yield ChunkRule(path.stem, length, when, sizes((4, 8, 16), (1, 2), **blocks))


def chunk_cases(h: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of ``chunk_encode`` and of the kernels of its backward."""
    device = torch.device("cuda")
    calls = selftest_cases.Variant("chunk_encode", dtype, h, heads, True)
    args = list(selftest_cases.example(calls, device))
    rules = chunk_rules(h, heads, dtype, architecture(device))
    for length, group in itertools.groupby(rules, key=lambda rule: rule.length):
        count = 640_000 // length
        ptr, tensor_ptr = _pointer([length] * count), _pointer([count // 2, 0, count - count // 2])
        args[:5] = [_normal(length * count, dtype=dtype), ptr.cuda(), tensor_ptr.cuda(), ptr, tensor_ptr]
        grad = _normal(count, heads, h, dtype=dtype)
        forward = functools.partial(chunk_encode.chunk_encode, *args)
        backward = functools.partial(chunk_encode.chunk_encode_backward, grad, *args)
        for rule in group:
            run = forward if rule.table == "chunk_encode" else backward

            def flat(run: Callable[[], Any] = run) -> tuple[Tensor, ...]:
                return _flat(run())

            yield Case(rule.table, rule.when, flat, rule.candidates)


def feed_forward_cases(h: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of ``feed_forward``, for which ``heads`` does not matter."""
    rows = (1 << 26) // h
    q, attended, grad = (_normal(rows, h, dtype=dtype) for _ in range(3))
    args = (q, attended, _normal(h, h, dtype=dtype) * h**-0.5, _normal(h, dtype=dtype), _normal(4, h, dtype=dtype))

    def forward() -> tuple[Tensor, ...]:
        return (feed_forward.feed_forward(*args),)

    def backward() -> tuple[Tensor, ...]:
        return feed_forward.feed_forward_backward(grad, *args)

    staged = sizes((4,), (1,), ROWS=(0,), INNER=(0,), PROGRAMS=(0,))
    for kernel, run, inner in (("forward", forward, tuple({32, 64, h})), ("backward", backward, (h,))):
        when = {"kernel": kernel, "h": h, "length": feed_forward.precision_class(dtype, product_precision(dtype))}
        tiles = sizes((4, 8), (1, 2, 3), ROWS=(16, 32, 64, 128), INNER=inner, PROGRAMS=(1, 2, 3, 4))
        yield Case("feed_forward", when, run, (*staged, *tiles))


def all_cases(op: str, widths: list[int], heads: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of an op."""
    if op == "gather_chunks":
        yield from gather_cases(dtype)
        return
    makers = {"set_attention": attention_cases, "segment_pool": pooling_cases, "chunk_encode": chunk_cases,
              "feed_forward": feed_forward_cases}  # fmt: skip
    for h in widths:
        yield from makers[op](h, heads, dtype)


def _agrees(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    tolerance = 4 * max(selftest.TOLERANCES[dtype], selftest.TF32_TOLERANCE if dtype == torch.float32 else 0)
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return all(float((a - b).nan_to_num().norm()) <= tolerance * float(b.nan_to_num().norm()) + 1e-6 for a, b in pairs)


def tune(case: Case, dtype: torch.dtype, arch: int) -> Rule | None:
    """Return the fastest candidate as a rule, or None if it beats the table's own choice by less than two per cent."""
    want = case.run()
    usual = best = do_bench(case.run, return_mode="median")
    found = None
    when = {**case.when, "dtype": str(dtype).removeprefix("torch."), "arch": arch}
    for candidate in case.candidates:
        rule = {"when": when, **candidate}
        with trial(case.table, rule):
            try:
                if not _agrees(case.run(), want, dtype):
                    print(f"  wrong results, skipped: {candidate}")
                    continue
                time = do_bench(case.run, return_mode="median")
            except Exception as error:  # too much shared memory, a shape the compiler refuses
                print(f"  {type(error).__name__}, skipped: {candidate}")
                continue
        if time < 0.98 * usual and time < best:
            best, found = time, rule
    print(f"{case.table} {when}: {usual:.3f} ms -> {best:.3f} ms", flush=True)
    return found


def merged(rules: list[Rule], new: list[Rule]) -> list[Rule]:
    """Put new rules in front, in place of older rules for the same case."""
    replaced = [rule["when"] for rule in new]
    return [*new, *(rule for rule in rules if rule.get("when", {}) not in replaced)]


def write(path: Path, rules: list[Rule]) -> None:
    """Write a table, one rule a line."""
    write_text(path, "[\n" + ",\n".join("  " + json.dumps(rule) for rule in rules) + "\n]\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m sne_fast.backends.triton.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--op", choices=OPS, action="append", help="one op (may be repeated); all by default")
    parser.add_argument("--width", type=int, action="append", help="h; 64 by default")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="bfloat16 and float32 by default")
    parser.add_argument("--out", type=Path, help="folder of the tables; those of the package by default")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("sne_fast.backends.triton.tune: needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    device, out = torch.device("cuda"), options.out or TABLES
    out.mkdir(parents=True, exist_ok=True)
    for op, dtype_name in itertools.product(options.op or OPS, options.dtype or ["bfloat16", "float32"]):
        dtype = DTYPES[dtype_name]
        new: dict[str, list[Rule]] = {}
        for h in options.width or [64]:
            variant = selftest_cases.Variant(op, dtype, h, options.heads, True)
            wrong = selftest.check(BACKEND, variant, device)
            if wrong:
                print(f"{op} {dtype_name} h={h} is not tuned, its results are wrong: {'; '.join(wrong)}")
                continue
            for case in all_cases(op, [h], options.heads, dtype):
                rule = tune(case, dtype, architecture(device))
                if rule:
                    new.setdefault(case.table, []).append(rule)
        for name, rules in new.items():
            path = out / f"{name}.json"
            before = read_json(path, list) if path.exists() else list(table(name))
            write(path, merged(before, rules))
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
