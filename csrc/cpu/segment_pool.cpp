// segment_pool, forward and backward. Long segments are cut into pieces, whose partial sums are added in order: one
// huge segment uses all threads, and the bits do not depend on their number.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/set_rows.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer, shared_buffer;
constexpr long kRows = 64;     // rows weighted at a time
constexpr long kPiece = 2048;  // rows of a piece

// Writes exp(logits - top) of up to kRows rows to w (A, kRows), and adds their sums to sum (A).
template <class T>
void exponentials(const T *logits, long A, long n, const T *top, T *w, T *sum) {
  constexpr int W = kLanes<T>;
  for (long a = 0; a < A; ++a) {
    T *to = w + a * kRows;
    for (long i = 0; i < n; ++i) to[i] = logits[i * A + a] - top[a];
    for (long i = n; i < (n + W - 1) / W * W; ++i) to[i] = T(-1000);
    for (long i = 0; i < n; i += W) store(to + i, vexp2(load(to + i) * kLog2e<T>));
    for (long i = 0; i < n; ++i) sum[a] += to[i];
  }
}

// Computes top, sum (A) and the undivided weighted sums acc (A, h) of one piece.
template <class T>
void pool_piece(const sne_fast_segment_pool_args &g, const RowItem &item, T *top, T *sum, T *acc, T *w) {
  const long h = g.hidden, A = g.heads;
  const T *logits = (const T *)g.logits;
  for (long a = 0; a < A; ++a) {
    top[a] = kLowest<T>;  // finite, so that logits of -inf have weight 0 in a piece of nothing else
    sum[a] = 0;
  }
  for (int64_t i = item.begin; i < item.end; ++i)
    for (long a = 0; a < A; ++a) top[a] = logits[i * A + a] > top[a] ? logits[i * A + a] : top[a];
  unsigned flags = kStore;
  for (int64_t i = item.begin; i < item.end; i += kRows) {
    const long n = min_of(kRows, item.end - i);
    exponentials(logits + i * A, A, n, top, w, sum);
    product_wide<T, int(kRows), 1>(A, w, 0, 0, (const T *)g.x + i * h, h, n, acc, h, h, nullptr, flags);
    flags = kAccumulate;
  }
}

template <class T>
int forward(const sne_fast_segment_pool_args &g, Interrupt &interrupt) {
  constexpr int W = kLanes<T>;
  const long h = g.hidden, A = g.heads, S = g.num_segments;
  long count = 0;
  RowItem *items = cut_rows(S, g.ptr, kPiece, &count);
  if (!items) return SNE_FAST_NO_MEMORY;
  T *out = (T *)g.out, *lse = (T *)g.lse;
  // All pieces of a segment that is cut need a place for their sums.
  long cut = 0;
  for (long i = 0; i < count; ++i)
    cut += items[i].end - items[i].begin != g.ptr[items[i].set + 1] - g.ptr[items[i].set];
  const long size = A * h + 2 * A;
  T *parts = (T *)shared_buffer.reserve(size_t(cut * size + 1) * sizeof(T));
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
        memset(out + s * A * h, 0, size_t(A * h) * sizeof(T));
        for (long a = 0; a < A; ++a) lse[s * A + a] = -T(INFINITY);
      }
    const int threads = int(max_of(1, min_of(g.num_threads, count))), grab = items_per_grab(count, threads);
#pragma omp parallel num_threads(threads)
    {
      T *base = (T *)buffer.reserve(size_t(A * kRows + 2 * A) * sizeof(T));
      if (!base) {
#pragma omp atomic write
        failed = 1;
      }
#pragma omp for schedule(dynamic, grab)
      for (long i = 0; i < count; ++i) {
        if (!base || interrupt.stop()) continue;
        T *w = base, *top = w + A * kRows, *sum = top + A;
        if (part_of[i] >= 0) {
          T *part = parts + part_of[i] * size;
          pool_piece(g, items[i], part, part + A, part + 2 * A, w);
          continue;
        }
        T *acc = out + items[i].set * A * h;
        pool_piece(g, items[i], top, sum, acc, w);
        for (long a = 0; a < A; ++a) {
          lse[items[i].set * A + a] = top[a] + T(log(double(sum[a])));
          for (long f = 0; f < h; f += W) store(acc + a * h + f, load(acc + a * h + f) * (T(1) / sum[a]));
        }
      }
    }
    for (long i = 0; i < count && !failed && !interrupt.stopped();) {
      long end = i + 1;
      while (end < count && items[end].set == items[i].set) ++end;
      if (part_of[i] >= 0) {
        const T *part = parts + part_of[i] * size;
        T *to = out + items[i].set * A * h;
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
          lse[items[i].set * A + a] = top + T(log(double(sum)));
        }
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
template <class T>
void segment_sums(const sne_fast_segment_pool_args &g, int64_t s, T *top, T *log_sum) {
  constexpr double kSmall = 16;
  const long A = g.heads;
  const T *logits = (const T *)g.logits, *lse = (const T *)g.lse + s * A;
  for (long a = 0; a < A; ++a) {
    top[a] = 0;
    log_sum[a] = lse[a];
    if (__builtin_fabs(double(lse[a])) <= kSmall) continue;  // not so for NaN
    top[a] = kLowest<T>;
    double sum = 0;
    for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) top[a] = logits[i * A + a] > top[a] ? logits[i * A + a] : top[a];
    for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) sum += exp(double(logits[i * A + a] - top[a]));
    log_sum[a] = T(log(sum));
  }
}

