// tensor_statistics: 23 numbers of every tensor, in double. A tensor is one work item, the largest first, so the bits
// do not depend on the number of threads. docs/method.md, The statistics channel, says what the numbers are.
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "cpu/kernels.h"
#include "cpu/spectral_norm.h"
#include "sne_fast/scratch.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer;

constexpr long kColumns = SNE_FAST_STATISTICS;
constexpr double kLeastRms = 1e-12, kLeastStd = 1e-6, kLeastMean = 1e-9;
constexpr double kLargestSkewness = 20, kLargestKurtosis = 200, kLargestQuantile = 12;
constexpr double kQuantiles[] = {0.1, 0.25, 0.5, 0.75, 0.9};  // besides the least and the largest value

double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// Calls add(lane, x) for all values of x, in eight lanes that compilers turn into vectors.
template <class T, class Add>
SNE_INLINE void lanes(const T *x, long n, Add add) {
  long i = 0;
  for (; i + kLanes8 <= n; i += kLanes8)
    for (long l = 0; l < kLanes8; ++l) add(l, double(x[i + l]));
  for (; i < n; ++i) add(i % kLanes8, double(x[i]));
}

template <class T>
void swap(T &a, T &b) {
  const T kept = a;
  a = b;
  b = kept;
}

template <class T>
void sift(T *x, long root, long n) {
  for (long child; (child = 2 * root + 1) < n; root = child) {
    if (child + 1 < n && x[child] < x[child + 1]) ++child;
    if (!(x[root] < x[child])) return;
    swap(x[root], x[child]);
  }
}

template <class T>
void heap_sort(T *x, long n) {
  for (long i = n / 2; i-- > 0;) sift(x, i, n);
  for (long i = n; i-- > 1;) {
    swap(x[0], x[i]);
    sift(x, 0, i);
  }
}

template <class T>
T median(T a, T b, T c) {
  return a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
}

// Puts the values of the ranks wanted[0..count), which ascend, where sorting would put them. Values must not be NaN.
template <class T>
void select(T *x, long low, long high, const long *wanted, long count, int depth) {
  while (count > 0 && high - low > 1) {
    if (high - low <= 24) {
      for (long i = low + 1; i < high; ++i) {
        const T moved = x[i];
        long j = i;
        for (; j > low && moved < x[j - 1]; --j) x[j] = x[j - 1];
        x[j] = moved;
      }
      return;
    }
    if (depth-- == 0) return heap_sort(x + low, high - low);
    const long middle = low + (high - low) / 2, eighth = (high - low) / 8;
    const T pivot = median(median(x[low], x[low + eighth], x[low + 2 * eighth]),
                           median(x[middle - eighth], x[middle], x[middle + eighth]),
                           median(x[high - 1 - 2 * eighth], x[high - 1 - eighth], x[high - 1]));
    long less = low, at = low, more = high;  // x[low:less] < pivot = x[less:at], x[more:high] > pivot
    while (at < more) {
      if (x[at] < pivot)
        swap(x[less++], x[at++]);
      else if (pivot < x[at])
        swap(x[at], x[--more]);
      else
        ++at;
    }
    long first = 0, last = count;
    while (first < count && wanted[first] < less) ++first;
    while (last > first && wanted[last - 1] >= more) --last;
    select(x, low, less, wanted, first, depth);
    wanted += last;
    count -= last;
    low = more;
  }
}

// Population standard deviation of x (n), by a second pass.
double deviation(const double *x, long n, double *mean) {
  double sum = 0, squares = 0;
  for (long i = 0; i < n; ++i) sum += x[i];
  *mean = sum / n;
  for (long i = 0; i < n; ++i) squares += (x[i] - *mean) * (x[i] - *mean);
  return sqrt(squares / n);
}

double spread(const double *norms, long n) {
  double mean = 0;
  const double std = deviation(norms, n, &mean);
  return std / (mean > kLeastMean ? mean : kLeastMean);
}

// Scratch of one tensor; the same calls learn its size.
template <class T>
struct Pieces {
  T *sorted;
  double *row_sum, *row_square, *column_sum, *column_square, *position_square, *basis, *wide, *a, *b;
  long steps;
  Pieces(Scratch &s, const int64_t *d) {
    const long rows = d[0], in = d[1], k = d[2], columns = in * k, small = min_of(rows, columns);
    sorted = s.take<T>(rows * max_of(in, 1) * k);
    steps = lanczos_steps(small);
    const long wide_ = max_of(rows, columns), basis_ = in ? (steps + 1) * small : 0;
    row_sum = s.take<double>(rows);
    row_square = s.take<double>(rows);
    column_sum = s.take<double>(in);
    column_square = s.take<double>(in);
    position_square = s.take<double>(k);
    basis = s.take<double>(basis_);
    wide = s.take<double>(in ? wide_ : 0);
    a = s.take<double>(steps + 1);
    b = s.take<double>(steps + 1);
  }
};

