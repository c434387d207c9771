"""The kernels that are counted, and the trip counts of their loops.

All counts are for chunks that fill their slots (length ``chunk_size``, a power of two from 32 on) and for weights that
stay in shared memory, with layer norm: what nearly all work of a large batch is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .flow import Loop


@dataclass(frozen=True)
class Config:
    """What is encoded: width ``hidden``, number of heads, and elements of a chunk."""

    hidden: int = 64
    heads: int = 4
    chunk_size: int = 32

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Kernel:
    """A kernel: its file and name, the loop over its work, and how much of that there is per 32 weights."""

    title: str
    file: str  # below csrc/cuda
    pattern: str
    per_unit: str  # the line of source of the loop over units of work
    units: Callable[[Config, int], float]  # runs of that loop per 32 weights, by rows of a warp
    launches: int = 1  # in a training step
    rows: int = 16  # of a warp
    threads: int = 0  # of a block that shares a multiprocessor with others; 0: a block fills it, see the kernel's name
    halves: bool = True  # numbers of 16 bits in memory
    saving: bool = False  # writes what the backward needs, instead of the result


_BINS = "for (int64_t step = block_id(); step * per_step < "
_OPERANDS = {"bfloat16": "OpBfloat", "float16": "OpHalf", "float32": "OpFloat", "tf32": "OpTf32"}
_FILES = {"bfloat16": "bfloat", "float16": "half", "float32": "float", "tf32": "tf32"}
_STORED = {"bfloat16": "BFloat", "float16": "Half", "float32": "float", "tf32": "float"}


def training_kernels(config: Config, dtype: str, architecture: str) -> list[Kernel]:
    """Return the kernels of a training step of ``chunk_encode``; the first one is the forward pass."""
    wgmma = architecture == "90a" and config.hidden == 64 and dtype in ("bfloat16", "float16")
    op, stored, h, d = _OPERANDS[dtype], _STORED[dtype], config.hidden, config.head_width
    tile = 32 if h % 64 else 64
    fills_bins = dtype in ("bfloat16", "float16") and h <= 64 and d >= 16 and config.chunk_size == 32
    operands, full = (f"chunk_encode/{part}_{_FILES[dtype]}" for part in ("operands", "full_backward"))
    pool, weights = "chunk_encode/pool_backward", "chunk_encode/weight_grad"
    forward = rf"chunk_encode_forward{'_wgmma' if wgmma else ''}<sne::{op}, sne::ChunkShape<[^>]* {h}, {d}, "
    forward_file = "chunk_encode/forward_sm90" if wgmma else operands
    both_forwards = [
        Kernel("forward", forward_file, forward, _BINS, lambda c, rows: 32 / rows),
        Kernel("forward of the backward", forward_file, forward, _BINS, lambda c, rows: 32 / rows, saving=True),
    ]
    if fills_bins:
        shape = rf"_backward<sne::{op}, sne::ChunkShape<[^>]* {h}, {d}, "
        return [
            *both_forwards,
            Kernel("pool backward", full, f"chunk_full_pool{shape}", _BINS, lambda c, rows: 2.0, threads=256),
            Kernel("block backward", full, f"chunk_full_block{shape}", _BINS, lambda c, rows: 2.0, 3, threads=256),
            Kernel("sums of codes", full, rf"chunk_full_codes_backward<sne::{stored}, {h}>", _BINS,
                   lambda c, rows: c.hidden / 16, threads=512),
            Kernel("scalar backward", full, f"chunk_full_scalar{shape}", _BINS, lambda c, rows: 2.0, threads=256),
        ]  # fmt: skip
    return [
        *both_forwards,
        Kernel("pool backward", pool, rf"chunk_pool_backward<sne::{stored}>", _BINS, lambda c, rows: 32 / rows,
               rows=32, threads=256, halves=stored != "float"),
        Kernel("block backward", operands, rf"chunk_block_backward<sne::{op}, sne::ChunkShape<[^>]* {h}, {d}, ", _BINS,
               lambda c, rows: 2.0, 3),
        Kernel("weight gradients", weights, rf"chunk_weight_grad<sne::{op}, {tile}>",
               "for (; row + kRowsAtOnce <= rows; row += num_blocks() * kRowsAtOnce) add(std::true_type{});",
               lambda c, rows: 4.0 * (c.hidden / tile) ** 2, 13, threads=128),
        Kernel("sums of chunks", pool, rf"chunk_row_sums<sne::{stored}>",
               "for (int64_t first = block_id() * num_warps(); first < call.count; ",
               lambda c, rows: 32 / c.chunk_size, threads=256),
        Kernel("sums of elements", pool, "chunk_row_element_sums",
               "for (int64_t bin = block_id(); bin < count; bin += num_blocks()) {",
               lambda c, rows: c.hidden / 4 / 4, threads=256),
        Kernel("scalar backward", operands, rf"chunk_scalar_backward<sne::{op}, {h}, ", _BINS, lambda c, rows: 2.0),
    ]  # fmt: skip


def branches(kernel: Kernel) -> dict[str, float]:
    """Return how often statements behind a branch run, by the beginning of their source."""
    return {
        "if (block == 2)": 1 / 3,
        "if (set.multi_chunk) {": 0,
        "if (cls.multi_chunk) {": 0,
        "if (bad &&": 0,
        "sync_block();": 0,
        "copy(offset, count);": 0,
        "encode_bin<Op, Shape>(": 0,
        "if (!pieces)": 0,
        "store_pieces<Op>(to, x[0]);": float(kernel.saving),
        "if (saved && local": float(kernel.saving),
        "if (head) sum[0]": 0,
        "if (chunk != held) {": 1 / 32,
        "if (heads < 4) {": 0,
        "if (all_full && step + 1 == full_end) {": 0,  # once for a thread block
        "if (saved) save_full": float(kernel.saving),
        "save_full<Op, Shape>(saved + 3 * plane": float(kernel.saving),
        "pool_of_full<Op, Shape>(": float(not kernel.saving),
        "if (!saved)": float(not kernel.saving),
        "else if (local < call.count)": float(kernel.saving),
    }


def loops(config: Config, kernel: Kernel) -> dict[str, Loop]:
    """Return loops by the beginning of their source, as ``kernel`` runs them; the first that fits."""
    h, heads, length = config.hidden, config.heads, config.chunk_size
    warps = length / kernel.rows
    return {
        # once for a thread block
        _BINS: Loop(2),
        "for (int i = thread_id(); i < at.": Loop(8),
        "for (int i = thread_id(); norm &&": Loop(2),
        "for (int at = thread_id() * 16; at < bytes; at += num_threads() * 16)": Loop(26),
        "for (int i = thread_id(); i < size; i += num_threads())": Loop(2),
        "for (int i = thread_id(); i < vectors * width; i += num_threads()) {": Loop(2),
        "for (int warp = 0; warp < kFullWarps; ++warp) total += sums[warp * size + i];": Loop(8, 8),
        "for (int i = thread_id(); i < kSize; i += num_threads()) {": Loop(2),
        "for (int i = thread_id(); i < 3 * W + 2 * H; i += num_threads()) {": Loop(2),
        "for (int i = thread_id(); i < 32 * W; i += num_threads()) {": Loop(4),
        "for (int bin = 0; bin < kBins; ++bin) sum +=": Loop(4, 4),
        # forward
        "for (int block = 1; block < 4; ++block) {": Loop(3),
        "for (int head = 0; head < Shape::HEADS; ++head) {": Loop(heads),
        "for (int first = 0; first < Shape::HEADS; first += kGroup) {": Loop(max(1, heads / 4)),
        "for (int part = 0; part < set.warps; ++part) {": Loop(warps),
        # backward
        "for (int first = 0; first < W; first += 8 * N) {": Loop(h / 32),
        "for (int first = 0; first < Shape::NT; first += kTiles) {": Loop(1),
        "for (int first = 0; first < N; first += kTiles) {": Loop(1),
        "for (int which = 0; which < 3; ++which) {": Loop(3),
        "for (int pair = 0; pair < heads; pair += 2) {": Loop(heads / 2),
        "for (int j = slot.key_begin; j < slot.key_end; ++j) {": Loop(length, 16),
        "for (int i = slot.key_begin; i < slot.key_end; ++i) {": Loop(length, 16),
        "for (int mask = 8; mask; mask /= 2)": Loop(4),
        "for (int j = slot.key_begin; j < slot.key_end; ++j) top = max_of(top, weight[j * heads": Loop(length, 4),
        "for (int j = slot.key_begin; j < slot.key_end; ++j) total +=": Loop(length, 4),
        "for (int a = 0; a < heads; ++a) own.weight": Loop(heads, 4),
        "for (int a = 0; a < heads; ++a) {": Loop(heads),
        "for (int a = 0; a < heads; ++a)": Loop(heads),
        "for (int warp = 0; warp < num_warps(); ++warp) total += sums[warp * size + i];": Loop(8, 4),
        # of the forward, in the order of its source
        "for (int j = slot.key_begin + 1; j < slot.key_end; ++j) low =": Loop(length, 16),
        "for (int head = first; head < heads; head += kPerRow) {": Loop(heads * kernel.rows / 32),
        "for (int j = slot.key_begin; j < slot.key_end; ++j) top = max_of(top, weight[j * H": Loop(length, 16),
        "for (int j = group * chunks.length; j < (group + 1) * chunks.length; ++j) {": Loop(length, 4),
        "for (int item = set.part * 32 + lane; item < 16 * H; item += 32 * set.warps) {": Loop(heads / 2),
        "for (int k = 0; k < Shape::KT; ++k) {": Loop(h / 16),
        "for (int c = 0; c < width; c += 2 * kVector<T>) {": Loop(h / 16 if kernel.halves else h / 8),
        "for (int column = 2 * lane_id(); column < width; column += 64) {": Loop(max(1, h / 64)),
        "for (int head = 0; head < heads; head += group) {": Loop(max(1, heads / 4)),
        "for (int i = 0; i < 32; ++i) {": Loop(32),
        "for (int j = slot.key_begin; j < slot.key_end; ++j) mean +=": Loop(length, 16),
        "for (int c = lane_id(); c < width; c += 32) {": Loop(h / 32),
        "for (int i = 0; i < chunks.length; ++i) sum += rows[int64_t(i) * width + c];": Loop(length, 4),
        "for (int group = 0; group < chunks.count; ++group)": Loop(1),
        "for (int i = thread_id(); i < kRowsAtOnce * kPerRow; i += num_threads()) {": Loop(h / 32),
        "for (; row + kRowsAtOnce <= rows; row += num_blocks() * kRowsAtOnce) add(std::true_type{});": Loop(2),
        "for (int64_t first = block_id() * num_warps(); first < call.count; ": Loop(2),
        "for (int64_t bin = block_id(); bin < count; bin += num_blocks()) {": Loop(8, 4),
        "for (int i = 0; i < kRowsAtOnce; ++i) bias += to_real(grads[i * G::kStride + thread_id()]);": Loop(32, 32),
    }  # fmt: skip
