// segment_pool, forward and backward. Long segments are cut into pieces, whose partial sums are added in order: one
// huge segment uses all threads, and the bits do not depend on their number.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/pool_rows.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer, shared_buffer;
constexpr long kRows = 64;     // rows weighted at a time
constexpr long kPiece = 2048;  // rows of a piece

// A thread's buffers of the forward.
template <class Rows>
struct PoolWork {
  using T = typename Rows::Real;
  T *w;                         // (kRows, A)
  T *top, *sum;                 // (A)
  T *acc;                       // (A, h)
  T *cycle, *sums;              // (A, kLanes)
  typename Rows::Entry *space;  // what weighted_sum needs
  void take(Scratch &scratch, long A, long h) {
    constexpr long W = kLanes<T>;
    w = scratch.take<T>(kRows * A + W);
    top = scratch.take<T>(A);
    sum = scratch.take<T>(A);
    acc = scratch.take<T>(A * h);
    cycle = scratch.take<T>(A * W);
    sums = scratch.take<T>(A * W);
    space = scratch.take<typename Rows::Entry>(Rows::space_of_sum(kRows, A, h));
  }
};

// Computes top, sum (A) and the undivided weighted sums acc (A, h) of one piece.
template <class Rows, class T = typename Rows::Real>
void pool_piece(const sne_fast_segment_pool_args &g, const RowItem &item, T *top, T *sum, T *acc,
                const PoolWork<Rows> &work) {
  constexpr long W = kLanes<T>;
  const long h = g.hidden, A = g.heads, count = item.end - item.begin;
  const auto *logits = (const typename Rows::Number *)g.logits + item.begin * A;
  T *cycle = work.cycle, *sums = work.sums;
  const long filled = cycle_length<T>(count, A);
  for (long i = 0; i < filled; i += W) {
    store(cycle + i, splat(kLowest<T>));  // finite, so that logits of -inf have weight 0 in a piece of nothing else
    store(sums + i, zero<T>());
  }
  for_cycle<T>(count, A, [&](long at, long i) {
    const long left = count * A - at;
    const Vec<T> top_of = load(cycle + i), x = Rows::load_numbers(logits + at, left);
    store(cycle + i, left >= W ? vmax(x, top_of) : first_lanes<T>(left) ? vmax(x, top_of) : top_of);
  });
  for (long a = 0; a < A; ++a) top[a] = cycle[a];
  for (long i = A, a = 0; i < filled; ++i, a = a + 1 < A ? a + 1 : 0) top[a] = cycle[i] > top[a] ? cycle[i] : top[a];
  fill_cycle(top, A, filled, cycle);
  unsigned flags = kStore;
  for (long j = 0; j < count; j += kRows) {
    const long n = min_of(kRows, count - j);
    for_cycle<T>(n, A, [&](long at, long i) {
      const long left = n * A - at;
      const Vec<T> x = Rows::load_numbers(logits + j * A + at, left);
      Vec<T> e = vexp2((x - load(cycle + i)) * kLog2e<T>);
      if (left < W) e = keep<T>(first_lanes<T>(left), e);
      store(work.w + at, e);
      store(sums + i, load(sums + i) + e);
    });
    Rows::weighted_sum(A, work.w, (const typename Rows::Entry *)g.x, item.begin + j, n, h, acc, flags, work.space);
    flags = kAccumulate;
  }
  fold_cycle(sums, A, filled, sum);
}