// Columns 16 to 22 of a tensor of two dimensions or more.
template <class T>
void units(const T *x, double factor, const int64_t *d, const Pieces<T> &p, double *to, Interrupt &interrupt) {
  const long rows = d[0], in = d[1], k = d[2], kernel_first = d[5];
  for (long i = 0; i < rows; ++i) p.row_sum[i] = p.row_square[i] = 0;
  for (long i = 0; i < in; ++i) p.column_sum[i] = p.column_square[i] = 0;
  for (long i = 0; i < k; ++i) p.position_square[i] = 0;
  const bool contiguous = kernel_first || k == 1;
  for (long b = 0; b < (contiguous ? k : 1); ++b)
    for (long r = 0; r < rows; ++r) {
      const T *row = x + (b * rows + r) * in * (contiguous ? 1 : k);
      if (contiguous) {
        double sum[kLanes8] = {}, square[kLanes8] = {};
        long i = 0;
        for (; i + kLanes8 <= in; i += kLanes8)
          for (long l = 0; l < kLanes8; ++l) {
            const double u = double(row[i + l]) * factor;
            sum[l] += u;
            square[l] += u * u;
            p.column_sum[i + l] += u;
            p.column_square[i + l] += u * u;
          }
        for (; i < in; ++i) {
          const double u = double(row[i]) * factor;
          sum[i % kLanes8] += u;
          square[i % kLanes8] += u * u;
          p.column_sum[i] += u;
          p.column_square[i] += u * u;
        }
        p.row_sum[r] += total(sum);
        p.row_square[r] += total(square);
        p.position_square[b] += total(square);
      } else {
        for (long i = 0; i < in; ++i) {
          double sum = 0, square = 0;
          for (long q = 0; q < k; ++q) {
            const double u = double(row[i * k + q]) * factor;
            sum += u;
            square += u * u;
            p.position_square[q] += u * u;
          }
          p.row_sum[r] += sum;
          p.row_square[r] += square;
          p.column_sum[i] += sum;
          p.column_square[i] += square;
        }
      }
    }
  double all = 0, largest = 0, inputs = 0, ignored = 0;
  for (long r = 0; r < rows; ++r) {
    all += p.row_square[r];
    p.row_square[r] = sqrt(p.row_square[r] / (in * k));
    p.row_sum[r] /= in * k;
    largest = p.row_square[r] > largest ? p.row_square[r] : largest;
  }
  for (long i = 0; i < in; ++i) {
    p.column_square[i] = sqrt(p.column_square[i] / (rows * k));
    p.column_sum[i] /= rows * k;
    inputs += p.column_sum[i] * p.column_sum[i];
  }
  for (long q = 0; q < k; ++q) p.position_square[q] = sqrt(p.position_square[q] / (double(rows) * in));
  to[16] = spread(p.row_square, rows);
  to[17] = spread(p.column_square, in);
  to[18] = deviation(p.row_sum, rows, &ignored);
  to[19] = sqrt(inputs / in);
  to[20] = 0;
  if (all > 0) {
    // Of norm 1, so that no fourth power of a value underflows.
    const Matrix<T> m{x, kernel_first ? k : 1, rows, kernel_first ? in : in * k, factor / sqrt(all)};
    const double square = largest_square(m, p.steps, p.basis, p.wide, p.a, p.b, interrupt);
    to[20] = log(square * min_of(rows, in * k)) / 2;
  }
  to[21] = largest;
  to[22] = spread(p.position_square, k);
}

