"""Values of quantised weights, from the tensors that common formats keep beside them.

Every function returns float32 in the layout of `torch.nn.Linear`, `(out, in)`, and raises `Unfit` where the shapes of
the tensors do not belong together. Nothing here looks at names; `quantised_weights` does.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Unfit",
    "awq",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "gptq",
    "mxfp4",
    "packed_integers",
    "scaled",
    "shape_of",
    "unpack",
]

WORD = 32
BLOCK = 128  # rows and columns that share a scale in block-scaled float8
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # the four bits of a word that hold each of its eight columns
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 without its sign


class Unfit(Exception):
    """Tensors of a quantised weight that do not belong together; the message ends a sentence."""


def scaled(
    stored: Tensor, scale: Tensor, zero_point: Tensor | None = None, group_of_column: Tensor | None = None
) -> Tensor:
    """Return `(stored - zero_point) * scale`, with scale and zero point spread over the stored tensor.

    Args:
        stored: int8, uint8 or float8, of any shape.
        scale: one for all, one per row `(out,)`, or as many dimensions as `stored`, each with 1, as many, or one per
            block of neighbours: blocks of 128 (the last may be shorter) where that fits, else of equal length.
        zero_point: the same, or None for 0.
        group_of_column: `(in,)`, the column of a two-dimensional `scale` that each column of `stored` uses.
    """
    columns = group_of_column
    if columns is not None:
        if scale.ndim != 2 or stored.ndim != 2 or columns.shape != stored.shape[1:]:
            raise Unfit(
                f"a group per column {shape_of(columns)} does not fit {shape_of(stored)} and scales {shape_of(scale)}"
            )
        columns = _indices(columns, scale.shape[1])
        scale = scale.index_select(1, columns)
        if zero_point is not None and zero_point.numel() > 1:
            zero_point = zero_point.index_select(1, columns)
    values = stored.float()
    if zero_point is not None:
        values = values - _spread(zero_point, stored.shape)
    return values * _spread(scale, stored.shape)


def bitsandbytes_8bit(stored: Tensor, row_maxima: Tensor) -> Tensor:
    """Return `stored * SCB / 127`, where `SCB (out,)` holds the largest magnitude of each row."""
    if row_maxima.numel() != stored.shape[0]:
        raise Unfit(f"the maxima of rows {shape_of(row_maxima)} do not fit {shape_of(stored)}")
    return scaled(stored, row_maxima.float().reshape(-1) / 127)


def bitsandbytes_4bit(
    stored: Tensor, state: Tensor, absmax: Tensor, codes: Tensor, nested: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the codes that pairs of four bits (high bits first) stand for, times the maximum of their block.

    Args:
        stored: two weights per byte, in any dtype.
        state: uint8, a JSON object as text with `shape`, `blocksize`, and for nested maxima `nested_blocksize` and
            `nested_offset`.
        absmax: a maximum per block, or with `nested` the uint8 codes of one.
        codes: `(16,)`, the value of each code.
        nested: `nested_absmax` and `nested_quant_map`, from which the maxima are decoded first.
    """
    try:
        described: Any = json.loads(bytes(state.cpu().tolist()))
        shape, size = [int(n) for n in described["shape"]], int(described["blocksize"])
        count = math.prod(shape)
        maxima = absmax.float()
        if nested is not None:
            outer, outer_size = nested, int(described["nested_blocksize"])
            outer_size = min(outer_size, absmax.numel())
            factors = outer[0].float().repeat_interleave(outer_size)[: absmax.numel()]
            maxima = outer[1].float()[_indices(absmax, outer[1].numel())] * factors + float(described["nested_offset"])
    except (ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        raise Unfit(f"its quant_state is not what bitsandbytes writes ({type(error).__name__})") from error
    pairs = stored.contiguous().view(torch.uint8).reshape(-1)
    if min(shape, default=1) < 1 or size < 1 or pairs.numel() != -(-count // 2) or codes.numel() != 16:
        raise Unfit(f"bytes {shape_of(stored)} and codes {shape_of(codes)} do not fit its shape {tuple(shape)}")
    if maxima.numel() != -(-count // size):
        raise Unfit(f"{maxima.numel()} maxima do not fit {count} values in blocks of {size}")
    each = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[:count]
    values = codes.float()[each.long()] * maxima.repeat_interleave(min(size, count))[:count]
    return values.reshape(shape)


def gptq(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None, group_of_row: Tensor | None, *, second: bool = False
) -> Tensor:
    """Return `(q - z) * scale` of GPTQ, whose first format stores zero points less 1.

    Zero points that are all half of the range are taken as they are: so the second format stores symmetric weights.

    Args:
        qweight: int32 `(in * bits / 32, out)`, a stream of bits down each column.
        scales: `(groups, out)`.
        qzeros: int32 `(groups, out * bits / 32)`, a stream of bits along each row; None for half of the range.
        group_of_row: `(in,)` or None for groups of equal length. It or `qzeros` must be there.
        second: whether zero points are stored as they are, as in the format "gptq_v2".
    """
    groups, out = scales.shape
    if qzeros is not None:
        bits, rest = divmod(WORD * qzeros.shape[1], out)
        rest += qzeros.shape[0] != groups
    elif group_of_row is not None and group_of_row.numel():
        bits, rest = divmod(WORD * qweight.shape[0], group_of_row.numel())
    else:
        raise Unfit("neither zero points nor groups are there to tell the number of bits")
    rows, more = divmod(WORD * qweight.shape[0], max(bits, 1))
    if rest or more or bits not in (2, 3, 4, 8) or qweight.shape[1] != out:
        zeros = "none" if qzeros is None else shape_of(qzeros)
        raise Unfit(f"scales {shape_of(scales)} and zero points ({zeros}) do not fit {shape_of(qweight)}")
    groups_of = _groups(group_of_row, rows, groups, scales.device)
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    if qzeros is None:
        zeros_of = torch.full((groups, out), half, dtype=torch.int32, device=scales.device)
    else:
        zeros_of = unpack(qzeros, bits, out, 1)
        if not second and not bool((zeros_of == half).all()):
            zeros_of = (zeros_of + 1) & mask
    stored = unpack(qweight, bits, rows, 0)
    return ((stored - zeros_of[groups_of]).float() * scales.float()[groups_of]).t().contiguous()


def awq(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    """Return `(q - z) * scale` of four-bit weights whose columns AWQ interleaves within each word.

    Args:
        qweight: int32 `(in, out / 8)`.
        scales: `(groups, out)`.
        qzeros: int32 `(groups, out / 8)`.
    """
    (rows, words), (groups, out) = qweight.shape, scales.shape
    if out != 8 * words or tuple(qzeros.shape) != (groups, words):
        raise Unfit(f"scales {shape_of(scales)} and zero points {shape_of(qzeros)} do not fit {shape_of(qweight)}")
    order = torch.arange(out, device=qweight.device).reshape(-1, 8)[:, list(AWQ_COLUMNS)].reshape(-1)
    stored, zeros = (unpack(packed, 4, out, 1).index_select(1, order) for packed in (qweight, qzeros))
    of_row = _groups(None, rows, groups, qweight.device)
    return ((stored - zeros[of_row]).float() * scales.float()[of_row]).t().contiguous()


def packed_integers(
    packed: Tensor, shape: Tensor, scale: Tensor, zero_point: Tensor | None, group_of_column: Tensor | None
) -> Tensor:
    """Return four- or eight-bit integers of compressed-tensors, packed along rows and stored plus half of the range.

    Args:
        packed: int32 `(out, ceil(in * bits / 32))`.
        shape: the two numbers out and in.
        scale: as for `scaled`.
        zero_point: None, or as `scale` and packed along its first dimension.
        group_of_column: as for `scaled`.
    """
    size = [int(n) for n in shape.tolist()]
    if len(size) != 2 or packed.ndim != 2 or size[0] != packed.shape[0] or size[1] < 1:
        raise Unfit(f"its shape {tuple(size)} does not fit {shape_of(packed)}")
    bits = next((b for b in (4, 8) if -(-size[1] * b // WORD) == packed.shape[1]), 0)
    if not bits:
        raise Unfit(f"its shape {tuple(size)} does not fit {shape_of(packed)} with four or eight bits")
    half = 1 << (bits - 1)
    if zero_point is not None and zero_point.dtype == torch.int32:
        if zero_point.ndim != 2 or zero_point.shape[0] != -(-size[0] * bits // WORD):
            raise Unfit(f"the zero points {shape_of(zero_point)} do not fit its shape {tuple(size)}")
        zero_point = unpack(zero_point, bits, size[0], 0) - half
    return scaled(unpack(packed, bits, size[1], 1) - half, scale, zero_point, group_of_column)


def mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Return e2m1 numbers times powers of two, `(experts, in, out)`, from blocks along `in` of experts' `(out, in)`.

    Args:
        blocks: uint8 `(experts, out, groups, bytes)`, two numbers per byte, low bits first.
        exponents: uint8 `(experts, out, groups)`, plus 127.
    """
    if blocks.ndim != 4 or exponents.shape != blocks.shape[:-1]:
        raise Unfit(f"exponents {shape_of(exponents)} do not fit {shape_of(blocks)}")
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], device=blocks.device)
    numbers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    values = torch.ldexp(numbers, (exponents.int() - 127).unsqueeze(-1))
    return values.flatten(-2).transpose(1, 2).contiguous()


def unpack(words: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """Return the first `count` integers of `bits` each, lowest bits first, of the words along a dimension; int32."""
    starts = torch.arange(count, device=words.device) * bits
    shape = [1] * words.ndim
    shape[dim] = count
    word, shift = starts // WORD, (starts % WORD).int().reshape(shape)
    values = words.index_select(dim, word) >> shift
    if WORD % bits:  # some integers end in the next word
        left = WORD - shift
        ends = left < bits
        after = words.index_select(dim, (word + 1).clamp(max=words.shape[dim] - 1))
        low = values & ((1 << left.clamp(max=bits)) - 1)
        values = torch.where(ends, low | (after << left.clamp(max=bits)), values)
    return values & ((1 << bits) - 1)


def _groups(given: Tensor | None, rows: int, groups: int, device: torch.device) -> Tensor:
    if given is not None:
        if tuple(given.shape) != (rows,):
            raise Unfit(f"groups of rows {shape_of(given)} do not fit {rows} rows")
        return _indices(given, groups)
    if groups < 1 or rows % groups:
        raise Unfit(f"{rows} rows do not divide into {groups} groups")
    return torch.arange(rows, device=device) // (rows // groups)


def _indices(given: Tensor, count: int) -> Tensor:
    given = given.long()
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < count:
        raise Unfit(f"it has indices outside 0..{count - 1}")
    return given


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Return the scale as float32 that broadcasts against a tensor of `shape`."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if shape and scale.ndim and scale.numel() == scale.shape[0] == shape[0]:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if scale.ndim != len(shape):
        raise Unfit(f"scales {shape_of(scale)} do not fit {tuple(shape)}")
    blocked = [d for d in range(len(shape)) if scale.shape[d] not in (1, shape[d])]
    whole = all(-(-shape[d] // BLOCK) == scale.shape[d] for d in blocked)
    for d in blocked:
        if not whole and (scale.shape[d] < 1 or shape[d] % scale.shape[d]):
            raise Unfit(f"scales {shape_of(scale)} do not fit {tuple(shape)} in blocks of {BLOCK} or of equal length")
        length = BLOCK if whole else shape[d] // scale.shape[d]
        scale = scale.repeat_interleave(length, dim=d).narrow(d, 0, shape[d])
    return scale


def shape_of(tensor: Tensor) -> str:
    """Return the shape of a tensor for a message."""
    return f"of shape {tuple(tensor.shape)}"
