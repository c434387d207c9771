"""Device code of feed_forward: tiles of ROWS rows through ln0, fc_o, ReLU and ln1 without leaving the registers.

Programs take tiles in turn, so that fc_o's matrix is loaded once where it fits a program (INNER = WIDTH), else in
blocks of INNER of its columns for every tile. ONE_QUERY: ``q`` is one row, the residual of every row of ``attended``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import add_relu, add_to, layer_norm, layer_norm_backward, matrix, normed, transposed, vector


@triton.jit
def residual(q, attended, row, columns, there, ONE_QUERY: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """q + attended in the given columns: [M, columns]."""
    at = row[:, None] * WIDTH + columns[None, :]
    rows = tl.load(attended + at, mask=there[:, None], other=0).to(ACC)
    if ONE_QUERY:
        return tl.load(q + columns).to(ACC)[None, :] + rows
    else:
        return tl.load(q + at, mask=there[:, None], other=0).to(ACC) + rows


@triton.jit(do_not_specialize=["rows", "tiles"])
def forward_kernel(
    q, attended, w_o, b_o, norm, out, rows, tiles,
    ONE_QUERY: tl.constexpr, LAYER_NORM: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    operand = w_o.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns, inner = tl.arange(0, WIDTH), tl.arange(0, INNER)
    if INNER == WIDTH:
        w = transposed(w_o, WIDTH)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < rows
        summed = residual(q, attended, row, columns, there, ONE_QUERY, WIDTH, ACC)  # [M, h]
        o = layer_norm(summed, norm, LAYER_NORM, WIDTH, ACC)
        if INNER == WIDTH:
            z = tl.dot(o.to(operand), w, input_precision=PRECISION, out_dtype=ACC)
        else:
            # Registers cannot be cut into columns: each block's are computed again, from rows that the cache holds.
            _, rstd = normed(summed, WIDTH)
            mean = tl.sum(summed, 1) * (1 / WIDTH)
            z = tl.zeros((ROWS, WIDTH), ACC)
            for first in range(0, WIDTH, INNER):
                block = first + inner
                part = residual(q, attended, row, block, there, ONE_QUERY, WIDTH, ACC)  # [M, INNER]
                if LAYER_NORM:
                    gain, bias = tl.load(norm + block).to(ACC), tl.load(norm + WIDTH + block).to(ACC)
                    part = (part - mean[:, None]) * rstd[:, None] * gain[None, :] + bias[None, :]
                w = tl.load(w_o + columns[None, :] * WIDTH + block[:, None])  # [INNER, h]
                z = tl.dot(part.to(operand), w, z, input_precision=PRECISION, out_dtype=ACC)
        z += vector(b_o, WIDTH, ACC)[None, :]
        o = layer_norm(add_relu(o, z), norm + 2 * WIDTH, LAYER_NORM, WIDTH, ACC)
        at = row[:, None] * WIDTH + columns[None, :]
        tl.store(out + at, o.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["rows", "tiles"])
def backward_kernel(
    grad, q, attended, w_o, b_o, norm, sum_grad, w_part, b_part, norm_part, rows, tiles,
    ONE_QUERY: tl.constexpr, LAYER_NORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``grad (rows, h)`` of the result -> of q + attended, the forward again on the way. What the rows of a program
    give to the parameters' gradients goes to its own ``w_part (programs, h, h)``, ``b_part``, ``norm_part``."""
    operand = w_o.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    b_part += program * WIDTH
    norm_part += program * 4 * WIDTH
    w = matrix(w_o, WIDTH)
    w_sum = tl.zeros((WIDTH, WIDTH), ACC)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < rows
        at = row[:, None] * WIDTH + columns[None, :]
        o = residual(q, attended, row, columns, there, ONE_QUERY, WIDTH, ACC)  # [M, h]
        if LAYER_NORM:
            unit0, rstd0 = normed(o, WIDTH)
            o = unit0 * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
        seen = o.to(operand)
        z = tl.dot(seen, tl.trans(w), input_precision=PRECISION, out_dtype=ACC) + vector(b_o, WIDTH, ACC)[None, :]
        g = tl.load(grad + at, mask=there[:, None], other=0).to(ACC)
        if LAYER_NORM:
            unit1, rstd1 = normed(add_relu(o, z), WIDTH)
            g = layer_norm_backward(g, unit1, rstd1, norm + 2 * WIDTH, norm_part + 2 * WIDTH, WIDTH, ACC)
        z_grad = tl.where(z <= 0, 0.0, g)
        add_to(b_part, tl.sum(z_grad, 0), WIDTH)
        z_grad = z_grad.to(operand)
        w_sum = tl.dot(tl.trans(z_grad), seen, w_sum, input_precision=PRECISION, out_dtype=ACC)
        g = tl.dot(z_grad, w, g, input_precision=PRECISION, out_dtype=ACC)
        if LAYER_NORM:
            g = layer_norm_backward(g, unit0, rstd0, norm, norm_part, WIDTH, ACC)
        tl.store(sum_grad + at, g.to(sum_grad.dtype.element_ty), mask=there[:, None])
    to = w_part + program * WIDTH * WIDTH + columns[:, None] * WIDTH + columns[None, :]
    tl.store(to, w_sum)