// Writes the weights of n rows from r to w (n, A).
template <class T>
void row_weights(const sne_fast_segment_pool_args &g, int64_t r, long n, const T *top, const T *log_sum, T *w) {
  constexpr int W = kLanes<T>;
  const long A = g.heads;
  const T *logits = (const T *)g.logits;
  for (long j = 0; j < n * A; ++j) w[j] = (logits[r * A + j] - top[j % A]) - log_sum[j % A];
  for (long j = n * A; j < (n * A + W - 1) / W * W; ++j) w[j] = 0;
  for (long j = 0; j < n * A; j += W) store(w + j, vexp2(load(w + j) * kLog2e<T>));
}

// Two passes over the rows. The first leaves the gradients of weights in the gradients of logits, and takes their mean
// over those very numbers and weights, not as <grad, out>: where one row has all the weight, differences to the mean
// must vanish exactly, as parameters so large multiply them.
template <class T>
int backward(const sne_fast_segment_pool_args &g, const sne_fast_segment_pool_grads &b, Interrupt &interrupt) {
  constexpr int W = kLanes<T>;
  const long h = g.hidden, A = g.heads, S = g.num_segments;
  long count = 0;
  RowItem *items = cut_rows(S, g.ptr, 256, &count);
  // top, log_sum, mean and sum of weights of every segment, and the parts of every item of the last two
  T *sums = (T *)shared_buffer.reserve(size_t((4 * S + 2 * count) * A + 1) * sizeof(T));
  if (!items || !sums) {
    free(items);
    return SNE_FAST_NO_MEMORY;
  }
  T *parts = sums + 4 * S * A;
  const T *grad = (const T *)b.grad;
  T *gx = (T *)b.x, *gl = (T *)b.logits;
  int failed = 0;
  const int threads = int(max_of(1, min_of(g.num_threads, count))), grab = items_per_grab(count, threads);
#pragma omp parallel num_threads(threads)
  {
    T *base = (T *)buffer.reserve(size_t(h * W + A * W + (W * A + W)) * sizeof(T));
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t s = 0; s < S; ++s) segment_sums(g, s, sums + 4 * s * A, sums + (4 * s + 1) * A);
#pragma omp for schedule(dynamic, grab)
    for (long i = 0; i < count; ++i) {
      if (!base || interrupt.stop()) continue;
      T *xt = base, *dw = xt + h * W, *w = dw + A * W;  // xt (h, W), dw (A, W), w (W, A)
      const int64_t s = items[i].set;
      const T *top = sums + 4 * s * A;
      T *part = parts + 2 * i * A;
      for (long a = 0; a < 2 * A; ++a) part[a] = 0;
      for (int64_t r = items[i].begin; r < items[i].end; r += W) {
        const long n = min_of(W, items[i].end - r);
        to_lanes((const T *)g.x + r * h, h, n, h, xt, W);
        product<T, 1, 0, 1>(A, grad + s * A * h, h, 0, xt, W, h, dw, W);
        row_weights(g, r, n, top, top + A, w);
        for (long j = 0; j < n; ++j)
          for (long a = 0; a < A; ++a) {
            gl[(r + j) * A + a] = dw[a * W + j];
            part[a] += w[j * A + a] * dw[a * W + j];
            part[A + a] += w[j * A + a];
          }
      }
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
      T *w = base;
      const int64_t s = items[i].set;
      const T *top = sums + 4 * s * A, *mean = top + 2 * A;
      for (int64_t r = items[i].begin; r < items[i].end; r += W) {
        const long n = min_of(W, items[i].end - r);
        row_weights(g, r, n, top, top + A, w);
        for (long j = 0; j < n; ++j)
          for (long a = 0; a < A; ++a) gl[(r + j) * A + a] = w[j * A + a] * (gl[(r + j) * A + a] - mean[a]);
        product_wide<T, 0, 1>(n, w, A, 0, grad + s * A * h, h, A, gx + r * h, h, h);
      }
    }
  }
  free(items);
  shared_buffer.trim();
  return interrupt.status(failed);
}

}  // namespace

int segment_pool_forward(int dtype, const sne_fast_segment_pool_args &g, Interrupt &interrupt) {
  return dtype == SNE_FAST_F64 ? forward<double>(g, interrupt) : forward<float>(g, interrupt);
}
int segment_pool_backward(int dtype, const sne_fast_segment_pool_args &g, const sne_fast_segment_pool_grads &b,
                          Interrupt &interrupt) {
  return dtype == SNE_FAST_F64 ? backward<double>(g, b, interrupt) : backward<float>(g, b, interrupt);
}

}  // namespace sne::SNE_ISA
