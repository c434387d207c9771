"""Functions of several kernels on tiles of rows [M, h]: loads and stores, products, layer norms, partial sums."""

from __future__ import annotations

import triton
import triton.language as tl

_EPS = tl.constexpr(1e-5)


@triton.jit
def matrix(
    w,
    WIDTH: tl.constexpr,
):
    """Load an (h, h) matrix as stored: [h, h]."""
    i_row = tl.arange(0, WIDTH)
    return tl.load(w + i_row[:, None] * WIDTH + i_row[None, :])


@triton.jit
def transposed(
    w,
    WIDTH: tl.constexpr,
):
    """Load the transpose of a stored (h, h) matrix: [h, h]."""
    i_row = tl.arange(0, WIDTH)
    return tl.load(w + i_row[None, :] * WIDTH + i_row[:, None])


@triton.jit
def vector(
    v,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Load a vector: [h]."""
    return tl.load(v + tl.arange(0, WIDTH)).to(ACC)


@triton.jit
def load_rows(
    rows,
    i_row,
    WIDTH: tl.constexpr,
):
    """Load rows of a workspace: [M, h]."""
    return tl.load(rows + i_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def save_rows(
    rows,
    i_row,
    b_rows,
    WIDTH: tl.constexpr,
):
    """Store ``b_rows`` [M, h] to rows of a workspace."""
    p_rows = rows + i_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(p_rows, b_rows.to(rows.dtype.element_ty))


@triton.jit
def add_to(
    partial,
    b_vector,
    N: tl.constexpr,
):
    """Add a vector [N] to this program's own partial sum, which only this program reads and writes.

    Threads load other elements than they store, so that one may read what another has stored for the tile before:
    hence the barrier.
    """
    tl.debug_barrier()
    p_partial = partial + tl.arange(0, N)
    tl.store(p_partial, tl.load(p_partial) + b_vector)


@triton.jit
def add_matrix_to(
    partial,
    b_matrix,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a matrix [ROWS, COLUMNS] to this program's own partial sum."""
    i_value = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(partial + i_value, tl.load(partial + i_value) + b_matrix)


@triton.jit
def linear(
    b_x,
    w,
    b,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return x w^T + b: [M, h] -> [M, h]."""
    return unbiased(b_x, w, WIDTH, PRECISION, ACC) + vector(b, WIDTH, ACC)[None, :]


@triton.jit
def unbiased(
    b_x,
    w,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return x w^T: [M, h] -> [M, h]."""
    return tl.dot(b_x, transposed(w, WIDTH), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def normed(
    b_x,
    WIDTH: tl.constexpr,
):
    """Return the rows at mean 0 and variance 1, [M, h], and the reciprocal of their standard deviation [M]."""
    b_centred = b_x - (tl.sum(b_x, 1) * (1 / WIDTH))[:, None]
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) * (1 / WIDTH) + _EPS)
    return b_centred * b_rstd[:, None], b_rstd


@triton.jit
def normed_backward(
    b_grad,
    b_unit,
    b_rstd,
    WIDTH: tl.constexpr,
):
    """Return the gradient through ``normed``, whose result is ``b_unit``: [M, h]."""
    b_mean = tl.sum(b_grad, 1) * (1 / WIDTH)
    b_slope = tl.sum(b_grad * b_unit, 1) * (1 / WIDTH)
    return (b_grad - b_mean[:, None] - b_unit * b_slope[:, None]) * b_rstd[:, None]


@triton.jit
def layer_norm(
    b_o,
    norm,
    LAYER_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the layer norm of rows [M, h] by gain and bias ``norm (2, h)``; without LAYER_NORM the rows themselves."""
    if LAYER_NORM:
        b_o, _ = normed(b_o, WIDTH)
        b_o = b_o * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
    return b_o


@triton.jit
def layer_norm_backward(
    b_grad,
    b_unit,
    b_rstd,
    norm,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the gradients through a layer norm of unit rows ``b_unit`` [M, h], and of its gain and bias [h]."""
    b_gain_grad, b_bias_grad = tl.sum(b_grad * b_unit, 0), tl.sum(b_grad, 0)
    b_grad = normed_backward(b_grad * vector(norm, WIDTH, ACC)[None, :], b_unit, b_rstd, WIDTH)
    return b_grad, b_gain_grad, b_bias_grad


@triton.jit
def add_relu(
    b_o,
    b_z,
):
    """Return o + relu(z), where a NaN of z stays one."""
    return b_o + tl.maximum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
