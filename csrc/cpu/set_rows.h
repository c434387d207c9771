// Moves rows of row-major tensors onto vector lanes and back; work items of the ragged ops.
#pragma once

#include <stdint.h>

#include "cpu/product.h"
#include "sne_fast/scratch.h"

namespace sne::SNE_ISA {

// Writes columns[f * L + r] = rows[r * stride + f] for r < count, and zeros up to L lanes. F and L must be multiples of
// kLanes.
template <class T>
void to_lanes(const T *rows, long stride, long count, long F, T *columns, long L) {
  constexpr int W = kLanes<T>;
  for (long r = 0; r < L; r += W) {
    if (r + W <= count) {
      for (long f = 0; f < F; f += W) transpose_square(rows + r * stride + f, stride, columns + f * L + r, L);
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

// The inverse of to_lanes, for the first count rows.
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

// A work item: rows begin..end-1 of set (or segment) `set`.
struct RowItem {
  int64_t set, begin, end;
};

// Cuts every set into work items of at most `max_rows` rows. Returns null if there is no memory; free() the result.
inline RowItem *cut_rows(int64_t sets, const int64_t *ptr, long max_rows, long *count) {
  long n = 0;
  for (int64_t s = 0; s < sets; ++s) n += (ptr[s + 1] - ptr[s] + max_rows - 1) / max_rows;
  RowItem *items = static_cast<RowItem *>(malloc(size_t(n + 1) * sizeof(RowItem)));
  *count = n;
  if (!items) return nullptr;
  n = 0;
  for (int64_t s = 0; s < sets; ++s)
    for (int64_t r = ptr[s]; r < ptr[s + 1]; r += max_rows)
      items[n++] = {s, r, r + max_rows < ptr[s + 1] ? r + max_rows : ptr[s + 1]};
  return items;
}

// Returns the number of items that a thread takes at a time: one where there are few, to spread large sets over
// threads.
inline int items_per_grab(long items, long threads) { return int(max_of(1, min_of(16, items / (threads * 32)))); }

}  // namespace sne::SNE_ISA
