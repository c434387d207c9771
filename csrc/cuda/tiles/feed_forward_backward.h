// Backward of the feed-forward half of a block on the 16 rows of a warp, and sums over rows.
//
// Gradients of vectors are summed by each warp, then over the warps of a thread block in order, and added to that
// block's row of a table, which no other block writes: two runs give the same bits.
#pragma once

#include "cuda/tiles/feed_forward.h"

namespace sne {

// Planes of the factors of the matrices' gradients: the gradients of q, k, v and of fc_o's result, and fc_o's input.
enum Factor { kQueryGrad, kKeyGrad, kValueGrad, kOutGrad, kOutInput };

namespace detail {
template <int half, int N>
SNE_DEVICE void fold(float (&v)[N], int mask) {
  const bool upper = lane_id() & mask;
  SNE_UNROLL
  for (int i = 0; i < half; ++i) {
    const float sent = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
    v[i] = kept + shuffle_xor(sent, mask);
  }
}
}  // namespace detail

// Adds the sums over 16 rows to sums[column]. v holds the sums of a lane's two rows: v[2 j + e] is of column
// 8 j + 2 t + e. Every lane adds N / 8 of the columns, always the same ones, which no other lane writes.
template <int N>
SNE_DEVICE void add_columns(float *sums, float (&v)[N]) {
  detail::fold<N / 2>(v, 16);
  detail::fold<N / 4>(v, 8);
  detail::fold<N / 8>(v, 4);
  const int lane = lane_id();
  const int first = (lane >> 4 & 1) * (N / 2) + (lane >> 3 & 1) * (N / 4) + (lane >> 2 & 1) * (N / 8);
  SNE_UNROLL
  for (int i = 0; i < N / 8; ++i) {
    const int at = first + i;
    sums[at / 2 * 8 + lane % 4 * 2 + at % 2] += v[i];
  }
}
template <int NT>
SNE_DEVICE void add_columns_of(float *sums, const Tile (&a)[NT]) {
  float v[2 * NT];
  SNE_UNROLL
  for (int j = 0; j < 2 * NT; ++j) v[j] = a[j / 2].c[j % 2] + a[j / 2].c[2 + j % 2];
  add_columns(sums, v);
}
template <int NT>
SNE_DEVICE void add_columns_of(float *sums, const Tile (&a)[NT], const Tile (&b)[NT]) {
  float v[2 * NT];
  SNE_UNROLL
  for (int j = 0; j < 2 * NT; ++j)
    v[j] = a[j / 2].c[j % 2] * b[j / 2].c[j % 2] + a[j / 2].c[2 + j % 2] * b[j / 2].c[2 + j % 2];
  add_columns(sums, v);
}

// Turns the gradient of a norm's result into that of its input. normalized: rows of mean 0 and variance 1.
template <int NT>
SNE_DEVICE void norm_backward(Tile (&grad)[NT], const Tile (&normalized)[NT], const float (&rstd)[2],
                              const float *weight) {
  const int t = lane_id() % 4;
  float mean[2] = {0, 0}, slope[2] = {0, 0};
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) {
      grad[j].c[e] *= weight[8 * j + 2 * t + e % 2];
      mean[e / 2] += grad[j].c[e];
      slope[e / 2] += grad[j].c[e] * normalized[j].c[e];
    }
  }
  SNE_UNROLL
  for (int r = 0; r < 2; ++r) {
    mean[r] = sum_over_quad(mean[r]) * (1.0f / (8 * NT));
    slope[r] = sum_over_quad(slope[r]) * (1.0f / (8 * NT));
  }
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e)
      grad[j].c[e] = (grad[j].c[e] - mean[e / 2] - normalized[j].c[e] * slope[e / 2]) * rstd[e / 2];
  }
}

// Backward of the feed-forward half of a block, which it computes again: turns grad from the gradient of the result
// into that of the input o, and normalizes o. norm_sums (4, h) of this warp: ln0.weight, ln0.bias, ln1.weight,
// ln1.bias. Calls keep(factor, rows) for the factors of fc_o's gradient.
template <class Op, class Shape, class Keep>
SNE_DEVICE void feed_forward_backward(Tile (&grad)[1][Shape::NT], Tile (&o)[1][Shape::NT], const WeightSource<Op> &out,
                                      int64_t out_offset, const WeightSource<Op> &out_transposed,
                                      int64_t transposed_offset, const float *out_bias, float *norm_sums,
                                      bool layer_norm, const Keep &keep) {
  constexpr int W = Shape::W, NT = Shape::NT, N = Shape::kOutRows / 8;
  const float *norm = out_bias + W;
  float rstd0[1][2], rstd1[1][2];
  if (layer_norm) normalize(o, rstd0);
  Tile y[1][NT];
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) y[0][j] = o[0][j];
  if (layer_norm) scale_and_shift(y, norm, norm + W);
  Rows16<Op> rows[1][Shape::KT];
  to_operands<Op>(rows, y);
  keep(kOutInput, rows);
  uint32_t dead[NT / N] = {};  // bits: where relu gave 0
  SNE_LOOP
  for (int first = 0; first < W; first += 8 * N) {
    Tile z[1][N];
    fill_rows(z, out_bias + first);
    multiply<false>(z, rows, out.piece(out_offset + first * W, 8 * N * W));
    uint32_t bits = 0;
    SNE_UNROLL
    for (int i = 0; i < 4 * N; ++i) {
      bits |= uint32_t(z[0][i / 4].c[i % 4] <= 0) << i;
      y[0][i / 4].c[i % 4] += relu(z[0][i / 4].c[i % 4]);
    }
    SNE_UNROLL
    for (int i = 0; i < NT / N - 1; ++i) dead[i] = dead[i + 1];
    dead[NT / N - 1] = bits;
    turn<N>(y);
  }
  if (layer_norm) {
    normalize(y, rstd1);
    add_columns_of(norm_sums + 2 * W, grad[0], y[0]);
    add_columns_of(norm_sums + 3 * W, grad[0]);
    norm_backward(grad[0], y[0], rstd1[0], norm + 2 * W);
  }
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) y[0][j].c[e] = dead[j / N] >> (j % N * 4 + e) & 1 ? 0.0f : grad[0][j].c[e];
  }
  to_operands<Op>(rows, y);
  keep(kOutGrad, rows);
  SNE_LOOP
  for (int first = 0; first < W; first += 8 * N) {
    Tile part[1][N];
    SNE_UNROLL
    for (int n = 0; n < N; ++n) part[0][n] = grad[0][n];
    multiply<false>(part, rows, out_transposed.piece(transposed_offset + first * W, 8 * N * W));
    SNE_UNROLL
    for (int n = 0; n < N; ++n) grad[0][n] = part[0][n];
    turn<N>(grad);
  }
  if (layer_norm) {
    add_columns_of(norm_sums, grad[0], o[0]);
    add_columns_of(norm_sums + W, grad[0]);
    norm_backward(grad[0], o[0], rstd0[0], norm);
  }
}

// Adds the sums of all warps, in order, to `to`; each warp has `size` of them, one behind the other.
SNE_DEVICE void add_warp_sums(float *to, const float *sums, int size) {
  sync_block();
  for (int i = thread_id(); i < size; i += num_threads()) {
    float total = 0;
    for (int warp = 0; warp < num_warps(); ++warp) total += sums[warp * size + i];
    to[i] += total;
  }
}

SNE_DEVICE void clear(float *sums, int size) {
  for (int i = thread_id(); i < size; i += num_threads()) sums[i] = 0;
}

}  // namespace sne
