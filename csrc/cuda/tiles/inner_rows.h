// Products of 16 own rows of a head, in the registers of a warp, with inner rows in shared memory.
//
// Inner rows stand in shared memory row by row, padded so that both uses read without bank conflicts: as the right
// operand of a product over columns (logits) and of one over rows (weighted sums). 16-bit rows are read by ldmatrix.
// Floats are read one or two at a time, which takes another order of rows to be free of conflicts: column c of a
// 16 x 8 tile of logits belongs to row c ^ (c >> 2), that is, lanes 2 and 3 of a quad hold their two columns swapped.
#pragma once

#include <math.h>

#include "cuda/tiles/fragments.h"

namespace sne {

struct alignas(8) Bytes8 {
  uint32_t word[2];
};
struct alignas(8) Float2 {
  float x, y;
};

// Returns the row, of 8 of the inner tile, that column 2t + i of a tile of logits belongs to.
template <class Op>
SNE_DEVICE int inner_row(int i) {
  const int t = lane_id() % 4;
  return 2 * t + (Op::kPacked ? i : i ^ (t >> 1));
}

// c (16 x 16) += a (16 x D) times the transpose of 16 inner rows, which are kStride values apart.
template <class Op, int D, int kStride>
SNE_DEVICE void multiply_transposed(Tile *c, const Rows16<Op> *a, const typename Op::Storage *rows) {
  const int lane = lane_id();
  if constexpr (Op::kPacked && D == 8) {
    Cols8<Op> b[2];
    uint32_t r[2];
    load_matrices<2>(r, rows + lane % 16 * kStride);
    b[0].r[0] = r[0], b[1].r[0] = r[1];
    b[0].r[1] = b[1].r[1] = 0;
    product_left(c[0], a[0], b[0]);
    product_left(c[1], a[0], b[1]);
  } else if constexpr (Op::kPacked) {
    const typename Op::Storage *at = rows + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
    SNE_UNROLL
    for (int j = 0; j < D / 16; ++j) {
      Cols8<Op> b[2];
      uint32_t r[4];
      load_matrices<4>(r, at + 16 * j);
      b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
      product(c[0], a[j], b[0]);
      product(c[1], a[j], b[1]);
    }
  } else {
    const int g = lane / 4;
    SNE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const float *at = rows + (8 * n + (g ^ g >> 2)) * kStride + lane % 4 * 2;
      SNE_UNROLL
      for (int j = 0; j < (D + 15) / 16; ++j) {
        Cols8<Op> b{};
        SNE_UNROLL
        for (int side = 0; side < (D == 8 ? 1 : 2); ++side) {
          const Float2 pair = *(const Float2 *)(at + 16 * j + 8 * side);
          b.r[2 * side] = operand_value<Op>(pair.x), b.r[2 * side + 1] = operand_value<Op>(pair.y);
        }
        if constexpr (D == 8)
          product_left(c[n], a[j], b);
        else
          product(c[n], a[j], b);
      }
    }
  }
}

// c (16 x D) += a (16 x 16), from tiles of logits, times 16 inner rows.
template <class Op, int D, int kStride>
SNE_DEVICE void multiply_rows(Tile *c, const Rows16<Op> &a, const typename Op::Storage *rows) {
  const int lane = lane_id();
  if constexpr (Op::kPacked && D == 8) {
    Cols8<Op> b;
    load_matrices_transposed<2>(b.r, rows + lane % 16 * kStride);
    product(c[0], a, b);
  } else if constexpr (Op::kPacked) {
    SNE_UNROLL
    for (int j = 0; j < D / 16; ++j) {
      Cols8<Op> b[2];
      uint32_t r[4];
      load_matrices_transposed<4>(r, rows + lane % 16 * kStride + lane / 16 * 8 + 16 * j);
      b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
      product(c[2 * j], a, b[0]);
      product(c[2 * j + 1], a, b[1]);
    }
  } else {
    const float *even = rows + inner_row<Op>(0) * kStride + lane / 4;
    const float *odd = rows + inner_row<Op>(1) * kStride + lane / 4;
    SNE_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      Cols8<Op> b;
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) {
        b.r[2 * half] = operand_value<Op>(even[8 * half * kStride + 8 * n]);
        b.r[2 * half + 1] = operand_value<Op>(odd[8 * half * kStride + 8 * n]);
      }
      product(c[n], a, b);
    }
  }
}

// Keeps the compiler from computing the TF32 parts of floats before a loop or for several products at once, which would
// take more registers than there are.
template <class Op>
SNE_DEVICE void keep_whole(Rows16<Op> &a) {
#if !defined(SNE_EMULATED)
  if constexpr (std::is_same_v<Op, OpFloat>) {
    SNE_UNROLL
    for (int i = 0; i < 8; ++i) asm volatile("" : "+f"(a.r[i]));
  }
#else
  (void)a;
#endif
}