template <class Rows>
int forward(const sne_fast_segment_pool_args &g, Interrupt &interrupt) {
  using T = typename Rows::Real;
  constexpr int W = kLanes<T>;
  const long h = g.hidden, A = g.heads, S = g.num_segments;
  long count = 0;
  RowItem *items = cut_rows(S, g.ptr, kPiece, &count);
  if (!items) return SNE_FAST_NO_MEMORY;
  T *lse = (T *)g.lse;
  // All pieces of a segment that is cut need a place for their sums.
  long cut = 0;
  for (long i = 0; i < count; ++i)
    cut += items[i].end - items[i].begin != g.ptr[items[i].set + 1] - g.ptr[items[i].set];
  const long size = A * h + 2 * A;
  T *parts = (T *)shared_buffer.reserve(size_t(cut * size + A * h + 1) * sizeof(T));
  int failed = parts == nullptr;
  // Index of the part of item i, -1 if the item is a whole segment.
  int64_t *part_of = static_cast<int64_t *>(malloc(size_t(count + 1) * sizeof(int64_t)));
  if (!part_of) failed = 1;
  if (!failed) {
    long next = 0;
    for (long i = 0; i < count; ++i)
      part_of[i] = items[i].end - items[i].begin == g.ptr[items[i].set + 1] - g.ptr[items[i].set] ? -1 : next++;
    for (int64_t s = 0; s < S; ++s)
      if (g.ptr[s] == g.ptr[s + 1]) {
        memset(Rows::row_of(g.out, s * A, h), 0, size_t(A * h) * sizeof(typename Rows::Number));
        for (long a = 0; a < A; ++a) lse[s * A + a] = -T(INFINITY);
      }
    const int threads = int(max_of(1, min_of(g.num_threads, count))), grab = items_per_grab(count, threads);
#pragma omp parallel num_threads(threads)
    {
      PoolWork<Rows> work;
      char *base = buffer.lay_out(work, A, h);
      if (!base) {
#pragma omp atomic write
        failed = 1;
      }
#pragma omp for schedule(dynamic, grab)
      for (long i = 0; i < count; ++i) {
        if (!base || interrupt.stop()) continue;
        if (part_of[i] >= 0) {
          T *part = parts + part_of[i] * size;
          pool_piece(g, items[i], part, part + A, part + 2 * A, work);
          continue;
        }
        const long row = items[i].set * A;
        T *acc = Rows::place_of_result(g.out, row, h, work.acc);
        pool_piece(g, items[i], work.top, work.sum, acc, work);
        for (long a = 0; a < A; ++a) {
          lse[row + a] = work.top[a] + T(log(double(work.sum[a])));
          for (long f = 0; f < h; f += W) store(acc + a * h + f, load(acc + a * h + f) * (T(1) / work.sum[a]));
        }
        Rows::write_result(acc, A * h, g.out, row, h);
      }
    }
    for (long i = 0; i < count && !failed && !interrupt.stopped();) {
      long end = i + 1;
      while (end < count && items[end].set == items[i].set) ++end;
      if (part_of[i] >= 0) {
        const T *part = parts + part_of[i] * size;
        const long row = items[i].set * A;
        T *to = Rows::place_of_result(g.out, row, h, parts + cut * size);
        for (long a = 0; a < A; ++a) {
          T top = part[a];
          for (long p = 1; p < end - i; ++p) top = part[p * size + a] > top ? part[p * size + a] : top;
          T sum = 0;
          for (long f = 0; f < h; f += W) store(to + a * h + f, zero<T>());
          for (long p = 0; p < end - i; ++p) {
            const T *q = part + p * size, factor = T(exp(double(q[a] - top)));
            sum += q[A + a] * factor;
            for (long f = 0; f < h; f += W)
              store(to + a * h + f, load(to + a * h + f) + load(q + 2 * A + a * h + f) * factor);
          }
          for (long f = 0; f < h; f += W) store(to + a * h + f, load(to + a * h + f) * (T(1) / sum));
          lse[row + a] = top + T(log(double(sum)));
        }
        Rows::write_result(to, A * h, g.out, row, h);
      }
      i = end;
    }
  }
  free(items);
  free(part_of);
  shared_buffer.trim();
  return interrupt.status(failed);
}

// Writes top and log_sum (A), by which the softmax of segment s is exp(logits - top - log_sum). The saved log-sum-exp
// is their sum, which has lost log_sum to rounding where it is large: then both are computed again.
template <class Rows, class T = typename Rows::Real>
void segment_sums(const sne_fast_segment_pool_args &g, int64_t s, T *top, T *log_sum) {
  constexpr double kSmall = 16;
  const long A = g.heads;
  const auto *logits = (const typename Rows::Number *)g.logits;
  const T *lse = (const T *)g.lse + s * A;
  for (long a = 0; a < A; ++a) {
    top[a] = 0;
    log_sum[a] = lse[a];
    if (__builtin_fabs(double(lse[a])) <= kSmall) continue;  // not so for NaN
    top[a] = kLowest<T>;
    double sum = 0;
    for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
      const T x = Rows::number(logits[i * A + a]);
      top[a] = x > top[a] ? x : top[a];
    }
    for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) sum += exp(double(Rows::number(logits[i * A + a]) - top[a]));
    log_sum[a] = T(log(sum));
  }
}

