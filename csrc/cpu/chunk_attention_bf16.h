// Attention among the rows of each chunk of a tile, as in chunk_attention.h, with products of bfloat16 pairs. Softmax
// and sums are float; the weights of the softmax are rounded, unnormalised, where they become operands.
#pragma once

#include "cpu/chunk_tile.h"
#include "cpu/product_bf16.h"

namespace sne::SNE_ISA {

// Returns the address of slot s in a buffer (F/2, R) of paired features, and in one (F, R/2) of paired slots.
SNE_INLINE Pair *at_features(Pair *buffer, long F, long s) {
  return buffer + s / kWidePanel * (F / 2) * kWidePanel + s % kWidePanel;
}
SNE_INLINE Pair *at_slots(Pair *buffer, long F, long s) {
  return buffer + s / kWidePanel * F * kPairPanel + s % kWidePanel / 2;
}

// Queries, keys and values of a block. Those that only the backward reads are null in inference.
struct HeadOperands {
  Pair *q, *k, *v;                    // (h/2, R)
  Pair *q_slots, *k_slots, *v_slots;  // (h, R/2)
};

// Scratch of the attention of one group of queries.
struct GroupScratch {
  float *logits;  // (R, 2 vectors)
  Pair *weights;  // (R/2, 2 vectors)
  void take(Scratch &scratch, long R) {
    logits = scratch.take<float>(R * 2 * kLanes<float>);
    weights = scratch.take<Pair>(R * kLanes<float>);
  }
};

// Calls body(j, low, high) for the pairs of rows j, j + 1 that hold rows lo..hi-1; low and high say whether row j and
// row j + 1 are among these.
template <class Body>
SNE_INLINE void for_each_pair(long lo, long hi, Body body) {
  long j = lo;
  if (j % 2 && j < hi) body(j++ - 1, Constant<0>{}, Constant<1>{});
  for (; j + 2 <= hi; j += 2) body(j, Constant<1>{}, Constant<1>{});
  if (j < hi) body(j, Constant<1>{}, Constant<0>{});
}

// Zeroes what rows lo..hi-1 leave of whole vectors of rows of e, in NV vectors of columns: the backward reads those.
template <int NV>
SNE_INLINE void zero_around(long lo, long hi, Pair *e, long lde) {
  constexpr int W = kLanes<float>;
  for (long j = lo / W * W; j < lo; ++j) memset(e + j * lde, 0, NV * W * 2);
  for (long j = hi; j < (hi + W - 1) / W * W; ++j) memset(e + j * lde, 0, NV * W * 2);
}
// Rounds NV vectors to a row of e.
template <int NV>
SNE_INLINE void store_row(Pair *e, const Vec<float> *row) {
  if constexpr (NV == 2)
    store_pairs(e, round_to_halves(row[0], row[1]));
  else
    store_rounded(e, row[0]);
}

// One head: writes q + softmax(q k^T / sqrt(h)) v to o (h, R). q_real (h, R) are the unrounded queries. Where e (R,
// R/2) is not null, row j holds exp(logit_ij - largest) of the queries i; inv (R) is 1 / their sums.
inline void attention_head_bf16(const Tile<float> &tile, long h, long d, long head, const HeadOperands &operands,
                                const float *q_real, float *o, Pair *e, float *inv, const GroupScratch &scratch) {
  constexpr int W = kLanes<float>, P = int(kWidePanel);
  const float scale = kLog2e<float> / float(__builtin_sqrt(double(h)));
  const long lde = tile.slots / 2;
  for (int i = 0; i < tile.num_groups; ++i) {
    const RowGroup &group = tile.groups[i];
    const float *q = at(q_real, h, group.slot) + head * d * P;
    float *ob = at(o, h, group.slot) + head * d * P;
    auto run = [&](auto vectors, auto masked) {
      constexpr int NV = decltype(vectors)::value;
      constexpr long L = NV * W;
      const long lo = group.lo, hi = group.hi, even_lo = lo / 2 * 2, even_hi = (hi + 1) / 2 * 2;
      float *logits = scratch.logits - even_lo * L;  // row j at j * L
      Pair *weights = scratch.weights - even_lo / 2 * L;
      for_each_panel<float>(lo, hi, [&](long j0, long j1) {
        pair_product<NV, 1, P>(j1 - j0, at_features(operands.k, h, j0) + head * d / 2 * P, 0, 0,
                               at_features(operands.q, h, group.slot) + head * d / 2 * P, P, d / 2, logits + j0 * L, L);
      });
      Vec<float> top[NV], sum[NV];
      Pairs own[NV];
      for (int v = 0; v < NV; ++v) {
        top[v] = splat(kLowest<float>);
        sum[v] = zero<float>();
        own[v] = load_pairs(tile.chunk_of + group.slot + v * W);
      }
      for (long j = lo; j < hi; ++j)
        for (int v = 0; v < NV; ++v) {
          Vec<float> s = load(logits + j * L + v * W);
          if constexpr (decltype(masked)::value) s = own[v] == tile.chunk_of[j] ? s : splat(kLowest<float>);
          top[v] = vmax(top[v], s);
        }
      for_each_pair(lo, hi, [&](long j, auto low, auto high) {
        Vec<float> pair[2][NV];
        const bool seen[2] = {decltype(low)::value != 0, decltype(high)::value != 0};
        for (int r = 0; r < 2; ++r) {
          for (int v = 0; v < NV; ++v) {
            pair[r][v] = zero<float>();
            if (!seen[r]) continue;
            pair[r][v] = vexp2_to_round((load(logits + (j + r) * L + v * W) - top[v]) * scale);
            if constexpr (decltype(masked)::value) pair[r][v] = keep<float>(own[v] == tile.chunk_of[j + r], pair[r][v]);
            sum[v] += pair[r][v];
          }
          if (e && seen[r]) store_row<NV>(e + (j + r) * lde + group.slot / 2, pair[r]);
        }
        for (int v = 0; v < NV; ++v) store_pairs(weights + j / 2 * L + v * W, round_to_words(pair[0][v], pair[1][v]));
      });
      if (e) zero_around<NV>(lo, hi, e + group.slot / 2, lde);
      bool first = true;
      for_each_panel<float>(even_lo, even_hi, [&](long j0, long j1) {
        const Pair *v = at_slots(operands.v_slots, h, j0) + head * d * kPairPanel, *w = weights + j0 / 2 * L;
        const long words = (j1 - j0) / 2;
        if (first)
          pair_product<NV, kPairPanel, 1>(d, v, 0, 0, w, L, words, ob, P);
        else
          pair_product<NV, kPairPanel, 1, true>(d, v, 0, 0, w, L, words, ob, P);
        first = false;
      });
      for (int v = 0; v < NV; ++v) {
        sum[v] = keep<float>(own[v] >= 0, 1.0f / sum[v]);
        store(inv + group.slot + v * W, sum[v]);
        for (long f = 0; f < d; ++f) {
          const Vec<float> qv = load(q + f * P + v * W);  // padding attends to nothing
          store(ob + f * P + v * W, first ? qv : load(ob + f * P + v * W) * sum[v] + qv);
        }
      }
    };
    if (group.vectors == 2)
      run(Constant<2>{}, Constant<0>{});
    else if (group.masked)
      run(Constant<1>{}, Constant<1>{});
    else
      run(Constant<1>{}, Constant<0>{});
  }
}

// Scratch of attention_head_backward_bf16.
struct HeadBackScratch {
  GroupScratch group;
  Pair *z;         // (R, R/2) gradients of logits
  Pair *g_scaled;  // (64, R/2) the head's rows of g / sums, slots paired
  Pair *et, *zt;   // (R/2, 2 vectors) e and z with keys on lanes
  void take(Scratch &scratch, long R) {
    constexpr long W = kLanes<float>;
    group.take(scratch, R);
    z = scratch.take<Pair>(R * R / 2);
    g_scaled = scratch.take<Pair>(64 * R / 2);
    et = scratch.take<Pair>(R * W + 2 * W * W);
    zt = scratch.take<Pair>(R * W + 2 * W * W);
  }
};

// Backward of one head: from g (h, R), the gradient of o, to gqkv (3h, R), that of qkv. g_features is g with its
// features paired; e and inv are those of the forward.
inline void attention_head_backward_bf16(const Tile<float> &tile, long h, long d, long head,
                                         const HeadOperands &operands, const Pair *e, const float *inv, const float *g,
                                         Pair *g_features, float *gqkv, const HeadBackScratch &scratch) {
  constexpr int W = kLanes<float>, P = int(kWidePanel), NVP = SNE_VECTORS_PER_PANEL;
  const float scale = 1.0f / float(__builtin_sqrt(double(h)));
  const long lde = tile.slots / 2;
  for (long p = 0; p < tile.panels; ++p)
    for (long f = 0; f < d; ++f) {
      const float *from = g + (p * h + head * d + f) * P;
      for (int v = 0; v < NVP; v += 2) {
        const float *iv = inv + p * P + v * W;
        store_pairs(scratch.g_scaled + (p * d + f) * kPairPanel + v / 2 * W,
                    round_to_halves(load(from + v * W) * load(iv), load(from + (v + 1) * W) * load(iv + W)));
      }
    }
  // With queries on lanes: the gradients of logits, and dq.
  for (int i = 0; i < tile.num_groups; ++i) {
    const RowGroup &group = tile.groups[i];
    auto run = [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      constexpr long L = NV * W;
      const long lo = group.lo, hi = group.hi, even_lo = lo / 2 * 2, even_hi = (hi + 1) / 2 * 2;
      const float *gb = at(g, h, group.slot) + head * d * P;
      float *gq = at(gqkv, 3 * h, group.slot) + head * d * P;
      const Pair *eb = e + group.slot / 2;
      Pair *zb = scratch.z + group.slot / 2;
      float *dp = scratch.group.logits - even_lo * L;
      Pair *pairs = scratch.group.weights - even_lo / 2 * L;
      for_each_panel<float>(lo, hi, [&](long j0, long j1) {
        pair_product<NV, 1, P>(j1 - j0, at_features(operands.v, h, j0) + head * d / 2 * P, 0, 0,
                               at_features(g_features, h, group.slot) + head * d / 2 * P, P, d / 2, dp + j0 * L, L);
      });
      Vec<float> dot[NV], iv[NV];
      for (int v = 0; v < NV; ++v) {
        dot[v] = zero<float>();
        iv[v] = load(inv + group.slot + v * W);
      }
      for (long j = lo; j < hi; ++j)
        for (int v = 0; v < NV; ++v) dot[v] += load_rounded(eb + j * lde + v * W / 2) * load(dp + j * L + v * W);
      for (int v = 0; v < NV; ++v) {
        dot[v] *= iv[v];
        iv[v] *= scale;
      }
      for_each_pair(lo, hi, [&](long j, auto low, auto high) {
        Vec<float> pair[2][NV];
        const bool seen[2] = {decltype(low)::value != 0, decltype(high)::value != 0};
        for (int r = 0; r < 2; ++r) {
          for (int v = 0; v < NV; ++v)
            pair[r][v] = seen[r] ? load_rounded(eb + (j + r) * lde + v * W / 2) * iv[v] *
                                       (load(dp + (j + r) * L + v * W) - dot[v])
                                 : zero<float>();
          if (seen[r]) store_row<NV>(zb + (j + r) * lde, pair[r]);
        }
        for (int v = 0; v < NV; ++v) store_pairs(pairs + j / 2 * L + v * W, round_to_words(pair[0][v], pair[1][v]));
      });
      zero_around<NV>(lo, hi, zb, lde);
      for (long f = 0; f < d; ++f)
        for (int v = 0; v < NV; ++v) store(gq + f * P + v * W, load(gb + f * P + v * W));
      for_each_panel<float>(even_lo, even_hi, [&](long j0, long j1) {
        pair_product<NV, kPairPanel, 1, true>(d, at_slots(operands.k_slots, h, j0) + head * d * kPairPanel, 0, 0,
                                              pairs + j0 / 2 * L, L, (j1 - j0) / 2, gq, P);
      });
    };
    if (group.vectors == 2)
      run(Constant<2>{});
    else
      run(Constant<1>{});
  }
  // With keys on lanes: dk and dv. The queries that see a vector of keys are the slots that its own group names.
  for (int i = 0; i < tile.num_groups; ++i) {
    const RowGroup &group = tile.groups[i];
    auto run = [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      constexpr long L = NV * W;
      float *gk = at(gqkv, 3 * h, group.slot) + (h + head * d) * P;
      float *gv = at(gqkv, 3 * h, group.slot) + (2 * h + head * d) * P;
      const long even_lo = group.lo / 2 * 2, even_hi = (group.hi + 1) / 2 * 2;
      const long from = group.lo / (2 * W) * (2 * W);  // a square of words covers 32 queries
      Pair *et = scratch.et - from / 2 * L, *zt = scratch.zt - from / 2 * L;
      for (long q = from; q < even_hi; q += 2 * W)
        for (int v = 0; v < NV; ++v) {
          const long at = (group.slot + v * W) * lde + q / 2;
          transpose_square<float>((const float *)(e + at), lde, (float *)(et + q / 2 * L + v * W), L);
          transpose_square<float>((const float *)(scratch.z + at), lde, (float *)(zt + q / 2 * L + v * W), L);
        }
      bool first = true;
      for_each_panel<float>(even_lo, even_hi, [&](long i0, long i1) {
        const Pair *q = at_slots(operands.q_slots, h, i0) + head * d * kPairPanel, *z = zt + i0 / 2 * L;
        const Pair *gs = at_slots(scratch.g_scaled, d, i0), *p = et + i0 / 2 * L;
        const long words = (i1 - i0) / 2;
        if (first) {
          pair_product<NV, kPairPanel, 1>(d, q, 0, 0, z, L, words, gk, P);
          pair_product<NV, kPairPanel, 1>(d, gs, 0, 0, p, L, words, gv, P);
        } else {
          pair_product<NV, kPairPanel, 1, true>(d, q, 0, 0, z, L, words, gk, P);
          pair_product<NV, kPairPanel, 1, true>(d, gs, 0, 0, p, L, words, gv, P);
        }
        first = false;
      });
      if (first) {  // padding
        zero_features<float, NV>(gk, d);
        zero_features<float, NV>(gv, d);
      }
    };
    if (group.vectors == 2)
      run(Constant<2>{});
    else
      run(Constant<1>{});
  }
}

}  // namespace sne::SNE_ISA