// 16 own rows of a head as left operand. Rows from `count` (at least 1) on repeat the last one.
template <class Op, int D>
struct Own {
  static constexpr int kSteps = (D + 15) / 16;
  Rows16<Op> a[kSteps];

  SNE_MEMBER void keep() {
    SNE_UNROLL
    for (int j = 0; j < kSteps; ++j) keep_whole(a[j]);
  }

  SNE_MEMBER void load(const typename Op::Storage *from, int64_t width, int count) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = g + 8 * half;
      const typename Op::Storage *at = from + (row < count ? row : count - 1) * width;
      SNE_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        if constexpr (!Op::kPacked) {
          SNE_UNROLL
          for (int side = 0; side < 2; ++side) {
            Float2 pair{};
            if (D > 8 || !side) pair = *(const Float2 *)(at + 16 * j + 8 * side + 2 * t);
            a[j].r[4 * side + 2 * half] = operand_value<Op>(pair.x);
            a[j].r[4 * side + 2 * half + 1] = operand_value<Op>(pair.y);
          }
        } else if constexpr (D == 8) {
          a[j].r[half] = *(const uint32_t *)(at + 2 * t);
          a[j].r[2 + half] = 0;
        } else {
          // 8 bytes a lane: even lanes of the left 8 columns, odd ones of the right 8; then neighbours swap halves.
          const Bytes8 mine = *(const Bytes8 *)(at + 16 * j + t % 2 * 8 + t / 2 * 4);
          const uint32_t other = shuffle_xor(t % 2 ? mine.word[0] : mine.word[1], 1);
          a[j].r[half] = t % 2 ? other : mine.word[0];
          a[j].r[2 + half] = t % 2 ? mine.word[1] : other;
        }
      }
    }
  }
};

// Sums over the columns of the products of two matrices' values, for rows g and g + 8.
template <class Op, int D>
SNE_DEVICE void row_products(float (&out)[2], const Own<Op, D> &x, const Own<Op, D> &y) {
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    SNE_UNROLL
    for (int j = 0; j < Own<Op, D>::kSteps; ++j) {
      SNE_UNROLL
      for (int side = 0; side < 2; ++side) {
        if constexpr (Op::kPacked) {
          using T = typename Op::Storage;
          const uint32_t p = x.a[j].r[2 * side + half], q = y.a[j].r[2 * side + half];
          sum += to_real(T{uint16_t(p)}) * to_real(T{uint16_t(q)});
          sum += to_real(T{uint16_t(p >> 16)}) * to_real(T{uint16_t(q >> 16)});
        } else {
          SNE_UNROLL
          for (int i = 0; i < 2; ++i) sum += x.a[j].r[4 * side + 2 * half + i] * y.a[j].r[4 * side + 2 * half + i];
        }
      }
    }
    out[half] = sum_over_quad(sum);
  }
}

// The first `count` of 16 rows of a head, rows g and g + 8 times factor[0] and factor[1].
template <class T, int tiles>
SNE_DEVICE void store_rows(T *to, int64_t width, int64_t count, const Tile (&c)[tiles], float low, float high) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? high : low;
    const bool inside = g + 8 * half < count;
    T *at = to + (g + 8 * half) * width;
    if constexpr (sizeof(T) == 4) {
      SNE_UNROLL
      for (int n = 0; n < tiles; ++n)
        if (inside) *(Float2 *)(at + 8 * n + 2 * t) = {c[n].c[2 * half] * factor, c[n].c[2 * half + 1] * factor};
    } else {
      uint32_t pair[tiles];
      SNE_UNROLL
      for (int n = 0; n < tiles; ++n) pair[n] = pack2<T>(c[n].c[2 * half] * factor, c[n].c[2 * half + 1] * factor);
      if constexpr (tiles == 1) {
        if (inside) *(uint32_t *)(at + 2 * t) = pair[0];
      } else {
        SNE_UNROLL
        for (int n = 0; n < tiles; n += 2) {  // as Own::load, the other way
          const uint32_t other = shuffle_xor(t % 2 ? pair[n] : pair[n + 1], 1);
          const Bytes8 mine = t % 2 ? Bytes8{{other, pair[n + 1]}} : Bytes8{{pair[n], other}};
          if (inside) *(Bytes8 *)(at + 8 * n + t % 2 * 8 + t / 2 * 4) = mine;
        }
      }
    }
  }
}

}  // namespace sne
