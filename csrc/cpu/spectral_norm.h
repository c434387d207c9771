// Largest singular value of a tensor as a matrix, by Lanczos in double.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cpu/interrupt.h"
#include "sne_fast/scratch.h"

namespace sne::SNE_ISA {

constexpr long kLanes8 = 8;         // partial sums
constexpr long kExact = 64;         // rows or columns up to which there are as many steps
constexpr long kSteps = 256;        // at most
constexpr double kResidual = 3e-4;  // of the largest eigenvalue, whose relative error is of its square

inline long lanczos_steps(long rows) { return rows <= kExact ? rows : min_of(rows, kSteps); }

inline double total(const double *s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }

// A tensor as `blocks` matrices (rows, width) side by side: every kernel position, or one block of all columns.
template <class T>
struct Matrix {
  const T *x;
  long blocks, rows, width;
  double factor;  // of the values

  long columns() const { return blocks * width; }

  // y (rows) = A v, v (columns)
  void times(const double *v, double *y) const {
    for (long r = 0; r < rows; ++r) {
      double sum = 0;
      for (long b = 0; b < blocks; ++b) {
        const T *row = x + (b * rows + r) * width;
        const double *part = v + b * width;
        double s[kLanes8] = {};
        long i = 0;
        for (; i + kLanes8 <= width; i += kLanes8)
          for (long l = 0; l < kLanes8; ++l) s[l] += double(row[i + l]) * part[i + l];
        for (; i < width; ++i) s[i % kLanes8] += double(row[i]) * part[i];
        sum += total(s);
      }
      y[r] = sum * factor;
    }
  }

  // v (columns) = A^T y, y (rows)
  void transposed_times(const double *y, double *v) const {
    for (long i = 0; i < columns(); ++i) v[i] = 0;
    for (long b = 0; b < blocks; ++b)
      for (long r = 0; r < rows; ++r) {
        const T *row = x + (b * rows + r) * width;
        const double weight = y[r] * factor;
        double *part = v + b * width;
        for (long i = 0; i < width; ++i) part[i] += weight * double(row[i]);
      }
  }
};

// The number of eigenvalues above t of the symmetric tridiagonal matrix of a (n) and b (n - 1), by Sturm's sequence.
inline long eigenvalues_above(const double *a, const double *b, long n, double t) {
  long above = 0;
  double d = 1;
  for (long i = 0; i < n; ++i) {
    d = a[i] - t - (i ? b[i - 1] * b[i - 1] / d : 0);
    if (d == 0) d = 1e-300;
    above += d > 0;
  }
  return above;
}

// Largest eigenvalue of that matrix, which is positive semidefinite, to `relative`.
inline double largest_eigenvalue(const double *a, const double *b, long n, double relative) {
  double high = 0, low = 0;
  for (long i = 0; i < n; ++i) {  // Gershgorin
    const double radius = (i ? fabs(b[i - 1]) : 0) + (i + 1 < n ? fabs(b[i]) : 0);
    high = a[i] + radius > high ? a[i] + radius : high;
    low = a[i] > low ? a[i] : low;
  }
  for (int step = 0; step < 200 && high - low > relative * high; ++step) {
    const double middle = low + (high - low) / 2;
    (eigenvalues_above(a, b, n, middle) ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

// Size of the last entry of that eigenvector, over the size of the vector, by the recurrence from the last entry up.
inline double last_entry(const double *a, const double *b, long n, double value) {
  double after = 0, entry = 1, squares = 1;  // entries i + 1 and i
  for (long i = n - 1; i > 0; --i) {
    if (b[i - 1] == 0) break;
    const double before = ((value - a[i]) * entry - (i + 1 < n ? b[i] * after : 0)) / b[i - 1];
    after = entry;
    entry = before;
    squares += entry * entry;
    if (!(squares < 1e200)) return 0;
  }
  return 1 / sqrt(squares);
}

// Largest eigenvalue of A A^T, or of A^T A where that is smaller, by Lanczos with full reorthogonalisation from a fixed
// random vector. It is exact once there are as many steps as rows. `steps` vectors of the smaller side are at `basis`.
template <class T>
double largest_square(const Matrix<T> &m, long steps, double *basis, double *wide, double *a, double *b,
                      Interrupt &interrupt) {
  const bool by_rows = m.rows <= m.columns();
  const long n = by_rows ? m.rows : m.columns();
  uint64_t state = 0x9E3779B97F4A7C15u;
  double size = 0;
  for (long i = 0; i < n; ++i) {
    state += 0x9E3779B97F4A7C15u;
    uint64_t z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    basis[i] = double(int64_t(z ^ (z >> 31))) / 9.3e18;
    size += basis[i] * basis[i];
  }
  for (long i = 0; i < n; ++i) basis[i] /= sqrt(size);
  double value = 0;
  for (long j = 0; j < steps; ++j) {
    if (interrupt.stop()) return 0;
    const double *v = basis + j * n;
    double *w = basis + (j + 1) * n;
    if (by_rows) {
      m.transposed_times(v, wide);
      m.times(wide, w);
    } else {
      m.times(v, wide);
      m.transposed_times(wide, w);
    }
    a[j] = 0;
    for (long i = 0; i < n; ++i) a[j] += v[i] * w[i];
    for (int again = 0; again < 2; ++again)
      for (long k = 0; k <= j; ++k) {
        const double *u = basis + k * n;
        double dot = 0;
        for (long i = 0; i < n; ++i) dot += u[i] * w[i];
        for (long i = 0; i < n; ++i) w[i] -= dot * u[i];
      }
    double square = 0;
    for (long i = 0; i < n; ++i) square += w[i] * w[i];
    b[j] = sqrt(square);
    const bool last = j + 1 == steps || j + 1 == n;
    if (last || (j >= 7 && j % 4 == 3) || b[j] == 0) {
      value = largest_eigenvalue(a, b, j + 1, last ? 1e-14 : 1e-10);
      const bool all = j + 1 == n || b[j] <= 1e-14 * value;
      if (all || (n > kExact && b[j] * last_entry(a, b, j + 1, value) <= kResidual * value))
        return largest_eigenvalue(a, b, j + 1, 1e-14);
    }
    for (long i = 0; i < n; ++i) w[i] /= b[j];
  }
  return value;
}

}  // namespace sne::SNE_ISA
