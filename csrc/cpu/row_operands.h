// Rows of sets as operands of the products of attention: real numbers, or pairs of bfloat16 with float sums.
//
// A row has one entry per feature, or one word per pair of features. Onto vector lanes go entries or words alike.
#pragma once

#include "cpu/product_bf16.h"
#include "cpu/set_rows.h"

namespace sne::SNE_ISA {

template <class T>
struct RealRows {
  using Real = T;
  using Entry = T;
  using Result = T;
  static constexpr long kNumbers = 1;  // of an entry

  // Writes rows from..from + count - 1 of h numbers from lanes (h, L), which may be lost.
  static SNE_INLINE void write(T *lanes, long L, long from, long count, long h, T *rows) {
    from_lanes(lanes, L, count, h, rows + from * h, h);
  }

  static SNE_INLINE void onto_lanes(const T *rows, long width, long count, T *lanes, long L) {
    to_lanes(rows, width, count, width, lanes, L);
  }
  // s (n, NV vectors) = the products of `count` entries of n rows with lanes (count, NV vectors).
  template <int NV>
  static SNE_INLINE void scores(const T *rows, long width, long n, long count, const T *lanes, T *s) {
    product<T, NV, 0, 1>(n, rows, width, 0, lanes, NV * kLanes<T>, count, s, NV * kLanes<T>);
  }
  // Returns n rows of h numbers as `sum` reads them. `space` (n rows, and one more) may be written for that.
  static SNE_INLINE const T *for_sums(const T *rows, long, long, T *) { return rows; }
  // to (d, NV vectors) = sums of d numbers of n rows with the weights (n, NV vectors), or is added to. `rows` are those
  // of for_sums from the first of these numbers on. The weights are lost.
  template <int NV>
  static SNE_INLINE void sum(const T *rows, long h, long n, long d, T *weights, T *to, unsigned flags) {
    product<T, NV, 1, 0>(d, rows, 0, h, weights, NV * kLanes<T>, n, to, NV * kLanes<T>, nullptr, flags);
  }
  static SNE_INLINE Vec<T> exponential(Vec<T> x) { return vexp2(x); }
  // Returns the product of `count` entries with as many numbers of x.
  static SNE_INLINE T dot(const T *entries, const T *x, long count) {
    T sum = 0;
    for (long i = 0; i < count; ++i) sum += entries[i] * x[i];
    return sum;
  }
};

#if defined(SNE_BF16)

struct PairRows {
  using Real = float;
  using Entry = Pair;
  using Result = float;
  static constexpr long kNumbers = 2;

  static SNE_INLINE void write(float *lanes, long L, long from, long count, long h, float *rows) {
    RealRows<float>::write(lanes, L, from, count, h, rows);
  }

