"""Cases of ``python -m sne_fast.backends.triton.tune``: rules to be found, calls to time, and candidates' sizes.

Numbers and lengths of sets are those of batches of a few million weights. ``when`` of a case must be what launches of
its call look up, or its rule would never be read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import selftest_cases
from ...ops.precision import product_precision
from ..gpu_plans import whole_blocks
from ..gpu_plans.chunks import LONGEST_SHARED, count_lengths
from ..gpu_plans.lengths import Lengths
from . import (
    add_codes,
    chunk_encode,
    feed_forward,
    gather_chunks,
    partial_sums,
    pool_block,
    segment_pool,
    set_attention,
    set_block,
)
from .block_plans import length_class as block_length_class
from .chunk_launches import FUSED_CLASSES, fits_a_tile, length_class
from .launches import TABLES, architecture, launch, programs_of

Rule = dict[str, Any]
BLOCK_SETS = ((4, 4096), (12, 8192), (28, 4096), (60, 2048), (200, 512))
"""Rows of sets of whole blocks, one for each class of lengths, and numbers of them; beside each is a set of one row.

The shortest are tensors of layers and layers of networks, the others chunks of matrices, beside those of biases.
"""
POOLED_SETS = 1 << 17
"""Chunks, whose rows ``chunk_encode`` has pooled already."""


@dataclass(frozen=True)
class Case:
    """One rule to be found: its table and condition, the call to time, and the candidates' sizes."""

    table: str
    when: Mapping[str, Any]
    run: Callable[[], tuple[Tensor, ...]]
    candidates: tuple[Rule, ...]


