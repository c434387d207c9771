// Attention of 16 own rows of a head to inner rows in shared memory, 16 * groups of them at a time, and its gradients.
//
// Rows that are not seen are told by a mask, a function of a place in the tiles of logits: tile n and number i of a
// lane.
#pragma once

#include "cuda/tiles/inner_rows.h"

namespace sne {

// lse in base 2, as what logits are shifted by: 0 where a row saw nothing, so that exp2(-inf - 0) = 0.
SNE_DEVICE float base2_shift(float lse) { return lse == -INFINITY ? 0.0f : lse * kLog2e; }

// The mask of inner rows that all own rows see.
struct AllSeen {
  SNE_MEMBER bool operator()(int, int) const { return true; }
};
// The mask that only the first `left` inner rows exist.
template <class Op>
struct FirstSeen {
  int left;
  SNE_MEMBER bool operator()(int n, int i) const { return 8 * n + inner_row<Op>(i % 2) < left; }
};

// Running softmax of rows g and g + 8, in base 2. The largest logit is subtracted before scaling: a compiler contracts
// `logit * scale - top` to one rounding while `top` was rounded before, which is far off where logits are large.
template <int D>
struct Softmax {
  float top[2];  // largest logit so far, before scaling; -inf before the first
  float sum[2];  // sum of weights exp2((logit - top) scale) over this lane's columns
  Tile out[D / 8];

  SNE_MEMBER float shift(int half) const { return top[half] == -INFINITY ? 0.0f : top[half]; }
};

// Adds 16 * groups keys to the running softmax.
template <class Op, int D, int kStride, int groups, class Seen>
SNE_DEVICE void attend(Softmax<D> &s, Own<Op, D> &q, const typename Op::Storage *keys,
                       const typename Op::Storage *values, const Seen &seen, float scale) {
  if constexpr (D == 64) q.keep();
  Tile p[2 * groups] = {};
  SNE_UNROLL
  for (int i = 0; i < groups; ++i) multiply_transposed<Op, D, kStride>(p + 2 * i, q.a, keys + 16 * i * kStride);
  SNE_UNROLL
  for (int n = 0; n < 2 * groups; ++n) {
    SNE_UNROLL
    for (int i = 0; i < 4; ++i)
      if (!seen(n, i)) p[n].c[i] = -INFINITY;
  }

  float higher[2];
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float highest = max_of(p[0].c[2 * half], p[0].c[2 * half + 1]);
    SNE_UNROLL
    for (int n = 1; n < 2 * groups; ++n) highest = max_of(highest, max_of(p[n].c[2 * half], p[n].c[2 * half + 1]));
    higher[half] = max_of(s.top[half], max_over_quad(highest));
  }
  if (ballot(higher[0] > s.top[0] || higher[1] > s.top[1])) {
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float before = s.top[half];
      s.top[half] = higher[half];
      const float decay = exp2_fast((before - s.shift(half)) * scale);
      s.sum[half] *= decay;
      SNE_UNROLL
      for (int n = 0; n < D / 8; ++n) s.out[n].c[2 * half] *= decay, s.out[n].c[2 * half + 1] *= decay;
    }
  }
  const float shift[2] = {s.shift(0), s.shift(1)};
  SNE_UNROLL
  for (int n = 0; n < 2 * groups; ++n) {
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      p[n].c[i] = exp2_fast((p[n].c[i] - shift[i / 2]) * scale);
      s.sum[i / 2] += p[n].c[i];
    }
  }
  SNE_UNROLL
  for (int i = 0; i < groups; ++i)
    multiply_rows<Op, D, kStride>(s.out, rows16<Op>(p[2 * i], p[2 * i + 1]), values + 16 * i * kStride);
}

// ------------------------------------------------------------------------------------------------------- gradients

// Adds the products of own rows a and b with 16 * groups inner rows each: logits, and the gradients of their weights.
template <class Op, int D, int kStride, int groups>
SNE_DEVICE void add_both_products(Tile *p, Own<Op, D> &a, const typename Op::Storage *rows_of_a, Tile *dp,
                                  Own<Op, D> &b, const typename Op::Storage *rows_of_b) {
  if constexpr (D == 64) a.keep();
  if constexpr (D == 64) b.keep();
  SNE_UNROLL
  for (int i = 0; i < groups; ++i) {
    multiply_transposed<Op, D, kStride>(p + 2 * i, a.a, rows_of_a + 16 * i * kStride);
    multiply_transposed<Op, D, kStride>(dp + 2 * i, b.a, rows_of_b + 16 * i * kStride);
  }
}

