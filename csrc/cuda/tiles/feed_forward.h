// Rows of a warp in registers, 16 MT rows of width W as tiles o[i][j]: norms, and the feed-forward half of a block.
//
// A Shape has W, MT, NT = W / 8, KT = W / 16, kWarpgroup (products with weights by wgmma) and kOutRows (rows of fc_o
// that are multiplied at a time).
#pragma once

#include "cuda/tiles/weights.h"

namespace sne {

template <int MT, int NT>
SNE_DEVICE void row_means(float (&mean)[MT][2], const Tile (&o)[MT][NT]) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
      SNE_UNROLL
      for (int j = 0; j < NT; ++j) sum += o[i][j].c[2 * r] + o[i][j].c[2 * r + 1];
      mean[i][r] = sum_over_quad(sum) * (1.0f / (8 * NT));
    }
  }
}

// Turns o into (o - mean) / deviation; rstd is 1 / deviation.
template <int MT, int NT>
SNE_DEVICE void normalize(Tile (&o)[MT][NT], float (&rstd)[MT][2]) {
  float mean[MT][2];
  row_means(mean, o);
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
      SNE_UNROLL
      for (int j = 0; j < NT; ++j) {
        SNE_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          o[i][j].c[e] -= mean[i][r];
          sum += o[i][j].c[e] * o[i][j].c[e];
        }
      }
      rstd[i][r] = rsqrt_fast(sum_over_quad(sum) * (1.0f / (8 * NT)) + 1e-5f);
      SNE_UNROLL
      for (int j = 0; j < NT; ++j) o[i][j].c[2 * r] *= rstd[i][r], o[i][j].c[2 * r + 1] *= rstd[i][r];
    }
  }
}

// Turns o into o w + b, both (h,) in shared memory.
template <int MT, int NT>
SNE_DEVICE void scale_and_shift(Tile (&o)[MT][NT], const float *w, const float *b) {
  const int t = lane_id() % 4;
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) {
    const float w0 = w[8 * j + 2 * t], w1 = w[8 * j + 2 * t + 1], b0 = b[8 * j + 2 * t], b1 = b[8 * j + 2 * t + 1];
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) {
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        o[i][j].c[2 * r] = o[i][j].c[2 * r] * w0 + b0;
        o[i][j].c[2 * r + 1] = o[i][j].c[2 * r + 1] * w1 + b1;
      }
    }
  }
}

template <class Op, int MT, int NT>
SNE_DEVICE void to_operands(Rows16<Op> (&x)[MT][NT / 2], const Tile (&o)[MT][NT]) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int k = 0; k < NT / 2; ++k) x[i][k] = rows16<Op>(o[i][2 * k], o[i][2 * k + 1]);
  }
}

// Sets every row of c to the first columns of v.
template <int MT, int N>
SNE_DEVICE void fill_rows(Tile (&c)[MT][N], const float *v) {
  const int t = lane_id() % 4;
  SNE_UNROLL
  for (int n = 0; n < N; ++n) {
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) {
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) c[i][n].c[e] = v[8 * n + 2 * t + e % 2];
    }
  }
}

SNE_DEVICE float relu(float z) { return z <= 0 ? 0.0f : z; }  // NaN stays NaN

// Feed-forward half of a block (docs/method.md 2): turns o into ln1(o' + relu(fc_o(o'))) with o' = ln0(o).
template <class Op, class Shape>
SNE_DEVICE void feed_forward(Tile (&o)[Shape::MT][Shape::NT], const WeightSource<Op> &weights, int64_t offset,
                             const float *out_bias, bool layer_norm) {
  constexpr int MT = Shape::MT, W = Shape::W, N = Shape::kOutRows / 8;
  const float *norm = out_bias + W;
  float rstd[MT][2];
  if (layer_norm) {
    normalize(o, rstd);
    scale_and_shift(o, norm, norm + W);
  }
  Rows16<Op> x[MT][Shape::KT];
  to_operands<Op>(x, o);
  SNE_LOOP
  for (int first = 0; first < W; first += 8 * N) {
    Tile z[MT][N];
    fill_rows(z, out_bias + first);
    multiply<Shape::kWarpgroup>(z, x, weights.piece(offset + first * W, 8 * N * W));
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) {
      SNE_UNROLL
      for (int n = 0; n < N; ++n) {
        SNE_UNROLL
        for (int e = 0; e < 4; ++e) o[i][n].c[e] += relu(z[i][n].c[e]);
      }
    }
    turn<N>(o);
  }
  if (layer_norm) {
    normalize(o, rstd);
    scale_and_shift(o, norm + 2 * W, norm + 3 * W);
  }
}

}  // namespace sne