// A thread's buffers of the backward.
template <class Rows>
struct PoolBackWork {
  using T = typename Rows::Real;
  typename Rows::Entry *xt;  // (h, kLanes) rows on lanes
  T *dw, *w;                 // (A, kLanes), (kLanes, A)
  T *top, *log_sum, *mean;   // cycles (A, kLanes)
  T *sums;                   // two cycles
  T *grad, *rows;            // (A, h), (kLanes, h)
  void take(Scratch &scratch, long A, long h) {
    constexpr long W = kLanes<T>;
    xt = scratch.take<typename Rows::Entry>(h / Rows::kNumbers * W);
    T **const cycles[] = {&dw, &w, &top, &log_sum, &mean};
    for (T **cycle : cycles) *cycle = scratch.take<T>(A * W);
    sums = scratch.take<T>(2 * A * W);
    grad = scratch.take<T>(A * h);
    rows = scratch.take<T>(W * h);
  }
};

// Writes the weights of n rows from r, at most a vector of them, to w (n, A), and zeros up to whole vectors.
template <class Rows, class T = typename Rows::Real>
void row_weights(const sne_fast_segment_pool_args &g, int64_t r, long n, PoolBackWork<Rows> &work) {
  const auto *logits = (const typename Rows::Number *)g.logits + r * g.heads;
  for_cycle<T>(n, g.heads, [&](long at, long i) {
    const long left = n * g.heads - at;
    const Vec<T> x = Rows::load_numbers(logits + at, left);
    const Vec<T> e = vexp2(((x - load(work.top + i)) - load(work.log_sum + i)) * kLog2e<T>);
    store(work.w + at, left < kLanes<T> ? keep<T>(first_lanes<T>(left), e) : e);
  });
}