// Gradient of queries. With the weights p_j of keys and their gradients dp_j, dq = sum_j p_j (dp_j - mean) k_j /
// sqrt(h) and mean = sum_j p_j dp_j. <grad, out> equals that mean except for the rounding of operands and of out, which
// may be larger than the difference. So one pass over the keys sums with <grad, out> as a guess of the mean, and
// besides sums what the guess lacks, sum_j p_j (dp_j - <grad, out>), and the factor of that, sum_j p_j k_j. float32
// needs no such correction.
template <class Op>
constexpr bool kCorrected = !std::is_same_v<Op, OpFloat>;

// Its sums over keys, for rows g and g + 8.
template <class Op, int D>
struct QueryGradSums {
  float guess[2];  // of the mean
  float lse[2];    // in base 2; logits are shifted by it
  float lack[2];   // sum of p (dp - guess) over this lane's columns
  Tile grad[D / 8];
  Tile key[kCorrected<Op> ? D / 8 : 1];
};

template <class Op, int D, int kStride, int groups, class Seen>
SNE_DEVICE void add_keys(QueryGradSums<Op, D> &s, Own<Op, D> &q, Own<Op, D> &grad, const typename Op::Storage *keys,
                         const typename Op::Storage *values, const Seen &seen, float scale) {
  Tile p[2 * groups] = {}, dp[2 * groups] = {};
  add_both_products<Op, D, kStride, groups>(p, q, keys, dp, grad, values);
  SNE_UNROLL
  for (int n = 0; n < 2 * groups; ++n) {
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float weight = exp2_fast(p[n].c[i] * scale - s.lse[i / 2]);
      p[n].c[i] = seen(n, i) ? weight : 0.0f;
      dp[n].c[i] = p[n].c[i] * (dp[n].c[i] - s.guess[i / 2]);
      if constexpr (kCorrected<Op>) s.lack[i / 2] += dp[n].c[i];
    }
  }
  SNE_UNROLL
  for (int i = 0; i < groups; ++i) {
    const typename Op::Storage *rows = keys + 16 * i * kStride;
    multiply_rows<Op, D, kStride>(s.grad, rows16<Op>(dp[2 * i], dp[2 * i + 1]), rows);
    if constexpr (kCorrected<Op>) multiply_rows<Op, D, kStride>(s.key, rows16<Op>(p[2 * i], p[2 * i + 1]), rows);
  }
}

// Numbers of a query: lse in base 2, by which logits are shifted, and the mean of its weights' gradients.
struct QueryNumbers {
  float lse, mean;
};

// Adds to the gradients of own keys and values what 16 * groups queries and the gradients of their results bring.
template <class Op, int D, int kStride, int groups, class Seen>
SNE_DEVICE void add_queries(Tile *grad_k, Tile *grad_v, Own<Op, D> &k, Own<Op, D> &v,
                            const typename Op::Storage *queries, const typename Op::Storage *grads,
                            const QueryNumbers *numbers, const Seen &seen, float scale) {
  Tile p[2 * groups] = {}, dp[2 * groups] = {};
  add_both_products<Op, D, kStride, groups>(p, k, queries, dp, v, grads);
  SNE_UNROLL
  for (int n = 0; n < 2 * groups; ++n) {
    SNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const QueryNumbers of = numbers[8 * n + inner_row<Op>(i)];
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float &weight = p[n].c[2 * half + i], &change = dp[n].c[2 * half + i];
        const bool sees = seen(n, 2 * half + i);
        weight = sees ? exp2_fast(weight * scale - of.lse) : 0.0f;
        change = sees ? weight * (change - of.mean) : 0.0f;
      }
    }
  }
  SNE_UNROLL
  for (int i = 0; i < groups; ++i) {
    multiply_rows<Op, D, kStride>(grad_v, rows16<Op>(p[2 * i], p[2 * i + 1]), grads + 16 * i * kStride);
    multiply_rows<Op, D, kStride>(grad_k, rows16<Op>(dp[2 * i], dp[2 * i + 1]), queries + 16 * i * kStride);
  }
}

}  // namespace sne
