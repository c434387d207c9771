// gather_chunks: transposes, casts and scales many matrices into one array. It is bound by memory, so it is compiled
// once for all instruction sets.
#include "cpu/gather_chunks.h"

#include <omp.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "sne_fast/half.h"

namespace sne {
namespace {

// A piece of one matrix: its columns k0..k1-1, or the rows r0..r1-1 of a single column. The matrix starts at `offset`
// in the output.
struct Piece {
  int64_t matrix, k0, k1, r0, r1, offset;
};
constexpr int64_t kPiece = 1 << 16;  // elements

bool cut(const sne_fast_gather_chunks_args &a, std::vector<Piece> &pieces) {
  int64_t offset = 0;
  for (int64_t t = 0; t < a.num_matrices; ++t) {
    const int64_t R = a.shapes[2 * t], K = a.shapes[2 * t + 1];
    if (R < 0 || K < 0) return false;
    if (R == 0 || K == 0) continue;
    if (R > (a.num_values - offset) / K) return false;  // more elements than there are values left
    if (K == 1) {
      for (int64_t r = 0; r < R; r += kPiece) pieces.push_back({t, 0, 1, r, std::min(R, r + kPiece), offset});
    } else {
      const int64_t columns = std::max<int64_t>(16, kPiece / R);
      for (int64_t k = 0; k < K; k += columns) pieces.push_back({t, k, std::min(K, k + columns), 0, R, offset});
    }
    offset += R * K;
  }
  return offset == a.num_values;
}

// Calls visit(matrix index, value index) over a piece, in an order that keeps both sides in cache.
template <class Visit>
inline void walk(const Piece &p, int64_t R, int64_t K, Visit visit) {
  if (K == 1) {
    for (int64_t r = p.r0; r < p.r1; ++r) visit(r, p.offset + r);
    return;
  }
  for (int64_t k0 = p.k0; k0 < p.k1; k0 += 16)
    for (int64_t r0 = 0; r0 < R; r0 += 64) {
      const int64_t k1 = std::min(p.k1, k0 + 16), r1 = std::min(R, r0 + 64);
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t r = r0; r < r1; ++r) visit(r * K + k, p.offset + k * R + r);
    }
}

template <class T, class M>
void gather_piece(const sne_fast_gather_chunks_args &a, const Piece &p) {
  const int64_t R = a.shapes[2 * p.matrix], K = a.shapes[2 * p.matrix + 1];
  const M *from = (const M *)a.matrices[p.matrix];
  T *to = (T *)a.values;
  const T scale = T(a.scale[p.matrix]);
  if (scale == T(1))
    walk(p, R, K, [&](int64_t i, int64_t v) { to[v] = T(to_real(from[i])); });
  else
    walk(p, R, K, [&](int64_t i, int64_t v) { to[v] = T(to_real(from[i])) / scale; });
}

template <class T, class M>
void spread_piece(const sne_fast_gather_chunks_args &a, const Piece &p, double *sum) {
  const int64_t R = a.shapes[2 * p.matrix], K = a.shapes[2 * p.matrix + 1];
  M *to = (M *)a.matrices[p.matrix];
  const T *grad = (const T *)a.grad, *values = (const T *)a.values;
  const T scale = T(a.scale[p.matrix]);
  double dot = 0;
  walk(p, R, K, [&](int64_t i, int64_t v) {
    to[i] = M(grad[v] / scale);
    dot += double(grad[v]) * double(values[v]);
  });
  *sum = -dot / a.scale[p.matrix];
}

template <class T>
int gather(const sne_fast_gather_chunks_args &a, Interrupt &interrupt) {
  std::vector<Piece> pieces;
  if (!cut(a, pieces)) return SNE_FAST_BAD_ARGUMENT;
  for (int64_t t = 0; t < a.num_matrices; ++t)
    if (a.dtypes[t] < SNE_FAST_F32 || a.dtypes[t] > SNE_FAST_BF16) return SNE_FAST_BAD_DTYPE;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(a.num_threads, a.num_values >> 15)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < int64_t(pieces.size()); ++i) {
    if (interrupt.stop()) continue;
    const Piece &p = pieces[i];
    switch (a.dtypes[p.matrix]) {
      case SNE_FAST_F32: gather_piece<T, float>(a, p); break;
      case SNE_FAST_F64: gather_piece<T, double>(a, p); break;
      case SNE_FAST_F16: gather_piece<T, Half>(a, p); break;
      default: gather_piece<T, BFloat>(a, p); break;
    }
  }
  return interrupt.status(false);
}

template <class T>
int spread(const sne_fast_gather_chunks_args &a, Interrupt &interrupt) {
  std::vector<Piece> pieces;
  if (!cut(a, pieces)) return SNE_FAST_BAD_ARGUMENT;
  for (int64_t t = 0; t < a.num_matrices; ++t)
    if (a.dtypes[t] != SNE_FAST_F32 && a.dtypes[t] != SNE_FAST_F64) return SNE_FAST_BAD_DTYPE;
  std::vector<double> sums(pieces.size());
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(a.num_threads, a.num_values >> 15)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < int64_t(pieces.size()); ++i) {
    if (interrupt.stop()) continue;
    const Piece &p = pieces[i];
    if (a.dtypes[p.matrix] == SNE_FAST_F32)
      spread_piece<T, float>(a, p, &sums[i]);
    else
      spread_piece<T, double>(a, p, &sums[i]);
  }
  std::fill(a.scale_grad, a.scale_grad + a.num_matrices, 0.0);
  for (size_t i = 0; i < pieces.size(); ++i) a.scale_grad[pieces[i].matrix] += sums[i];
  return interrupt.status(false);
}

}  // namespace

int gather_chunks(int dtype, const sne_fast_gather_chunks_args &a, Interrupt &interrupt) {
  return dtype == SNE_FAST_F64 ? gather<double>(a, interrupt) : gather<float>(a, interrupt);
}
int gather_chunks_backward(int dtype, const sne_fast_gather_chunks_args &a, Interrupt &interrupt) {
  return dtype == SNE_FAST_F64 ? spread<double>(a, interrupt) : spread<float>(a, interrupt);
}

}  // namespace sne
