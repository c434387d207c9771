// Moving rows of row-major tensors onto vector lanes and back, and the work items of the ragged ops.
#pragma once

#include <stdint.h>

#include "cpu/product.h"
#include "sne_fast/scratch.h"

namespace sne::SNE_ISA {

// columns[f * L + r] = rows[r * stride + f] for r < count, zero up to L lanes; F and L are multiples of kLanes.
template <class T>
void to_lanes(const T *rows, long stride, long count, long F, T *columns, long L) {
  constexpr int W = kLanes<T>;
  for (long r = 0; r < L; r += W) {
    if (r + W <= count) {
      for (long f = 0; f < F; f += W) transpose_block(rows + r * stride + f, stride, columns + f * L + r, L);
      continue;
    }
    const long real = max_of(0, count - r);
    for (long f = 0; f < F; f += W) {
      Vec<T> v[W];
      for (int i = 0; i < W; ++i) v[i] = i < real ? load(rows + (r + i) * stride + f) : zero<T>();
      transpose_registers<T>(v);
      for (int i = 0; i < W; ++i) store(columns + (f + i) * L + r, v[i]);
    }
  }
}

// The way back, for the first count rows.
template <class T>
void from_lanes(const T *columns, long L, long count, long F, T *rows, long stride) {
  constexpr int W = kLanes<T>;
  for (long r = 0; r < count; r += W) {
    const long real = min_of(W, count - r);
    for (long f = 0; f < F; f += W) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(columns + (f + i) * L + r);
      transpose_registers<T>(v);
      for (int i = 0; i < real; ++i) store(rows + (r + i) * stride + f, v[i]);
    }
  }
}

// Rows begin..end-1 of set (or segment) `set`.
struct RowItem {
  int64_t set, begin, end;
};

// Cuts every set into runs of at most `most` rows. Null if there is no memory; free() the result.
inline RowItem *cut_rows(int64_t sets, const int64_t *ptr, long most, long *count) {
  long n = 0;
  for (int64_t s = 0; s < sets; ++s) n += (ptr[s + 1] - ptr[s] + most - 1) / most;
  RowItem *items = static_cast<RowItem *>(malloc(size_t(n + 1) * sizeof(RowItem)));
  *count = n;
  if (!items) return nullptr;
  n = 0;
  for (int64_t s = 0; s < sets; ++s)
    for (int64_t r = ptr[s]; r < ptr[s + 1]; r += most)
      items[n++] = {s, r, r + most < ptr[s + 1] ? r + most : ptr[s + 1]};
  return items;
}

// Items handed out at a time: one where there are few, so that large sets spread over the threads.
inline int items_per_grab(long items, long threads) { return int(max_of(1, min_of(16, items / (threads * 32)))); }

}  // namespace sne::SNE_ISA
