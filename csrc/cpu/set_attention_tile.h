// Attention of one tile of queries: rows on vector lanes attend to the keys of their set, 64 at a time, with a running
// maximum and sum (flash attention). Memory does not grow with the set, and tiles are independent.
#pragma once

#include "cpu/row_operands.h"
#include "sne_fast/cpu_abi.h"

namespace sne::SNE_ISA {

constexpr long kKeys = 64;  // keys of a tile

SNE_INLINE float logarithm(float x) { return logf(x); }
SNE_INLINE double logarithm(double x) { return log(x); }

template <class Rows>
struct AttentionWork {
  using T = typename Rows::Real;
  typename Rows::Entry *q;      // (h, P) queries on lanes
  typename Rows::Entry *space;  // (kKeys, h) values, for sums
  T *o;                         // (h, P) outputs on lanes
  T *s;                         // (kKeys, P)
  T *top, *sum;                 // (H, P)
  void take(Scratch &scratch, long h, long H) {
    constexpr long P = kPanel<T>;
    q = scratch.take<typename Rows::Entry>(h / Rows::kNumbers * P);
    space = scratch.take<typename Rows::Entry>(Rows::kNumbers == 1 ? 0 : h / Rows::kNumbers * kKeys);
    o = scratch.take<T>(h * P);
    s = scratch.take<T>(kKeys * P);
    top = scratch.take<T>(H * P);
    sum = scratch.take<T>(H * P);
  }
};

// The rows of `a` are entries of Rows.
template <class Rows, int NV>
void attend(const sne_fast_set_attention_args &a, const RowItem &item, const AttentionWork<Rows> &work) {
  using T = typename Rows::Real;
  using Entry = typename Rows::Entry;
  constexpr int W = kLanes<T>;
  constexpr int L = NV * W;
  const long h = a.hidden, H = a.heads, d = h / H, count = item.end - item.begin;
  const long width = h / Rows::kNumbers, entries = d / Rows::kNumbers;
  const T scale = T(1) / T(__builtin_sqrt(double(h)));
  const Entry *k = (const Entry *)a.k, *v = (const Entry *)a.v;
  T *lse = (T *)a.lse, *s = work.s;
  Rows::onto_lanes((const Entry *)a.q + item.begin * width, width, count, work.q, L);
  const int64_t first = a.k_ptr[item.set], last = a.k_ptr[item.set + 1];
  // The loop over heads is the inner one, so that the rows of a long set are read whole and once per query tile.
  for (int64_t k0 = first; k0 < last; k0 += kKeys) {
    const long n = min_of(kKeys, last - k0);
    const Entry *values = Rows::for_sums(v + k0 * width, h, n, work.space);
    for (long head = 0; head < H; ++head) {
      T *o = work.o + head * d * L;
      Rows::template scores<NV>(k + k0 * width + head * entries, width, n, entries, work.q + head * entries * L, s);
      Vec<T> top[NV], sum[NV], added[NV];  // sums over a tile are added to those before it as a whole
      for (int i = 0; i < NV; ++i) top[i] = splat(kLowest<T>);  // finite where all logits are -inf
      for (long j = 0; j < n; ++j)
        for (int i = 0; i < NV; ++i) top[i] = vmax(top[i], load(s + j * L + i * W));
      for (int i = 0; i < NV; ++i) {
        sum[i] = added[i] = zero<T>();
        if (k0 == first) continue;
        const Vec<T> before = load(work.top + head * L + i * W);
        top[i] = vmax(top[i], before);
        const Vec<T> shrink = vexp2((before - top[i]) * (scale * kLog2e<T>));
        sum[i] = load(work.sum + head * L + i * W) * shrink;
        for (long f = 0; f < d; ++f) store(o + f * L + i * W, load(o + f * L + i * W) * shrink);
      }
      for (long j = 0; j < n; ++j)
        for (int i = 0; i < NV; ++i) {
          const Vec<T> e = Rows::exponential((load(s + j * L + i * W) - top[i]) * (scale * kLog2e<T>));
          added[i] += e;
          store(s + j * L + i * W, e);
        }
      for (int i = 0; i < NV; ++i) {
        store(work.top + head * L + i * W, top[i]);
        store(work.sum + head * L + i * W, sum[i] + added[i]);
      }
      Rows::template sum<NV>(values + head * d, h, n, d, s, o, k0 == first ? kStore : kAccumulate);
    }
  }
  if (first == last) {
    memset(work.o, 0, size_t(h * L) * sizeof(T));
    for (long r = 0; r < count * H; ++r) lse[item.begin * H + r] = -T(INFINITY);
  } else {
    for (long head = 0; head < H; ++head) {
      T *o = work.o + head * d * L;
      for (int i = 0; i < NV; ++i) {
        const Vec<T> inv = T(1) / load(work.sum + head * L + i * W);
        for (long f = 0; f < d; ++f) store(o + f * L + i * W, load(o + f * L + i * W) * inv);
      }
      for (long l = 0; l < count; ++l)
        lse[(item.begin + l) * H + head] = logarithm(work.sum[head * L + l]) + work.top[head * L + l] * scale;
    }
  }
  Rows::write(work.o, L, item.begin, count, h, (typename Rows::Result *)a.out);
}

// Attends with the rows of an item, which are at most those of a panel.
template <class Rows>
void attend_rows(const sne_fast_set_attention_args &a, const RowItem &item, const AttentionWork<Rows> &work) {
  constexpr int W = kLanes<typename Rows::Real>;
  const long rows = item.end - item.begin;
  if (rows <= W)
    attend<Rows, 1>(a, item, work);
  else if (rows <= 2 * W)
    attend<Rows, 2>(a, item, work);
  else
    attend<Rows, SNE_VECTORS_PER_PANEL>(a, item, work);
}

}  // namespace sne::SNE_ISA
