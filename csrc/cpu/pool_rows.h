// Rows and logits of segment_pool: real numbers, or bfloat16 with float sums.
#pragma once

#include "cpu/row_operands.h"

namespace sne::SNE_ISA {

// Numbers of rows (n, A) in vectors from the first row on repeat after a cycle (A, kLanes): kLanes rows. Returns how
// many of a cycle n rows reach.
template <class T>
SNE_INLINE long cycle_length(long n, long A) {
  return min_of(kLanes<T>, n) * A;
}
// Calls body(place in the rows, place in the cycle) for every vector of n rows.
template <class T, class Body>
SNE_INLINE void for_cycle(long n, long A, Body body) {
  constexpr long W = kLanes<T>;
  for (long j = 0; j < n * A; j += A * W)
    for (long i = 0; i < A * W && j + i < n * A; i += W) body(j + i, i);
}
// Repeats the numbers of each query (A) up to `count`.
template <class T>
void fill_cycle(const T *of_query, long A, long count, T *cycle) {
  for (long i = 0, a = 0; i < count; ++i, a = a + 1 < A ? a + 1 : 0) cycle[i] = of_query[a];
}
// Adds up the numbers of each query.
template <class T>
void fold_cycle(const T *cycle, long A, long count, T *of_query) {
  for (long a = 0; a < A; ++a) of_query[a] = 0;
  for (long i = 0, a = 0; i < count; ++i, a = a + 1 < A ? a + 1 : 0) of_query[a] += cycle[i];
}

template <class T>
struct RealNumbers {
  using Real = T;
  using Entry = T;
  using Number = T;
  static constexpr long kNumbers = 1;

  static SNE_INLINE T number(T x) { return x; }
  // Loads and stores a vector of numbers, of the last only those that are `left`.
  static SNE_INLINE Vec<T> load_numbers(const T *from, long left) {
    return left >= kLanes<T> ? load(from) : load_part(from, left);
  }
  static SNE_INLINE void store_numbers(T *to, long left, Vec<T> v) {
    if (left >= kLanes<T>)
      store(to, v);
    else
      store_part(to, left, v);
  }
  static SNE_INLINE T *row_of(void *rows, long row, long h) { return (T *)rows + row * h; }
  static SNE_INLINE const T *row_of(const void *rows, long row, long h) { return (const T *)rows + row * h; }
  // Returns where a result (rows, h) is computed: its own place, or `space`, from which write_result takes it.
  static SNE_INLINE T *place_of_result(void *result, long row, long h, T *) { return row_of(result, row, h); }
  static SNE_INLINE void write_result(const T *, long, void *, long, long) {}
  // Returns `count` numbers as reals: themselves, or in `space`.
  static SNE_INLINE const T *reals(const T *from, long, T *) { return from; }

  static long space_of_sum(long, long, long) { return 0; }
  // acc (A, h) = sums of n rows with weights w (n, A), or is added to. The weights are followed by zeros to whole
  // vectors.
  static void weighted_sum(long A, const T *w, const T *x, long row, long n, long h, T *acc, unsigned flags, T *) {
    product_wide<T, 1, 0>(A, w, 0, A, x + row * h, h, n, acc, h, h, nullptr, flags);
  }
  // to (A, kLanes) = the products of `queries` (A, h) with n rows, which go through `lanes` (h, kLanes).
  static void products_with_rows(long A, const T *queries, const T *rows, long n, long h, T *lanes, T *to) {
    constexpr long W = kLanes<T>;
    to_lanes(rows, h, n, h, lanes, W);
    product<T, 1, 0, 1>(A, queries, h, 0, lanes, W, h, to, W);
  }
};

#if defined(SNE_BF16)

struct RoundedNumbers {
  using Real = float;
  using Entry = Pair;
  using Number = uint16_t;
  static constexpr long kNumbers = 2;

  static SNE_INLINE float number(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
  }
  static SNE_INLINE Vec<float> load_numbers(const uint16_t *from, long left) {
    if (left >= kLanes<float>) return load_rounded((const Pair *)from);
    const __m256i numbers = _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), from);
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
  }
  static SNE_INLINE void store_numbers(uint16_t *to, long left, Vec<float> v) {
    const __mmask16 some = left >= kLanes<float> ? 0xffff : __mmask16((1u << left) - 1);
    _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }
  static SNE_INLINE Pair *row_of(void *rows, long row, long h) { return (Pair *)rows + row * (h / 2); }
  static SNE_INLINE const Pair *row_of(const void *rows, long row, long h) {
    return (const Pair *)rows + row * (h / 2);
  }
  static SNE_INLINE float *place_of_result(void *, long, long, float *space) { return space; }
  static SNE_INLINE void write_result(const float *from, long numbers, void *result, long row, long h) {
    round_rows(from, numbers, row_of(result, row, h));
  }
  static SNE_INLINE const float *reals(const Pair *from, long count, float *space) {
    for (long i = 0; i < count; i += kLanes<float>) store(space + i, load_rounded(from + i / 2));
    return space;
  }

  static long space_of_sum(long n, long A, long h) { return n / 2 * h + n / 2 * A + (n * A + 31) / 32 * 16 + 16; }
  static void weighted_sum(long A, const float *w, const Pair *x, long row, long n, long h, float *acc, unsigned flags,
                           Pair *space) {
    constexpr long W = kLanes<float>;
    const long words = (n + 1) / 2;
    Pair *const weights = space + words * h, *const rounded = weights + words * A;
    for (long i = 0; i < n * A; i += W) store_rounded(rounded + i / 2, load(w + i));
    if (n % 2) memset((uint16_t *)rounded + n * A, 0, size_t(A) * 2);
    const uint16_t *low = (const uint16_t *)rounded, *high = low + A;
    for (long j = 0; j < words; ++j, low += 2 * A, high += 2 * A)
      for (long a = 0; a < A; ++a) weights[j * A + a] = Pair(uint32_t(low[a]) | uint32_t(high[a]) << 16);
    const Pair *rows = PairRows::for_sums(x + row * (h / 2), h, n, space);
    for (long f = 0; f < h; f += 2 * W)
      if (flags & kAccumulate)
        pair_product<2, 1, 0, true>(A, weights, 0, A, rows + f, h, words, acc + f, h);
      else
        pair_product<2, 1, 0>(A, weights, 0, A, rows + f, h, words, acc + f, h);
  }
  static void products_with_rows(long A, const Pair *queries, const Pair *rows, long n, long h, Pair *lanes,
                                 float *to) {
    constexpr long W = kLanes<float>;
    PairRows::onto_lanes(rows, h / 2, n, lanes, W);
    pair_product<1, 0, 1>(A, queries, h / 2, 0, lanes, W, h / 2, to, W);
  }
};

#endif

}  // namespace sne::SNE_ISA