@dataclass(frozen=True)
class Inputs:
    """What a case is made for.

    Attributes:
        h: width.
        heads: number of heads, and of queries of pools.
        dtype: of operands.
        device: where the kernels run.
        share: of the sets that a case has, less than 1 for small batches.
    """

    h: int
    heads: int
    dtype: torch.dtype
    device: torch.device
    share: float = 1.0

    def count(self, full: int) -> int:
        """Return the share of a number, at least 2."""
        return max(2, round(full * self.share))

    def normal(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw random numbers."""
        return size * torch.randn(shape, device=self.device, dtype=self.dtype if dtype is None else dtype)

    def pointer(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a pointer on the device, and its copy on the CPU."""
        host = torch.tensor([0, *lengths]).cumsum(0)
        return host.to(self.device, copy=True), host

    def example(self, op: str) -> list[Any]:
        """Return the arguments of a small call of an op, whose parameters have the sizes of trained ones."""
        case = selftest_cases.Variant(op, self.dtype, self.h, self.heads, True)
        return list(selftest_cases.example(case, self.device))


def sizes(warps: tuple[int, ...], stages: tuple[int, ...], **blocks: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return every combination of warps, stages and blocks."""
    return tuple(
        {"num_warps": w, "num_stages": s, "blocks": dict(zip(blocks, values, strict=True))}
        for w, s, *values in itertools.product(warps, stages, *blocks.values())
    )


def flat(result: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a result."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for part in result for t in flat(part))


def _call(kernel: Callable[..., Any], *args: Any) -> Callable[[], tuple[Tensor, ...]]:
    """Return what calls a kernel and returns its tensors."""
    return lambda: flat(kernel(*args))


def attention_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``set_attention``: kernels by lengths of sets."""
    h, heads = inputs.h, inputs.heads
    for length, sets in ((12, 20000), (28, 8000), (60, 3000), (1000, 60)):
        lengths = [length] * inputs.count(sets)
        ptr, host = inputs.pointer(lengths)
        q, k, v, grad = (inputs.normal(sum(lengths), h) for _ in range(4))
        pointers = (ptr, ptr, host, host)
        out, lse = set_attention.set_attention(q, k, v, *pointers, heads)
        block = set_attention.own_block(Lengths.of(host))
        forward = _call(set_attention.set_attention, q, k, v, *pointers, heads)
        backward = _call(set_attention.set_attention_backward, grad, q, k, v, out, lse, *pointers, heads)
        for kernel, run in (("forward", forward), ("query_grad", backward), ("key_grad", backward)):
            when = {"kernel": kernel, "h": h, "heads": heads, "length": block}
            blocks = (16, 32, 64, 128) if block == 128 else tuple({16, block})
            inner = {16: (16,), 128: (32, 64, 128)}.get(block, (32, 64))  # of 16 keys and fewer, launches take 16
            yield Case(
                "set_attention", when, run, sizes((1, 2, 4, 8), (1, 2, 3), BLOCK=blocks, INNER=inner, SPLIT=(1024,))
            )


def pooling_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``segment_pool``."""
    h, queries = inputs.h, inputs.heads
    lengths = [inputs.count(1 << 20), *[3000] * inputs.count(300), *[20] * inputs.count(20000)]
    ptr, host = inputs.pointer(lengths)
    x, logits = inputs.normal(sum(lengths), h), inputs.normal(sum(lengths), queries)
    out, lse = segment_pool.segment_pool(x, logits, ptr, host)
    forward = _call(segment_pool.segment_pool, x, logits, ptr, host)
    backward = _call(segment_pool.segment_pool_backward, out, x, logits, out, lse, ptr, host)
    for kernel, run in (("forward", forward), ("backward", backward)):
        elements = (2048, 4096, 8192, 16384)
        yield Case(
            "segment_pool", {"kernel": kernel, "h": h, "heads": queries}, run,
            sizes((2, 4, 8), (1, 2, 3, 4), ELEMENTS=elements, SHORT=(64,)),
        )  # fmt: skip


def gather_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the case of ``gather_chunks``."""
    shapes = [(512 * 512, 9), (1000 * 2048, 1), (64 * 3, 49), *[(256 * 64, 1)] * 200]
    plan = torch.tensor([[inputs.count(rows), positions] for rows, positions in shapes])
    tensors = [inputs.normal(rows, positions, dtype=torch.float32) for rows, positions in plan.tolist()]
    scale = torch.rand(len(tensors), device=inputs.device) + 0.5

    def run() -> tuple[Tensor, ...]:
        values = gather_chunks.gather_chunks(tensors, scale, plan, inputs.dtype)
        return flat((values, gather_chunks.gather_chunks_backward(values, values, tensors, scale, plan)))

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
        counts, name = count_lengths(torch.tensor([0, length])), length_class(slot_class, precision)
        for path in sorted(TABLES.glob("chunk_encode*.json")):
            forward = path.stem == "chunk_encode"
            if not fits_a_tile(h, counts, dtype if forward else None):
                continue
            usual = launch(path.stem, h=h, heads=heads, length=name, dtype=dtype, arch=arch)
            blocks = {block: (value,) for block, value in usual.blocks.items()}
            when = {"h": h, "heads": heads, "length": name}
            yield ChunkRule(path.stem, length, when, sizes((4, 8, 16), (1, 2), **blocks))


def chunk_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``chunk_encode`` and of the kernels of its backward."""
    args = inputs.example("chunk_encode")
    rules = chunk_rules(inputs.h, inputs.heads, inputs.dtype, architecture(inputs.device))
    for length, group in itertools.groupby(rules, key=lambda rule: rule.length):
        count = inputs.count(640_000 // length)
        chunks, tensors = inputs.pointer([length] * count), inputs.pointer([count // 2, 0, count - count // 2])
        args[:5] = [inputs.normal(length * count), chunks[0], tensors[0], chunks[1], tensors[1]]
        grad = inputs.normal(count, inputs.heads, inputs.h)
        forward = _call(chunk_encode.chunk_encode, *args)
        backward = _call(chunk_encode.chunk_encode_backward, grad, *args)
        for rule in group:
            run = forward if rule.table == "chunk_encode" else backward
            yield Case(rule.table, rule.when, run, rule.candidates)


def feed_forward_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``feed_forward``, for which ``heads`` does not matter."""
    h, dtype = inputs.h, inputs.dtype
    rows = inputs.count((1 << 26) // h)
    q, attended, grad = (inputs.normal(rows, h) for _ in range(3))
    args = (q, attended, inputs.normal(h, h, size=h**-0.5), inputs.normal(h), inputs.normal(4, h))
    forward = _call(feed_forward.feed_forward, *args)
    backward = _call(feed_forward.feed_forward_backward, grad, *args)
    staged = sizes((4,), (1,), ROWS=(0,), INNER=(0,), PROGRAMS=(0,))
    for kernel, run, inner in (("forward", forward, tuple({32, 64, h})), ("backward", backward, (h,))):
        when = {"kernel": kernel, "h": h, "length": feed_forward.precision_class(dtype, product_precision(dtype))}
        tiles = sizes((4, 8), (1, 2, 3), ROWS=(16, 32, 64, 128), INNER=inner, PROGRAMS=(1, 2, 3, 4))
        yield Case("feed_forward", when, run, (*staged, *tiles))


def _block_pointers(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pointers of sets of whole blocks, one for each class of lengths."""
    for length, sets in BLOCK_SETS:
        yield inputs.pointer([length, 1] * inputs.count(sets))


def _in_full_precision(inputs: Inputs) -> bool:
    """Return whether products are of float32 and do without matrix units."""
    return inputs.dtype == torch.float32 and product_precision(inputs.dtype) == "ieee"


def _row_tiles(inputs: Inputs) -> tuple[int, ...]:
    """Return rows of tiles of whole blocks; in full precision larger ones spill kilobytes, and compile for minutes."""
    return (16, 32) if _in_full_precision(inputs) else (16, 32, 64)


def _block_sizes(inputs: Inputs, backward: bool, **tiles: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return candidates for a kernel of whole blocks, of which a backward has no registers for a pipeline of loads."""
    warps = (8,) if _in_full_precision(inputs) else (4, 8)
    if backward:
        return sizes(warps, (1,), **tiles, PROGRAMS=(1, 2))
    return sizes(warps, (1, 2), **tiles)


def set_block_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``set_block``: kernels of whole blocks by lengths of sets."""
    h, heads = inputs.h, inputs.heads
    if h not in whole_blocks.WIDTHS:
        return
    parameters = inputs.example("set_block")[6:]
    for ptr, host in _block_pointers(inputs):
        x, grad = (inputs.normal(int(host[-1]), h) for _ in range(2))
        args = (x, None, ptr, ptr, host, host, *parameters)
        forward, backward = _call(set_block.set_block, *args), _call(set_block.set_block_backward, grad, *args)
        when = {"h": h, "heads": heads, "length": block_length_class(Lengths.of(host), inputs.dtype)}
        rows = _row_tiles(inputs)
        for kernel, run in (("forward", forward), ("query_backward", backward), ("key_backward", backward)):
            candidates = _block_sizes(inputs, run is backward, ROWS=rows, INNER=rows)
            yield Case("set_block", {"kernel": kernel, **when}, run, candidates)


def pool_block_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``pool_block``: kernels by lengths of sets, and of rows that are pooled already."""
    h, heads = inputs.h, inputs.heads
    if h not in whole_blocks.WIDTHS:
        return
    parameters, none = inputs.example("pool_block")[3:], torch.empty(0, dtype=torch.int64)
    pooled = (inputs.normal(inputs.count(POOLED_SETS), heads, h), none.to(inputs.device), none)
    pointers = ((inputs.normal(int(host[-1]), h), ptr, host) for ptr, host in _block_pointers(inputs))
    for x, ptr, host in itertools.chain([pooled], pointers):
        lengths, sets = pool_block.lengths_of(x, host), x.shape[0] if x.dim() == 3 else len(host) - 1
        args = (x, ptr, host, *parameters)
        forward = _call(pool_block.pool_block, *args)
        backward = _call(pool_block.pool_block_backward, inputs.normal(sets, h), *args)
        when = {"h": h, "heads": heads, "length": block_length_class(lengths, inputs.dtype)}
        # Of rows that are pooled already nothing is walked through, INNER at a time.
        inner = (32,) if lengths is None else _row_tiles(inputs)
        for kernel, run in (("forward", forward), ("backward", backward)):
            candidates = _block_sizes(inputs, run is backward, SETS=(4, 8, 16), INNER=inner)
            yield Case("pool_block", {"kernel": kernel, **when}, run, candidates)


def code_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the cases of ``add_codes`` on the chunks of tensors, for which ``heads`` does not matter."""
    h = inputs.h
    lengths = [60, 1] * inputs.count(4096)
    ptr, host = inputs.pointer(lengths)
    level, table = inputs.normal(len(lengths), h), inputs.normal(60, h)
    scale = torch.rand(len(lengths), device=inputs.device).to(inputs.dtype) + 0.5
    codes = (ptr, host, level, table, scale, inputs.normal(h), inputs.normal())
    x = inputs.normal(sum(lengths), h)
    forward, backward = _call(add_codes.add_codes, x, *codes), _call(add_codes.add_codes_backward, x, *codes)
    warps, rows = (2, 4, 8), (16, 32, 64, 128)
    yield Case("add_codes", {"kernel": "forward", "h": h}, forward, sizes(warps, (1,), ROWS=rows))
    candidates = sizes(warps, (1, 3), ROWS=rows, PROGRAMS=(1, 2, 4, 8))
    yield Case("add_codes", {"kernel": "backward", "h": h}, backward, candidates)


def sum_cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the case of the sums of partial sums: those of ``set_block``, by two programs for each multiprocessor."""
    programs = 2 * programs_of(inputs.device)
    parameters = inputs.example("set_block")[6:-1]
    layout = ((str(place), partial_sums.Part(tuple(t.shape), programs)) for place, t in enumerate(parameters))
    sums = partial_sums.PartialSums.make(layout, parameters[0], zeros=True)
    sums.buffer.normal_()

    def run() -> tuple[Tensor, ...]:
        return tuple(sums.summed(inputs.dtype).values())

    yield Case("partial_sums", {}, run, sizes((2, 4, 8), (1, 3), COLUMNS=(64, 128, 256), ROWS=(8, 16, 32)))


@dataclass(frozen=True)
class Tuned:
    """What is tuned by a name of the command's ``--op``.

    Attributes:
        cases: makes its cases.
        op: whose self-test must pass before.
        by_width: whether its rules depend on the width.
    """

    cases: Callable[[Inputs], Iterator[Case]]
    op: str
    by_width: bool = True


TUNED: dict[str, Tuned] = {
    "set_attention": Tuned(attention_cases, "set_attention"),
    "segment_pool": Tuned(pooling_cases, "segment_pool"),
    "gather_chunks": Tuned(gather_cases, "gather_chunks", by_width=False),
    "chunk_encode": Tuned(chunk_cases, "chunk_encode"),
    "feed_forward": Tuned(feed_forward_cases, "feed_forward"),
    "set_block": Tuned(set_block_cases, "set_block"),
    "pool_block": Tuned(pool_block_cases, "pool_block"),
    "add_codes": Tuned(code_cases, "add_codes"),
    "partial_sums": Tuned(sum_cases, "set_block", by_width=False),
}