  static SNE_INLINE void onto_lanes(const Pair *rows, long width, long count, Pair *lanes, long L) {
    to_lanes((const float *)rows, width, count, width, (float *)lanes, L);
  }
  // Calls body(first column, number of vectors) for parts of NV vectors that a product takes at once.
  template <int NV, class Body>
  static SNE_INLINE void in_parts(Body body) {
    if constexpr (NV <= 2) {
      body(0, Constant<NV>{});
    } else {
      static_assert(NV == 4, "parts of two vectors");
      body(0, Constant<2>{});
      body(2 * kLanes<float>, Constant<2>{});
    }
  }
  template <int NV>
  static SNE_INLINE void scores(const Pair *rows, long width, long n, long count, const Pair *lanes, float *s) {
    constexpr long L = NV * kLanes<float>;
    in_parts<NV>([&](long at, auto vectors) {
      pair_product<decltype(vectors)::value, 0, 1>(n, rows, width, 0, lanes + at, L, count, s + at, L);
    });
  }
  // Pairs rows with their neighbours, a word per number; a last row without one, with zeros.
  static SNE_INLINE const Pair *for_sums(const Pair *rows, long h, long n, Pair *space) {
    constexpr int W = kLanes<float>;
    const Pairs none = {};
    for (long j = 0; j < n; j += 2)
      for (long f = 0; f < h / 2; f += W) {
        const Pair *from = rows + j * (h / 2) + f;
        interleave(load_pairs(from), j + 1 < n ? load_pairs(from + h / 2) : none, space + j / 2 * h + 2 * f);
      }
    return space;
  }
  template <int NV>
  static SNE_INLINE void sum(const Pair *rows, long h, long n, long d, float *weights, float *to, unsigned flags) {
    constexpr int W = kLanes<float>;
    constexpr long L = NV * W;
    Pair *const words = (Pair *)weights;  // word row j / 2 lies in front of rows j and j + 1
    for (long j = 0; j < n; j += 2)
      for (int v = 0; v < NV; ++v) {
        const Vec<float> low = load(weights + j * L + v * W);
        const Vec<float> high = j + 1 < n ? load(weights + (j + 1) * L + v * W) : zero<float>();
        store_pairs(words + j / 2 * L + v * W, round_to_words(low, high));
      }
    in_parts<NV>([&](long at, auto vectors) {
      constexpr int N = decltype(vectors)::value;
      if (flags & kAccumulate)
        pair_product<N, 1, 0, true>(d, rows, 0, h, words + at, L, (n + 1) / 2, to + at, L);
      else
        pair_product<N, 1, 0>(d, rows, 0, h, words + at, L, (n + 1) / 2, to + at, L);
    });
  }
  static SNE_INLINE Vec<float> exponential(Vec<float> x) { return vexp2_to_round(x); }
  static SNE_INLINE float dot(const Pair *entries, const float *x, long count) {
    float sum = 0;
    for (long i = 0; i < count; ++i) {
      const uint32_t bits[2] = {uint32_t(entries[i]) << 16, uint32_t(entries[i]) & 0xffff0000u};
      float numbers[2];
      memcpy(numbers, bits, sizeof numbers);
      sum += numbers[0] * x[2 * i] + numbers[1] * x[2 * i + 1];
    }
    return sum;
  }

 private:
  // Writes the words of the halves of a and b: the first of both, the second of both, and so on.
  static SNE_INLINE void interleave(Pairs a, Pairs b, Pair *to) {
    Pairs first, second;
    for (int i = 0; i < 16; ++i) {
      first[i] = (32 + i) << 16 | i;
      second[i] = (48 + i) << 16 | (16 + i);
    }
    store_pairs(to, (Pairs)_mm512_permutex2var_epi16((__m512i)a, (__m512i)first, (__m512i)b));
    store_pairs(to + 16, (Pairs)_mm512_permutex2var_epi16((__m512i)a, (__m512i)second, (__m512i)b));
  }
};

// As PairRows, with results rounded to pairs.
struct RoundedRows : PairRows {
  using Result = Pair;

  static SNE_INLINE void write(float *lanes, long L, long from, long count, long h, Pair *rows) {
    Pair *const words = (Pair *)lanes;  // word row f / 2 lies in front of rows f and f + 1
    for (long f = 0; f < h; f += 2)
      for (long l = 0; l < L; l += kLanes<float>)
        store_pairs(words + f / 2 * L + l, round_to_words(load(lanes + f * L + l), load(lanes + (f + 1) * L + l)));
    from_lanes((const float *)words, L, count, h / 2, (float *)(rows + from * (h / 2)), h / 2);
  }
};

// Rounds rows of so many numbers, a multiple of 32.
inline void round_rows(const float *from, long numbers, Pair *to) {
  constexpr int W = kLanes<float>;
  for (long i = 0; i < numbers; i += 2 * W)
    store_pairs(to + i / 2, round_to_halves(load(from + i), load(from + i + W)));
}

// Rounds `count` rows (count, F) to a panel (P/2 words, F) of rows in pairs, and fills it with zeros.
inline void pair_rows(const float *from, long count, long F, Pair *to) {
  constexpr int W = kLanes<float>;
  for (long r = 0; r < kWidePanel; r += 2)
    for (long f = 0; f < F; f += W) {
      const Vec<float> low = r < count ? load(from + r * F + f) : zero<float>();
      const Vec<float> high = r + 1 < count ? load(from + (r + 1) * F + f) : zero<float>();
      store_pairs(to + r / 2 * F + f, round_to_words(low, high));
    }
}

#endif

}  // namespace sne::SNE_ISA
