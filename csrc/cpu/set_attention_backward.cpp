// set_attention, backward, in two sweeps: with queries on lanes for dq, and with keys on lanes for dk and dv. Each owns
// what it writes, so that no two threads add to the same result. Both rebuild the softmax from the saved log-sum-exp.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/set_rows.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer, shared_buffer;
constexpr long kOthers = 64;  // rows of a tile of the other side

template <class T>
struct Pointers {
  const T *q, *k, *v, *out, *lse, *grad;
  T *gq, *gk, *gv;
  T *dot;  // (rows_q, H): <grad, out> per head
};

template <class T>
struct Work {
  T *one, *two, *g_one, *g_two;  // (h, P) rows on lanes and their gradients
  T *s, *p;                      // (kOthers, P)
  T *lse, *dot;                  // (H, P)
  void take(Scratch &scratch, long h, long H) {
    constexpr long P = kPanel<T>;
    one = scratch.take<T>(h * P);
    two = scratch.take<T>(h * P);
    g_one = scratch.take<T>(h * P);
    g_two = scratch.take<T>(h * P);
    s = scratch.take<T>(kOthers * P);
    p = scratch.take<T>(kOthers * P);
    lse = scratch.take<T>(H * P);
    dot = scratch.take<T>(H * P);
  }
};

template <class T, int NV>
void query_gradient(const sne_fast_set_attention_args &a, const Pointers<T> &at, const RowItem &item, Work<T> &w) {
  constexpr int W = kLanes<T>;
  constexpr int L = NV * W;
  const long h = a.hidden, H = a.heads, d = h / H, count = item.end - item.begin;
  const T scale = T(1) / T(__builtin_sqrt(double(h)));
  to_lanes(at.q + item.begin * h, h, count, h, w.one, L);
  to_lanes(at.grad + item.begin * h, h, count, h, w.two, L);
  for (long r = 0; r < L; ++r)
    for (long head = 0; head < H; ++head) {
      w.lse[head * L + r] = r < count ? at.lse[(item.begin + r) * H + head] * kLog2e<T> : T(0);
      w.dot[head * L + r] = r < count ? at.dot[(item.begin + r) * H + head] : T(0);
    }
  const int64_t first = a.k_ptr[item.set], last = a.k_ptr[item.set + 1];
  if (first == last) memset(w.g_one, 0, size_t(h * L) * sizeof(T));
  for (int64_t k0 = first; k0 < last; k0 += kOthers)  // heads in the inner loop: rows are read whole
    for (long head = 0; head < H; ++head) {
      const long n = min_of(kOthers, last - k0), from = k0 * h + head * d;
      product<T, NV, 0, 1>(n, at.k + from, h, 0, w.one + head * d * L, L, d, w.s, L);
      product<T, NV, 0, 1>(n, at.v + from, h, 0, w.two + head * d * L, L, d, w.p, L);
      for (int i = 0; i < NV; ++i) {
        const Vec<T> lse = load(w.lse + head * L + i * W), dot = load(w.dot + head * L + i * W);
        for (long j = 0; j < n; ++j) {
          const Vec<T> e = vexp2(load(w.s + j * L + i * W) * (kLog2e<T> * scale) - lse);
          store(w.s + j * L + i * W, e * (load(w.p + j * L + i * W) - dot) * scale);
        }
      }
      product<T, NV, 1, 0>(d, at.k + from, 0, h, w.s, L, n, w.g_one + head * d * L, L, nullptr,
                           k0 == first ? kStore : kAccumulate);
    }
  from_lanes(w.g_one, L, count, h, at.gq + item.begin * h, h);
}

