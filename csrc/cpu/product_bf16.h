// Products of bfloat16 operands with float sums: C (M x NV vectors) = A (M x K) B (K x NV vectors).
//
// Both operands are words of two numbers, neighbours along K, the first in the low half. So a matrix (F, S) of
// activations, features by slots, is kept in up to two layouts: `features` (F/2, S) pairs neighbouring features of a
// slot, for products over features, `slots` (F, S/2) pairs neighbouring slots of a feature, for products over slots.
// Operands are rounded to nearest, ties to even; vdpbf16ps takes denormal numbers for zero.
#pragma once

#include <string.h>

#include "cpu/product.h"
#include "sne_fast/amx.h"
#if defined(SNE_BF16)

namespace sne::SNE_ISA {

using Pair = int32_t;
using Pairs = Mask<float>;  // a vector of words

constexpr long kWidePanel = kPanel<float>;      // lanes of a panel
constexpr long kPairPanel = kPanel<float> / 2;  // words of a panel whose slots are paired

SNE_INLINE Pairs load_pairs(const Pair *p) { return load_int<float>(p); }
SNE_INLINE void store_pairs(Pair *p, Pairs v) { *reinterpret_cast<VecOf<float>::unaligned_mask *>(p) = v; }
SNE_INLINE Pairs splat_pairs(Pair p) { return (Pairs)_mm512_set1_epi32(p); }

// Returns sum + the products of both halves of a and b.
SNE_INLINE Vec<float> dot_pairs(Vec<float> sum, Pairs a, Pairs b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}

// Rounds two vectors to the numbers of a, then those of b.
SNE_INLINE Pairs round_to_halves(Vec<float> a, Vec<float> b) {
  return (Pairs)(__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
// Rounds two vectors to words: lane l holds those of a and b.
SNE_INLINE Pairs round_to_words(Vec<float> a, Vec<float> b) {
  const __m512i order =
      _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
                       0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return (Pairs)_mm512_permutexvar_epi16(order, (__m512i)round_to_halves(a, b));
}
// Rounds one vector, and stores its 16 numbers in 8 words.
SNE_INLINE void store_rounded(Pair *to, Vec<float> v) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
// Returns the 16 numbers in 8 words.
SNE_INLINE Vec<float> load_rounded(const Pair *from) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
// Rounds a number as the instructions above do, except that denormal numbers stay.
SNE_INLINE uint32_t rounded_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
SNE_INLINE Pair pair_of(float low, float high) { return Pair(rounded_bits(low) | rounded_bits(high) << 16); }

// Returns 2^x for x <= 0 with a relative error of 1e-4, a twentieth of what rounding to bfloat16 leaves; else as vexp2.
SNE_INLINE Vec<float> vexp2_to_round(Vec<float> x) {
  const Vec<float> n = nearest_integer(x), f = x - n;
  Vec<float> p = splat(5.500869e-2f);
  p = p * f + 2.4221063e-1f;
  p = p * f + 6.9328292e-1f;
  p = p * f + 1.0f;
  return scale_by_integer(p, n, x);
}

// Where a product over one panel writes its M rows; null is not written.
struct PanelResult {
  float *real;     // (M, P)
  Pair *features;  // (M/2, P)
  Pair *slots;     // (M, P/2)
};

// Writes MR rows from row m on, an even number of both, to all that is asked for.
template <int MR, int NV>
SNE_INLINE void write_rows(const PanelResult &to, long m, const Vec<float> (&sum)[MR][NV]) {
  constexpr int W = kLanes<float>;
  static_assert(MR % 2 == 0 && NV % 2 == 0, "pairs");
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (to.real) store(to.real + (m + r) * kWidePanel + v * W, sum[r][v]);
      if (to.features && r % 2 == 0)
        store_pairs(to.features + (m + r) / 2 * kWidePanel + v * W, round_to_words(sum[r][v], sum[r + 1][v]));
      if (to.slots && v % 2 == 0)
        store_pairs(to.slots + (m + r) * kPairPanel + v / 2 * W, round_to_halves(sum[r][v], sum[r][v + 1]));
    }
}

// sum (MR x NV) += A B. RS, CS: strides of A in words, 0 where rs and cs give them.
template <int MR, int NV, int RS, int CS>
SNE_INLINE void add_products(Vec<float> (&sum)[MR][NV], const Pair *a, long rs, long cs, const Pair *b, long ldb,
                             long words) {
  constexpr int W = kLanes<float>;
  const long row = RS ? RS : rs, step = CS ? CS : cs;
  const Pair *rows[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) rows[m] = a + m * row;
  for (long k = 0; k < words; ++k) {
    Pairs col[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) col[v] = load_pairs(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Pairs s = splat_pairs(rows[m][k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = dot_pairs(sum[m][v], s, col[v]);
    }
    b += ldb;
  }
}

// c (MR x NV vectors) = A B, or += where ACCUMULATE.
template <int MR, int NV, int RS, int CS, bool ACCUMULATE>
SNE_INLINE void pair_tile(const Pair *a, long rs, long cs, const Pair *b, long ldb, long words, float *c, long ldc) {
  constexpr int W = kLanes<float>;
  Vec<float> sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = zero<float>();
  add_products<MR, NV, RS, CS>(sum, a, rs, cs, b, ldb, words);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float *to = c + m * ldc + v * W;
      store(to, ACCUMULATE ? load(to) + sum[m][v] : sum[m][v]);
    }
}

// The product for up to two vectors of columns: tiles of eight rows.
template <int NV, int RS, int CS, bool ACCUMULATE = false>
__attribute__((noinline)) void pair_product(long M, const Pair *a, long rs, long cs, const Pair *b, long ldb,
                                            long words, float *c, long ldc) {
  static_assert(NV <= 2, "registers");
  const long row = RS ? RS : rs;
  for (long m = 0; m < M;) {
    const Pair *am = a + m * row;
    float *cm = c + m * ldc;
    const long left = M - m;
#define SNE_ROWS(n)                                                           \
  {                                                                           \
    pair_tile<n, NV, RS, CS, ACCUMULATE>(am, rs, cs, b, ldb, words, cm, ldc); \
    m += n;                                                                   \
  }
    if (left >= 8)
      SNE_ROWS(8)
    else if (left >= 4)
      SNE_ROWS(4)
    else if (left >= 2)
      SNE_ROWS(2)
    else
      SNE_ROWS(1)
#undef SNE_ROWS
  }
}

// ------------------------------------------------------------------------------------ products of whole panels, by AMX
#if defined(SNE_AMX)

// Packs weights (M, K) for packed_product: rows of pairs. Element (m, k) is from[m * rs + k * cs].
inline void pack_pairs(long M, long K, const float *from, long rs, long cs, Pair *to) {
  for (long m = 0; m < M; ++m)
    for (long k = 0; k < K; k += 2) *to++ = pair_of(from[m * rs + k * cs], from[m * rs + (k + 1) * cs]);
}

// c (32, 32) = a (32, words) b (words, 32), or += where `accumulate`: words is a multiple of 16.
SNE_INLINE void amx_square(const Pair *a, long rs, const Pair *b, long ldb, long words, float *c, long ldc,
                           bool accumulate) {
  if (accumulate) {
    SNE_TILE_LOAD(0, c, ldc * 4);
    SNE_TILE_LOAD(1, c + 16, ldc * 4);
    SNE_TILE_LOAD(2, c + 16 * ldc, ldc * 4);
    SNE_TILE_LOAD(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    SNE_TILE_ZERO(0);
    SNE_TILE_ZERO(1);
    SNE_TILE_ZERO(2);
    SNE_TILE_ZERO(3);
  }
  for (long k = 0; k < words; k += 16) {
    SNE_TILE_LOAD(4, a + k, rs * 4);
    SNE_TILE_LOAD(5, a + 16 * rs + k, rs * 4);
    SNE_TILE_LOAD(6, b + k * ldb, ldb * 4);
    SNE_TILE_LOAD(7, b + k * ldb + 16, ldb * 4);
    SNE_TILE_DOT(0, 4, 6);
    SNE_TILE_DOT(1, 4, 7);
    SNE_TILE_DOT(2, 5, 6);
    SNE_TILE_DOT(3, 5, 7);
  }
  SNE_TILE_STORE(0, c, ldc * 4);
  SNE_TILE_STORE(1, c + 16, ldc * 4);
  SNE_TILE_STORE(2, c + 16 * ldc, ldc * 4);
  SNE_TILE_STORE(3, c + 16 * ldc + 16, ldc * 4);
}

// Product for one panel: packed (M, 2 words) b (words, P) (+ bias, relu).
__attribute__((noinline)) inline void packed_product(long M, const Pair *packed, const Pair *b, long words,
                                                     const PanelResult &to, const float *bias = nullptr,
                                                     unsigned flags = kStore) {
  constexpr int W = kLanes<float>, NV = SNE_VECTORS_PER_PANEL;
  alignas(64) float strip[32 * kWidePanel];
  for (long m = 0; m < M; m += 32) {
    for (long n = 0; n < kWidePanel; n += 32)
      amx_square(packed + m * words, words, b + n, kWidePanel, words, strip + n, kWidePanel, false);
    for (int r = 0; r < 32; r += 2) {
      Vec<float> sum[2][NV];
      for (int i = 0; i < 2; ++i)
        for (int v = 0; v < NV; ++v) {
          sum[i][v] = load(strip + (r + i) * kWidePanel + v * W);
          if (bias) sum[i][v] += bias[m + r + i];
          if (flags & kRelu) sum[i][v] = vmax(zero<float>(), sum[i][v]);
          if (flags & kAccumulate) sum[i][v] += load(to.real + (m + r + i) * kWidePanel + v * W);
        }
      write_rows<2, NV>(to, m + r, sum);
    }
  }
}

// dw (M, N) += the products over the slots of one panel: g (M, P/2 words) rows (P/2 words, N).
inline void add_slot_products(long M, long N, const Pair *g, const Pair *rows, float *dw) {
  for (long m = 0; m < M; m += 32)
    for (long n = 0; n < N; n += 32)
      amx_square(g + m * kPairPanel, kPairPanel, rows + n, N, kPairPanel, dw + m * N + n, N, true);
}

// ------------------------------------------------------------------------------ products of whole panels, by vdpbf16ps
#else

// Packs weights (M, K) for packed_product: runs of next_rows() rows, each word-major. Element (m, k) is
// from[m * rs + k * cs].
inline void pack_pairs(long M, long K, const float *from, long rs, long cs, Pair *to) {
  for (long m = 0; m < M;) {
    const int rows = next_rows(M - m);
    for (long k = 0; k < K; k += 2)
      for (int i = 0; i < rows; ++i) *to++ = pair_of(from[(m + i) * rs + k * cs], from[(m + i) * rs + (k + 1) * cs]);
    m += rows;
  }
}

template <int MR>
SNE_INLINE void packed_tile(const Pair *packed, const Pair *b, long words, const PanelResult &to, long m,
                            const float *bias, unsigned flags) {
  constexpr int W = kLanes<float>, NV = SNE_VECTORS_PER_PANEL;
  Vec<float> sum[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const Vec<float> start = bias ? splat(bias[m + r]) : zero<float>();
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = start;
  }
  add_products<MR, NV, 1, MR>(sum, packed, 0, 0, b, kWidePanel, words);
  if (flags & (kRelu | kAccumulate)) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (flags & kRelu) sum[r][v] = vmax(zero<float>(), sum[r][v]);
        if (flags & kAccumulate) sum[r][v] += load(to.real + (m + r) * kWidePanel + v * W);
      }
  }
  write_rows<MR, NV>(to, m, sum);
}

// Product for one panel: packed (M, 2 words) b (words, P) (+ bias, relu, what to.real holds). M is a multiple of 8.
__attribute__((noinline)) inline void packed_product(long M, const Pair *packed, const Pair *b, long words,
                                                     const PanelResult &to, const float *bias = nullptr,
                                                     unsigned flags = kStore) {
  for (long m = 0; m < M;) {
    const int rows = next_rows(M - m);
    const Pair *at = packed + m * words;
    switch (rows) {
      case 6: packed_tile<6>(at, b, words, to, m, bias, flags); break;
      case 4: packed_tile<4>(at, b, words, to, m, bias, flags); break;
      default: packed_tile<2>(at, b, words, to, m, bias, flags); break;
    }
    m += rows;
  }
}

template <int MR, int NV>
SNE_INLINE void slot_products_tile(const Pair *g, const Pair *rows, long N, float *dw) {
  pair_tile<MR, NV, kPairPanel, 1, true>(g, 0, 0, rows, N, kPairPanel, dw, N);
}

// dw (M, N) += the products over the slots of one panel: g (M, P/2 words) rows (P/2 words, N).
__attribute__((noinline)) inline void add_slot_products(long M, long N, const Pair *g, const Pair *rows, float *dw) {
  constexpr int W = kLanes<float>;
  for (long n = 0; n < N;) {
    const int vectors = N - n >= 4 * W ? 4 : 2;
    for (long m = 0; m < M;) {
      const int count = next_rows(M - m);
      const Pair *gm = g + m * kPairPanel;
      float *to = dw + m * N + n;
      if (vectors == 4) {
        switch (count) {
          case 6: slot_products_tile<6, 4>(gm, rows + n, N, to); break;
          case 4: slot_products_tile<4, 4>(gm, rows + n, N, to); break;
          default: slot_products_tile<2, 4>(gm, rows + n, N, to); break;
        }
      } else {
        switch (count) {
          case 6: slot_products_tile<6, 2>(gm, rows + n, N, to); break;
          case 4: slot_products_tile<4, 2>(gm, rows + n, N, to); break;
          default: slot_products_tile<2, 2>(gm, rows + n, N, to); break;
        }
      }
      m += count;
    }
    n += vectors * W;
  }
}

#endif

// ------------------------------------------------------------------------------------------------------------ layouts

// Rounds a panel (F, P) to the layouts that are not null.
SNE_INLINE void round_panel(long F, const float *from, Pair *features, Pair *slots) {
  constexpr int W = kLanes<float>, NV = SNE_VECTORS_PER_PANEL;
  for (long f = 0; f < F; f += 2) {
    Vec<float> row[2][NV];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) row[i][v] = load(from + (f + i) * kWidePanel + v * W);
    write_rows<2, NV>({nullptr, features, slots}, f, row);
  }
}

// rows (P/2 words, F) = the transposed of slots (F, P/2 words).
inline void slot_rows(long F, const Pair *slots, Pair *rows) {
  constexpr int W = kLanes<float>;
  for (long f = 0; f < F; f += W)
    for (long s = 0; s < kPairPanel; s += W)
      transpose_square<float>((const float *)(slots + f * kPairPanel + s), kPairPanel, (float *)(rows + s * F + f), F);
}

}  // namespace sne::SNE_ISA

#endif