// Two passes over the rows. The first leaves the gradients of weights in `dw`, and takes their mean over those very
// numbers and weights, not as <grad, out>: where one row has all the weight, differences to the mean must vanish
// exactly, as parameters so large multiply them.
template <class Rows>
int backward(const sne_fast_segment_pool_args &g, const sne_fast_segment_pool_grads &b, Interrupt &interrupt) {
  using T = typename Rows::Real;
  using Number = typename Rows::Number;
  constexpr int W = kLanes<T>;
  const long h = g.hidden, A = g.heads, S = g.num_segments;
  long count = 0;
  RowItem *items = cut_rows(S, g.ptr, 256, &count);
  // top, log_sum, mean and sum of weights of every segment, the parts of every item of the last two, and gradients of
  // weights where those of logits cannot hold them
  const long own = Rows::kNumbers == 1 ? 0 : g.rows * A;
  T *sums = (T *)shared_buffer.reserve(size_t((4 * S + 2 * count) * A + own + 1) * sizeof(T));
  if (!items || !sums) {
    free(items);
    return SNE_FAST_NO_MEMORY;
  }
  T *parts = sums + 4 * S * A;
  T *dws = Rows::kNumbers == 1 ? (T *)b.logits : parts + 2 * count * A;
  int failed = 0;
  const int threads = int(max_of(1, min_of(g.num_threads, count))), grab = items_per_grab(count, threads);
#pragma omp parallel num_threads(threads)
  {
    PoolBackWork<Rows> work;
    char *base = buffer.lay_out(work, A, h);
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t s = 0; s < S; ++s) segment_sums<Rows>(g, s, sums + 4 * s * A, sums + (4 * s + 1) * A);
#pragma omp for schedule(dynamic, grab)
    for (long i = 0; i < count; ++i) {
      if (!base || interrupt.stop()) continue;
      const int64_t s = items[i].set;
      const long filled = cycle_length<T>(items[i].end - items[i].begin, A);
      fill_cycle(sums + 4 * s * A, A, filled, work.top);
      fill_cycle(sums + (4 * s + 1) * A, A, filled, work.log_sum);
      for (long j = 0; j < filled; j += W) {
        store(work.sums + j, zero<T>());
        store(work.sums + A * W + j, zero<T>());
      }
      for (int64_t r = items[i].begin; r < items[i].end; r += W) {
        const long n = min_of(W, items[i].end - r);
        Rows::products_with_rows(A, Rows::row_of(b.grad, s * A, h), Rows::row_of(g.x, r, h), n, h, work.xt, work.dw);
        row_weights(g, r, n, work);
        T *to = dws + r * A;
        for (long j = 0; j < n; ++j)
          for (long a = 0; a < A; ++a) to[j * A + a] = work.dw[a * W + j];
        for_cycle<T>(n, A, [&](long at, long cycle) {
          const Vec<T> w = load(work.w + at), dw = RealNumbers<T>::load_numbers(to + at, n * A - at);
          store(work.sums + cycle, load(work.sums + cycle) + w * dw);
          store(work.sums + A * W + cycle, load(work.sums + A * W + cycle) + w);
        });
      }
      fold_cycle(work.sums, A, filled, parts + 2 * i * A);
      fold_cycle(work.sums + A * W, A, filled, parts + (2 * i + 1) * A);
    }
#pragma omp single
    {
      for (int64_t s = 0; s < S; ++s)
        for (long a = 2 * A; a < 4 * A; ++a) sums[4 * s * A + a] = 0;
      for (long i = 0; i < count; ++i)
        for (long a = 0; a < 2 * A; ++a) sums[(4 * items[i].set + 2) * A + a] += parts[2 * i * A + a];
      for (int64_t s = 0; s < S; ++s)
        for (long a = 2 * A; a < 3 * A; ++a) sums[4 * s * A + a] /= sums[4 * s * A + A + a];
    }
#pragma omp for schedule(dynamic, grab)
    for (long i = 0; i < count; ++i) {
      if (!base || interrupt.stop()) continue;
      const int64_t s = items[i].set;
      const long filled = cycle_length<T>(items[i].end - items[i].begin, A);
      fill_cycle(sums + 4 * s * A, A, filled, work.top);
      fill_cycle(sums + (4 * s + 1) * A, A, filled, work.log_sum);
      fill_cycle(sums + (4 * s + 2) * A, A, filled, work.mean);
      const T *grad = Rows::reals(Rows::row_of(b.grad, s * A, h), A * h, work.grad);
      for (int64_t r = items[i].begin; r < items[i].end; r += W) {
        const long n = min_of(W, items[i].end - r);
        row_weights(g, r, n, work);
        Number *to = (Number *)b.logits + r * A;
        for_cycle<T>(n, A, [&](long at, long cycle) {
          const Vec<T> dw = RealNumbers<T>::load_numbers(dws + r * A + at, n * A - at);
          Rows::store_numbers(to + at, n * A - at, load(work.w + at) * (dw - load(work.mean + cycle)));
        });
        T *rows = Rows::place_of_result(b.x, r, h, work.rows);
        product_wide<T, 0, 1>(n, work.w, A, 0, grad, h, A, rows, h, h);
        Rows::write_result(rows, n * h, b.x, r, h);
      }
    }
  }
  free(items);
  shared_buffer.trim();
  return interrupt.status(failed);
}

}  // namespace

int segment_pool_forward(int dtype, const sne_fast_segment_pool_args &g, Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? forward<RoundedNumbers>(g, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? forward<RealNumbers<double> >(g, interrupt)
                               : forward<RealNumbers<float> >(g, interrupt);
#endif
}
int segment_pool_backward(int dtype, const sne_fast_segment_pool_args &g, const sne_fast_segment_pool_grads &b,
                          Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? backward<RoundedNumbers>(g, b, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? backward<RealNumbers<double> >(g, b, interrupt)
                               : backward<RealNumbers<float> >(g, b, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