template <class T>
void statistics(const T *x, long n, double scale, const int64_t *d, const Pieces<T> &p, double *to,
                Interrupt &interrupt) {
  double sums[kLanes8] = {}, squares[kLanes8] = {};
  lanes(x, n, [&](long l, double v) {
    sums[l] += v;
    squares[l] += v * v * (scale * scale);
  });
  double rms = sqrt(total(squares) / n);
  if (!(rms < HUGE_VAL)) {  // not finite, or NaN
    for (long i = 0; i < kColumns; ++i) to[i] = nan("");
    return;
  }
  rms = rms > kLeastRms ? rms : kLeastRms;
  const double factor = scale / rms, mean = total(sums) / n * factor;
  double second[kLanes8] = {}, third[kLanes8] = {}, fourth[kLanes8] = {};
  lanes(x, n, [&](long l, double v) {
    const double c = v * factor - mean, square = c * c;
    second[l] += square;
    third[l] += square * c;
    fourth[l] += square * square;
  });
  const double std = sqrt(total(second) / n), divisor = std > kLeastStd ? std : kLeastStd;
  to[0] = log(rms);
  to[1] = log(rms * sqrt(double(d[3])));
  to[2] = mean;
  to[3] = std;
  to[4] = clamp(total(third) / n / (divisor * divisor * divisor), -kLargestSkewness, kLargestSkewness);
  to[5] = log(clamp(total(fourth) / n / (divisor * divisor * divisor * divisor), 1, kLargestKurtosis));
  T least = x[0], largest = x[0];
  for (long i = 0; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    largest = largest < x[i] ? x[i] : largest;
    p.sorted[i] = x[i];
  }
  long wanted[10], count = 0;
  for (double q : kQuantiles) {
    const double at = q * double(n - 1);
    const long low = long(floor(at)), high = long(ceil(at));
    if (count == 0 || low > wanted[count - 1]) wanted[count++] = low;
    if (high > wanted[count - 1]) wanted[count++] = high;
  }
  int depth = 4;
  for (long size = n; size > 1; size /= 2) depth += 2;
  select(p.sorted, 0, n, wanted, count, depth);
  to[6] = clamp(double(least) * factor, -kLargestQuantile, kLargestQuantile);
  for (long i = 0; i < 5; ++i) {
    const double at = kQuantiles[i] * double(n - 1), low = double(p.sorted[long(floor(at))]) * factor;
    const double high = double(p.sorted[long(ceil(at))]) * factor;
    to[7 + i] = clamp(low + (high - low) * (at - floor(at)), -kLargestQuantile, kLargestQuantile);
  }
  to[12] = clamp(double(largest) * factor, -kLargestQuantile, kLargestQuantile);
  to[13] = log(double(n));
  to[14] = log(double(d[3]));
  to[15] = log(double(d[4]));
  for (long i = 16; i < kColumns; ++i) to[i] = 0;
  if (d[1]) units(x, factor, d, p, to, interrupt);
}

struct Item {
  int64_t tensor, size;
};

int largest_first(const void *one, const void *other) {
  const Item &a = *(const Item *)one, &b = *(const Item *)other;
  if (a.size != b.size) return a.size < b.size ? 1 : -1;
  return a.tensor < b.tensor ? -1 : a.tensor > b.tensor;
}

template <class T>
int run(const sne_fast_tensor_statistics_args &g, Interrupt &interrupt) {
  const long count = g.num_tensors;
  if (!count) return SNE_FAST_OK;
  Item *items = (Item *)malloc(size_t(count) * sizeof(Item));
  if (!items) return SNE_FAST_NO_MEMORY;
  for (long t = 0; t < count; ++t) items[t] = {t, g.start[t + 1] - g.start[t]};
  qsort(items, size_t(count), sizeof(Item), largest_first);
  const int threads = int(max_of(1, min_of(g.num_threads, min_of(count, g.num_values >> 12))));
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < count; ++i) {
      if (interrupt.stop()) continue;
      const int64_t t = items[i].tensor, *d = g.dims + 6 * t;
      Scratch size;
      Pieces<T> unused(size, d);
      char *memory = buffer.reserve(size.size());
      if (!memory) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      Scratch scratch(memory);
      const Pieces<T> pieces(scratch, d);
      double found[kColumns];
      statistics((const T *)g.values + g.start[t], items[i].size, g.scale[t], d, pieces, found, interrupt);
      for (long c = 0; c < kColumns; ++c) ((T *)g.out)[t * kColumns + c] = T(found[c]);
    }
    buffer.trim();
  }
  free(items);
  return interrupt.status(failed);
}

}  // namespace

int tensor_statistics(int dtype, const sne_fast_tensor_statistics_args &g, Interrupt &interrupt) {
  return dtype == SNE_FAST_F64 ? run<double>(g, interrupt) : run<float>(g, interrupt);
}

}  // namespace sne::SNE_ISA
