// Backward of attention inside sets, in two sweeps: with queries on lanes for dq, and with keys on lanes for dk and dv.
// Each owns what it writes, so that no two threads add to the same result.
//
// Both rebuild the softmax as exp((s - top) scale) / sum, with s the logits before scaling. Where one key has all the
// weight, its weight must be 1 and the differences of the gradients of weights to their mean 0 exactly, as large keys
// multiply them. So for sets of few keys, whose logits are all there at once, top, sum and mean come from the very
// numbers that they are applied to. For others the saved log-sum-exp serves as log2 sum = lse log2 e with top = 0, and
// <grad, out> as the mean, as long as the log-sum-exp is small. A large one has lost the logarithm of the sum to
// rounding: then, and where there is no exact `out`, all three are computed from the keys in a pass of their own.
#pragma once

#include "cpu/row_operands.h"
#include "sne_fast/cpu_abi.h"

namespace sne::SNE_ISA {

constexpr long kOthers = 64;  // rows of a tile of the other side

template <class Rows>
struct AttentionPointers {
  using T = typename Rows::Real;
  const typename Rows::Entry *q, *k, *v, *grad;
  const T *out, *lse;  // null where top, log_sum and dot are to come from the keys
  typename Rows::Result *gq, *gk, *gv;
  T *top, *log_sum, *dot;  // (rows_q, H): largest logit, log2 of the sum, mean of the gradients of weights
};

template <class Rows>
struct AttentionBackWork {
  using T = typename Rows::Real;
  typename Rows::Entry *one, *two;              // (h, P) rows on lanes
  typename Rows::Entry *space_one, *space_two;  // (kOthers, h) rows of the other side, for sums
  T *g_one, *g_two;                             // (h, P) gradients of rows
  T *s, *p;                                     // (kOthers, P)
  T *top, *log_sum, *dot;                       // (H, P)
  void take(Scratch &scratch, long h, long H) {
    using Entry = typename Rows::Entry;
    constexpr long P = kPanel<T>;
    const long width = h / Rows::kNumbers, space = Rows::kNumbers == 1 ? 0 : width * kOthers;
    one = scratch.take<Entry>(width * P);
    two = scratch.take<Entry>(width * P);
    space_one = scratch.take<Entry>(space);
    space_two = scratch.take<Entry>(space);
    g_one = scratch.take<T>(h * P);
    g_two = scratch.take<T>(h * P);
    s = scratch.take<T>(kOthers * P);
    p = scratch.take<T>(kOthers * P);
    top = scratch.take<T>(H * P);
    log_sum = scratch.take<T>(H * P);
    dot = scratch.take<T>(H * P);
  }
};

constexpr double kSmall = 16;  // log-sum-exps that float holds to 1e-6

// Writes top, log_sum and dot of the rows of an item.
template <class Rows, int NV>
void query_sums(const sne_fast_set_attention_args &a, const AttentionPointers<Rows> &at, const RowItem &item,
                AttentionBackWork<Rows> &w) {
  using T = typename Rows::Real;
  constexpr int W = kLanes<T>;
  constexpr int L = NV * W;
  const long h = a.hidden, H = a.heads, d = h / H, count = item.end - item.begin;
  const long width = h / Rows::kNumbers, entries = d / Rows::kNumbers;
  const int64_t first = a.k_ptr[item.set], last = a.k_ptr[item.set + 1];
  bool small = at.out != nullptr;
  for (int64_t r = item.begin; r < item.end && small; ++r)
    for (long head = 0; head < H; ++head) {
      at.dot[r * H + head] = Rows::dot(at.grad + r * width + head * entries, at.out + r * h + head * d, entries);
      at.top[r * H + head] = 0;
      at.log_sum[r * H + head] = at.lse[r * H + head] * kLog2e<T>;
      small = small && __builtin_fabs(double(at.lse[r * H + head])) <= kSmall;  // false for NaN too
    }
  if (small) return;
  const T scale = kLog2e<T> * (T(1) / T(__builtin_sqrt(double(h))));
  Rows::onto_lanes(at.q + item.begin * width, width, count, w.one, L);
  Rows::onto_lanes(at.grad + item.begin * width, width, count, w.two, L);
  for (long head = 0; head < H; ++head) {
    Vec<T> top[NV], sum[NV], dot[NV];
    for (int i = 0; i < NV; ++i) {
      top[i] = splat(kLowest<T>);
      sum[i] = dot[i] = zero<T>();
    }
    for (int64_t k0 = first; k0 < last; k0 += kOthers) {
      const long n = min_of(kOthers, last - k0), from = k0 * width + head * entries;
      Rows::template scores<NV>(at.k + from, width, n, entries, w.one + head * entries * L, w.s);
      Rows::template scores<NV>(at.v + from, width, n, entries, w.two + head * entries * L, w.p);
      for (int i = 0; i < NV; ++i) {
        const Vec<T> before = top[i];
        for (long j = 0; j < n; ++j) top[i] = vmax(top[i], load(w.s + j * L + i * W));
        const Vec<T> shrink = vexp2((before - top[i]) * scale);
        Vec<T> added = zero<T>(), added_dot = zero<T>();
        for (long j = 0; j < n; ++j) {
          const Vec<T> e = Rows::exponential((load(w.s + j * L + i * W) - top[i]) * scale);
          added += e;
          added_dot += e * load(w.p + j * L + i * W);
        }
        sum[i] = sum[i] * shrink + added;
        dot[i] = dot[i] * shrink + added_dot;
      }
    }
    for (int i = 0; i < NV; ++i)
      for (long l = 0; l < W && i * W + l < count; ++l) {
        const long row = (item.begin + i * W + l) * H + head;
        at.top[row] = top[i][l];
        at.log_sum[row] = T(log2(double(sum[i][l])));
        at.dot[row] = dot[i][l] / sum[i][l];
      }
  }
}

template <class Rows, int NV>
void query_gradient(const sne_fast_set_attention_args &a, const AttentionPointers<Rows> &at, const RowItem &item,
                    AttentionBackWork<Rows> &w) {
  using T = typename Rows::Real;
  constexpr int W = kLanes<T>;
  constexpr int L = NV * W;
  const long h = a.hidden, H = a.heads, d = h / H, count = item.end - item.begin;
  const long width = h / Rows::kNumbers, entries = d / Rows::kNumbers;
  const T scale = T(1) / T(__builtin_sqrt(double(h))), log2_scale = kLog2e<T> * scale;
  const bool few = a.k_ptr[item.set + 1] - a.k_ptr[item.set] <= kOthers;
  if (!few) query_sums<Rows, NV>(a, at, item, w);
  Rows::onto_lanes(at.q + item.begin * width, width, count, w.one, L);
  Rows::onto_lanes(at.grad + item.begin * width, width, count, w.two, L);
  for (long r = 0; r < L && !few; ++r)
    for (long head = 0; head < H; ++head) {
      w.top[head * L + r] = r < count ? at.top[(item.begin + r) * H + head] : T(0);
      w.log_sum[head * L + r] = r < count ? at.log_sum[(item.begin + r) * H + head] : T(0);
      w.dot[head * L + r] = r < count ? at.dot[(item.begin + r) * H + head] : T(0);
    }
  const int64_t first = a.k_ptr[item.set], last = a.k_ptr[item.set + 1];
  if (first == last) memset(w.g_one, 0, size_t(h * L) * sizeof(T));
  for (int64_t k0 = first; k0 < last; k0 += kOthers) {
    const long n = min_of(kOthers, last - k0);
    const auto *keys = Rows::for_sums(at.k + k0 * width, h, n, w.space_one);
    for (long head = 0; head < H; ++head) {  // the inner loop: rows are read whole
      const long from = k0 * width + head * entries;
      Rows::template scores<NV>(at.k + from, width, n, entries, w.one + head * entries * L, w.s);
      Rows::template scores<NV>(at.v + from, width, n, entries, w.two + head * entries * L, w.p);
      for (int i = 0; i < NV; ++i) {
        Vec<T> top = load(w.top + head * L + i * W), log_sum = load(w.log_sum + head * L + i * W);
        Vec<T> dot = load(w.dot + head * L + i * W);
        if (few) {
          Vec<T> sum = zero<T>(), mean = zero<T>();
          top = splat(kLowest<T>);
          for (long j = 0; j < n; ++j) top = vmax(top, load(w.s + j * L + i * W));
          for (long j = 0; j < n; ++j) {
            const Vec<T> e = Rows::exponential((load(w.s + j * L + i * W) - top) * log2_scale);
            sum += e;
            store(w.s + j * L + i * W, e);
          }
          const Vec<T> inv = T(1) / sum;
          for (long j = 0; j < n; ++j) {
            const Vec<T> e = load(w.s + j * L + i * W) * inv;
            mean += e * load(w.p + j * L + i * W);
            store(w.s + j * L + i * W, e);
          }
          dot = mean;
          store(w.top + head * L + i * W, top);
          store(w.log_sum + head * L + i * W, sum);  // its logarithm is taken once per row, below
          store(w.dot + head * L + i * W, dot);
        } else {
          for (long j = 0; j < n; ++j)
            store(w.s + j * L + i * W, Rows::exponential((load(w.s + j * L + i * W) - top) * log2_scale - log_sum));
        }
        for (long j = 0; j < n; ++j)
          store(w.s + j * L + i * W, load(w.s + j * L + i * W) * (load(w.p + j * L + i * W) - dot) * scale);
      }
      Rows::template sum<NV>(keys + head * d, h, n, d, w.s, w.g_one + head * d * L, k0 == first ? kStore : kAccumulate);
    }
  }
  for (long r = 0; r < count && few; ++r)
    for (long head = 0; head < H; ++head) {
      const long row = (item.begin + r) * H + head;
      at.top[row] = w.top[head * L + r];
      at.log_sum[row] = T(log2(double(w.log_sum[head * L + r])));
      at.dot[row] = w.dot[head * L + r];
    }
  Rows::write(w.g_one, L, item.begin, count, h, at.gq);
}

template <class Rows, int NV>
void key_gradient(const sne_fast_set_attention_args &a, const AttentionPointers<Rows> &at, const RowItem &item,
                  AttentionBackWork<Rows> &w) {
  using T = typename Rows::Real;
  constexpr int W = kLanes<T>;
  constexpr int L = NV * W;
  const long h = a.hidden, H = a.heads, d = h / H, count = item.end - item.begin;
  const long width = h / Rows::kNumbers, entries = d / Rows::kNumbers;
  const T scale = T(1) / T(__builtin_sqrt(double(h))), log2_scale = kLog2e<T> * scale;
  Rows::onto_lanes(at.k + item.begin * width, width, count, w.one, L);
  Rows::onto_lanes(at.v + item.begin * width, width, count, w.two, L);
  const int64_t first = a.q_ptr[item.set], last = a.q_ptr[item.set + 1];
  if (first == last) {
    memset(w.g_one, 0, size_t(h * L) * sizeof(T));
    memset(w.g_two, 0, size_t(h * L) * sizeof(T));
  }
  for (int64_t q0 = first; q0 < last; q0 += kOthers) {
    const long n = min_of(kOthers, last - q0);
    const auto *queries = Rows::for_sums(at.q + q0 * width, h, n, w.space_one);
    const auto *grads = Rows::for_sums(at.grad + q0 * width, h, n, w.space_two);
    for (long head = 0; head < H; ++head) {
      const long from = q0 * width + head * entries;
      const unsigned flags = q0 == first ? kStore : kAccumulate;
      Rows::template scores<NV>(at.q + from, width, n, entries, w.one + head * entries * L, w.s);
      Rows::template scores<NV>(at.grad + from, width, n, entries, w.two + head * entries * L, w.p);
      for (long j = 0; j < n; ++j) {
        const long row = (q0 + j) * H + head;
        const T top = at.top[row], log_sum = at.log_sum[row], dot = at.dot[row];
        for (int i = 0; i < NV; ++i) {
          const Vec<T> e = Rows::exponential((load(w.s + j * L + i * W) - top) * log2_scale - log_sum);
          store(w.s + j * L + i * W, e);
          store(w.p + j * L + i * W, e * (load(w.p + j * L + i * W) - dot) * scale);
        }
      }
      Rows::template sum<NV>(queries + head * d, h, n, d, w.p, w.g_one + head * d * L, flags);
      Rows::template sum<NV>(grads + head * d, h, n, d, w.s, w.g_two + head * d * L, flags);
    }
  }
  Rows::write(w.g_one, L, item.begin, count, h, at.gk);
  Rows::write(w.g_two, L, item.begin, count, h, at.gv);
}

// Writes the gradient of the queries of an item, which are at most those of a panel.
template <class Rows>
void query_gradient_rows(const sne_fast_set_attention_args &a, const AttentionPointers<Rows> &at, const RowItem &item,
                         AttentionBackWork<Rows> &w) {
  constexpr int W = kLanes<typename Rows::Real>;
  const long rows = item.end - item.begin;
  if (rows <= W)
    query_gradient<Rows, 1>(a, at, item, w);
  else if (rows <= 2 * W)
    query_gradient<Rows, 2>(a, at, item, w);
  else
    query_gradient<Rows, SNE_VECTORS_PER_PANEL>(a, at, item, w);
}

// Writes those of the keys and values of an item, after those of all queries.
template <class Rows>
void key_gradient_rows(const sne_fast_set_attention_args &a, const AttentionPointers<Rows> &at, const RowItem &item,
                       AttentionBackWork<Rows> &w) {
  constexpr int W = kLanes<typename Rows::Real>;
  const long rows = item.end - item.begin;
  if (rows <= W)
    key_gradient<Rows, 1>(a, at, item, w);
  else if (rows <= 2 * W)
    key_gradient<Rows, 2>(a, at, item, w);
  else
    key_gradient<Rows, SNE_VECTORS_PER_PANEL>(a, at, item, w);
}

}  // namespace sne::SNE_ISA
