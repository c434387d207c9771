// Shared by both directions of segment_pool: sizes, loads of logits, and how a row lies over lanes.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/ptx/vectors.h"
#include "cuda/segment_pool/segments.h"

namespace sne {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kPoolThreads = 256, kPoolWarps = kPoolThreads / kWarp;

SNE_HOST_DEVICE int64_t quotient_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
SNE_HOST_DEVICE int power_of_two(int64_t n, int max) {  // the smallest that is at least n, or max
  int p = 1;
  while (p < n && p < max) p *= 2;
  return p;
}

// Number of lanes that hold a row, or some of its columns, with 16 bytes each.
template <class T>
SNE_HOST_DEVICE int lanes_of(int64_t width) {
  return power_of_two(width / kVector<T>, kWarp);
}

SNE_HOST_DEVICE bool pool_fits(const sne_fast_cuda_pool *a) {
  return a->width > 0 && a->width % 16 == 0 && a->width <= INT32_MAX && a->queries > 0 && a->queries <= INT32_MAX &&
         a->sets > 0 && a->rows >= 0 && a->per_block > 0 && a->per_block <= kMaxItems &&
         a->blocks == quotient_up(a->rows + a->queries * a->sets, a->per_block) && a->blocks < int64_t(1) << 31;
}
inline Segments segments_of(const sne_fast_cuda_pool *a) { return {a->ptr, a->sets, a->queries, a->per_block}; }

// exp(value - shift). A shift of -inf counts as 0: then all logits that it is the largest of are -inf.
SNE_DEVICE float exp_from(float value, float shift) {
  return exp2_fast((value - (shift == -kInfinity ? 0.0f : shift)) * kLog2e);
}

// Loads the logits of queries first, first + 1, ... of a row, -inf beyond the last query. With `vectors` no query is
// beyond the last and the address is aligned to their size.
template <class T, int n>
SNE_DEVICE void load_logits(float (&out)[n], const T *row, int64_t first, int64_t queries, bool vectors) {
  if (!vectors) {
    SNE_UNROLL
    for (int i = 0; i < n; ++i) out[i] = first + i < queries ? to_real(row[first + i]) : -kInfinity;
  } else if constexpr (n * sizeof(T) == 8) {
    const Words words = load_half_words(row + first);
    SNE_UNROLL
    for (int i = 0; i < n; ++i) out[i] = to_real(value_of<T>(words, i));
  } else {
    SNE_UNROLL
    for (int p = 0; p < n; p += kVector<T>) {
      const Words words = load_words(row + first + p);
      SNE_UNROLL
      for (int i = 0; i < kVector<T>; ++i) out[p + i] = to_real(value_of<T>(words, i));
    }
  }
}

template <int n>
SNE_DEVICE void store_floats(float *at, const float (&values)[n]) {
  SNE_UNROLL
  for (int p = 0; p < n; p += 4) {
    Words words;
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) words.w[i] = bits_of_float(values[p + i]);
    store_words(at + p, words);
  }
}
template <int n>
SNE_DEVICE void load_floats(float (&values)[n], const float *at) {
  SNE_UNROLL
  for (int p = 0; p < n; p += 4) {
    const Words words = load_words(at + p);
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) values[p + i] = float_of_bits(words.w[i]);
  }
}

}  // namespace sne