template <class T, int NV>
void key_gradient(const sne_fast_set_attention_args &a, const Pointers<T> &at, const RowItem &item, Work<T> &w) {
  constexpr int W = kLanes<T>;
  constexpr int L = NV * W;
  const long h = a.hidden, H = a.heads, d = h / H, count = item.end - item.begin;
  const T scale = T(1) / T(__builtin_sqrt(double(h)));
  to_lanes(at.k + item.begin * h, h, count, h, w.one, L);
  to_lanes(at.v + item.begin * h, h, count, h, w.two, L);
  const int64_t first = a.q_ptr[item.set], last = a.q_ptr[item.set + 1];
  if (first == last) {
    memset(w.g_one, 0, size_t(h * L) * sizeof(T));
    memset(w.g_two, 0, size_t(h * L) * sizeof(T));
  }
  for (int64_t q0 = first; q0 < last; q0 += kOthers)
    for (long head = 0; head < H; ++head) {
      const long n = min_of(kOthers, last - q0), from = q0 * h + head * d;
      const unsigned flags = q0 == first ? kStore : kAccumulate;
      product<T, NV, 0, 1>(n, at.q + from, h, 0, w.one + head * d * L, L, d, w.s, L);
      product<T, NV, 0, 1>(n, at.grad + from, h, 0, w.two + head * d * L, L, d, w.p, L);
      for (long j = 0; j < n; ++j) {
        const T lse = at.lse[(q0 + j) * H + head] * kLog2e<T>, dot = at.dot[(q0 + j) * H + head];
        for (int i = 0; i < NV; ++i) {
          const Vec<T> e = vexp2(load(w.s + j * L + i * W) * (kLog2e<T> * scale) - lse);
          store(w.s + j * L + i * W, e);
          store(w.p + j * L + i * W, e * (load(w.p + j * L + i * W) - dot) * scale);
        }
      }
      product<T, NV, 1, 0>(d, at.q + from, 0, h, w.p, L, n, w.g_one + head * d * L, L, nullptr, flags);
      product<T, NV, 1, 0>(d, at.grad + from, 0, h, w.s, L, n, w.g_two + head * d * L, L, nullptr, flags);
    }
  from_lanes(w.g_one, L, count, h, at.gk + item.begin * h, h);
  from_lanes(w.g_two, L, count, h, at.gv + item.begin * h, h);
}

template <class T>
int backward(const sne_fast_set_attention_args &a, const sne_fast_set_attention_grads &g) {
  constexpr long P = kPanel<T>, W = kLanes<T>;
  const long h = a.hidden, H = a.heads, d = h / H;
  long queries = 0, keys = 0;
  RowItem *q_items = cut_rows(a.num_sets, a.q_ptr, P, &queries);
  RowItem *k_items = cut_rows(a.num_sets, a.k_ptr, P, &keys);
  T *dot = (T *)shared_buffer.reserve(size_t(a.rows_q * H + 1) * sizeof(T));
  if (!q_items || !k_items || !dot) {
    free(q_items);
    free(k_items);
    return SNE_FAST_NO_MEMORY;
  }
  const Pointers<T> at = {(const T *)a.q,    (const T *)a.k, (const T *)a.v, (const T *)a.out, (const T *)a.lse,
                          (const T *)g.grad, (T *)g.q,       (T *)g.k,       (T *)g.v,         dot};
  int failed = 0;
  const int threads = int(max_of(1, min_of(a.num_threads, queries > keys ? queries : keys)));
  const int q_grab = items_per_grab(queries, threads), k_grab = items_per_grab(keys, threads);
#pragma omp parallel num_threads(threads)
  {
    Work<T> w;
    Scratch size;
    w.take(size, h, H);
    char *base = buffer.reserve(size.size());
    if (base) {
      Scratch scratch(base);
      w.take(scratch, h, H);
    } else {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (long r = 0; r < a.rows_q; ++r)
      for (long head = 0; head < H; ++head) {
        T sum = 0;
        for (long f = head * d; f < (head + 1) * d; ++f) sum += at.grad[r * h + f] * at.out[r * h + f];
        dot[r * H + head] = sum;
      }
#pragma omp for schedule(dynamic, q_grab) nowait
    for (long i = 0; i < queries; ++i) {
      if (!base) continue;
      const long rows = q_items[i].end - q_items[i].begin;
      if (rows <= W)
        query_gradient<T, 1>(a, at, q_items[i], w);
      else if (rows <= 2 * W)
        query_gradient<T, 2>(a, at, q_items[i], w);
      else
        query_gradient<T, SNE_VECTORS_PER_PANEL>(a, at, q_items[i], w);
    }
#pragma omp for schedule(dynamic, k_grab)
    for (long i = 0; i < keys; ++i) {
      if (!base) continue;
      const long rows = k_items[i].end - k_items[i].begin;
      if (rows <= W)
        key_gradient<T, 1>(a, at, k_items[i], w);
      else if (rows <= 2 * W)
        key_gradient<T, 2>(a, at, k_items[i], w);
      else
        key_gradient<T, SNE_VECTORS_PER_PANEL>(a, at, k_items[i], w);
    }
  }
  free(q_items);
  free(k_items);
  shared_buffer.trim();
  return failed ? SNE_FAST_NO_MEMORY : SNE_FAST_OK;
}

}  // namespace

int set_attention_backward(int dtype, const sne_fast_set_attention_args &a, const sne_fast_set_attention_grads &g) {
  return dtype == SNE_FAST_F64 ? backward<double>(a, g) : backward<float>(a, g);
}

}  // namespace sne::SNE_ISA
