// The one matrix product: C (M x NV vectors) = A (M x K) B (K x NV vectors), with the sums in registers.
//
// B and C have their columns on vector lanes. A is read one scalar at a time, so it can have any strides: packed
// weights, a panel of activations read along features or along rows, or row-major input all serve without a copy.
#pragma once

#include "sne_fast/vec.h"

namespace sne::SNE_ISA {

// Lanes of a panel: the columns that a register tile covers.
template <class T>
constexpr int kPanel = kLanes<T> * SNE_VECTORS_PER_PANEL;

enum : unsigned { kStore = 0, kAccumulate = 1, kRelu = 2 };

// Returns the rows of the next register tile: six unless few would remain (8 is 4 + 4, 9 is 5 + 4, not 6 + 3).
SNE_INLINE int next_rows(long left) {
  if (left >= 11 || left == 6 || left == 10) return 6;
  if (left == 9) return 5;
  if (left >= 7) return 4;
  return int(left);
}

// RS, CS: strides of A between rows and along K where they are compile-time constants, 0 where rs and cs give them.
template <class T, int MR, int NV, int RS, int CS>
SNE_INLINE void product_tile(const T *a, long rs, long cs, const T *b, long ldb, long K, T *c, long ldc, const T *bias,
                             unsigned flags) {
  constexpr int W = kLanes<T>;
  const long row = RS ? RS : rs, step = CS ? CS : cs;
  Vec<T> sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const Vec<T> start = bias ? splat(bias[m]) : zero<T>();
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = start;
  }
  const T *rows[MR];  // one pointer per row, so that the loop multiplies no run-time stride
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) rows[m] = a + m * row;
  for (long k = 0; k < K; ++k) {
    Vec<T> col[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) col[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> s = splat(rows[m][k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] += s * col[v];
    }
    b += ldb;
  }
  if (flags & kAccumulate) {  // last: added to a large C one by one, products would be rounded to its last digits
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] += load(c + m * ldc + v * W);
  }
  if (flags & kRelu) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = vmax(zero<T>(), sum[m][v]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + m * ldc + v * W, sum[m][v]);
}

template <class T, int NV, int RS, int CS>
__attribute__((noinline)) void product(long M, const T *a, long rs, long cs, const T *b, long ldb, long K, T *c,
                                       long ldc, const T *bias = nullptr, unsigned flags = kStore) {
  const long row = RS ? RS : rs;
  for (long m = 0; m < M;) {
    const int rows = next_rows(M - m);
    const T *am = a + m * row;
    T *cm = c + m * ldc;
    const T *bm = bias ? bias + m : nullptr;
    switch (rows) {
      case 6: product_tile<T, 6, NV, RS, CS>(am, rs, cs, b, ldb, K, cm, ldc, bm, flags); break;
      case 5: product_tile<T, 5, NV, RS, CS>(am, rs, cs, b, ldb, K, cm, ldc, bm, flags); break;
      case 4: product_tile<T, 4, NV, RS, CS>(am, rs, cs, b, ldb, K, cm, ldc, bm, flags); break;
      case 3: product_tile<T, 3, NV, RS, CS>(am, rs, cs, b, ldb, K, cm, ldc, bm, flags); break;
      case 2: product_tile<T, 2, NV, RS, CS>(am, rs, cs, b, ldb, K, cm, ldc, bm, flags); break;
      default: product_tile<T, 1, NV, RS, CS>(am, rs, cs, b, ldb, K, cm, ldc, bm, flags); break;
    }
    m += rows;
  }
}

// The product for any number of columns N, a multiple of kLanes.
template <class T, int RS, int CS>
SNE_INLINE void product_wide(long M, const T *a, long rs, long cs, const T *b, long ldb, long K, T *c, long ldc, long N,
                             const T *bias = nullptr, unsigned flags = kStore) {
  constexpr int W = kLanes<T>, NV = SNE_VECTORS_PER_PANEL;
  long n = 0;
  for (; n + NV * W <= N; n += NV * W) product<T, NV, RS, CS>(M, a, rs, cs, b + n, ldb, K, c + n, ldc, bias, flags);
  if constexpr (NV > 2)
    for (; n + 2 * W <= N; n += 2 * W) product<T, 2, RS, CS>(M, a, rs, cs, b + n, ldb, K, c + n, ldc, bias, flags);
  for (; n < N; n += W) product<T, 1, RS, CS>(M, a, rs, cs, b + n, ldb, K, c + n, ldc, bias, flags);
}

// Packs weights for packed_product: runs of next_rows() rows, each k-major, so that A is read front to back. Element
// (m, k) is from[m * rs + k * cs].
template <class T>
void pack(long M, long K, const T *from, long rs, long cs, T *to) {
  for (long m = 0; m < M;) {
    const int rows = next_rows(M - m);
    for (long k = 0; k < K; ++k)
      for (int i = 0; i < rows; ++i) *to++ = from[(m + i) * rs + k * cs];
    m += rows;
  }
}

// Product for one panel: c (M x kPanel) = packed (M x K) b (K x kPanel) (+ bias, relu, c), both with stride kPanel.
template <class T>
__attribute__((noinline)) void packed_product(long M, const T *packed, const T *b, long K, T *c,
                                              const T *bias = nullptr, unsigned flags = kStore) {
  constexpr int NV = SNE_VECTORS_PER_PANEL;
  constexpr long P = kPanel<T>;
  for (long m = 0; m < M;) {
    const int rows = next_rows(M - m);
    const T *am = packed + m * K;
    T *cm = c + m * P;
    const T *bm = bias ? bias + m : nullptr;
    switch (rows) {
      case 6: product_tile<T, 6, NV, 1, 6>(am, 0, 0, b, P, K, cm, P, bm, flags); break;
      case 5: product_tile<T, 5, NV, 1, 5>(am, 0, 0, b, P, K, cm, P, bm, flags); break;
      case 4: product_tile<T, 4, NV, 1, 4>(am, 0, 0, b, P, K, cm, P, bm, flags); break;
      case 3: product_tile<T, 3, NV, 1, 3>(am, 0, 0, b, P, K, cm, P, bm, flags); break;
      case 2: product_tile<T, 2, NV, 1, 2>(am, 0, 0, b, P, K, cm, P, bm, flags); break;
      default: product_tile<T, 1, NV, 1, 1>(am, 0, 0, b, P, K, cm, P, bm, flags); break;
    }
    m += rows;
  }
}

}  // namespace sne::SNE_ISA
