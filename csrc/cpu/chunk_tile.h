// A tile: several whole chunks, one behind the other in the row slots of feature-major panels.
//
// Activations are stored feature-major: element (feature f, slot s) of an (F, slots) buffer lies at
// (s / P) * F * P + f * P + s % P, where P = kPanel. Rows (the scalars of the chunks) are on vector lanes, so that
// norms, softmax and residuals need no horizontal sums, heads of any width cost the same, and nothing is transposed.
#pragma once

#include <stdint.h>

#include "cpu/product.h"
#include "cpu/tile_plan.h"
#include "sne_fast/cpu_abi.h"
#include "sne_fast/scratch.h"

namespace sne::SNE_ISA {

// A group of `vectors` (1 or 2) vectors of rows from `slot`, which attend to the slots lo..hi-1. It is `masked` where
// those belong to several chunks or lanes are unused; then `chunk_of` tells which pairs count.
struct RowGroup {
  int slot, vectors, lo, hi, masked;
};

struct TileChunk {
  int slot, n;
  int64_t id;
};

template <class T>
struct Tile {
  long slots = 0;   // R
  long used = 0;    // slots with a row in them
  long panels = 0;  // panels with a row in them
  int num_chunks = 0, num_groups = 0;
  TileChunk *chunks;  // (R)
  RowGroup *groups;   // (R / W)
  Int<T> *chunk_of;   // (R) number of the chunk within the tile, -1 in unused slots

  void take(Scratch &scratch, long R) {
    slots = R;
    chunks = scratch.take<TileChunk>(R);
    groups = scratch.take<RowGroup>(R / kLanes<T> + 1);
    chunk_of = scratch.take<Int<T>>(R);
  }

  // Lays out the chunks order[first] .. order[last - 1] of the plan.
  void lay_out(const TilePlan &plan, int64_t first, int64_t last, const int64_t *chunk_ptr) {
    constexpr int W = kLanes<T>;
    num_chunks = 0;
    int slot = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t id = plan.order[i];
      const int n = int(chunk_ptr[id + 1] - chunk_ptr[id]);
      for (int j = 0; j < n; ++j) chunk_of[slot + j] = num_chunks;
      chunks[num_chunks++] = {slot, n, id};
      slot += n;
    }
    used = slot;
    panels = (used + kPanel<T> - 1) / kPanel<T>;
    for (long s = used; s < panels * kPanel<T>; ++s) chunk_of[s] = -1;
    num_groups = 0;
    for (int s = 0; s < panels * kPanel<T>;) {
      if (s >= used) {  // padding only: attends to nothing
        groups[num_groups++] = {s, 1, 0, 0, 1};
        s += W;
        continue;
      }
      const TileChunk &chunk = chunks[chunk_of[s]];
      const int end = chunk.slot + chunk.n;
      if (s + W <= end) {
        const bool pair = s + 2 * W <= end && s % (2 * W) == 0;
        groups[num_groups++] = {s, pair ? 2 : 1, chunk.slot, end, 0};
        s += pair ? 2 * W : W;
        continue;
      }
      const TileChunk &behind = chunks[chunk_of[min_of(s + W, used) - 1]];
      groups[num_groups++] = {s, 1, chunk.slot, behind.slot + behind.n, 1};
      s += W;
    }
  }
};

// Returns the address of slot s in a feature-major buffer of F features.
template <class T>
SNE_INLINE T *at(T *buffer, long F, long s) {
  constexpr long P = kPanel<T>;
  return buffer + s / P * F * P + s % P;
}
template <class T>
SNE_INLINE const T *at(const T *buffer, long F, long s) {
  return at(const_cast<T *>(buffer), F, s);
}

// Calls body(j0, j1) for the parts of the slots lo..hi-1 that lie within one panel each.
template <class T, class Body>
SNE_INLINE void for_each_panel(long lo, long hi, Body body) {
  constexpr long P = kPanel<T>;
  for (long j = lo; j < hi;) {
    const long end = min_of(hi, (j / P + 1) * P);
    body(j, end);
    j = end;
  }
}

// Zeroes NV vectors of each of so many features of a panel.
template <class T, int NV>
SNE_INLINE void zero_features(T *to, long features) {
  for (long f = 0; f < features; ++f)
    for (int v = 0; v < NV; ++v) store(to + f * kPanel<T> + v * kLanes<T>, zero<T>());
}

// rows[s * F + f] = panel buffer (f, s) * w[f] + b[f], for the products that sum over rows. w may be null.
template <class T>
void rows_of(const T *buffer, long F, long panels, T *rows, const T *w = nullptr, const T *b = nullptr) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  for (long p = 0; p < panels; ++p)
    for (long f = 0; f < F; f += W)
      for (long l = 0; l < P; l += W) {
        const T *from = buffer + p * F * P + f * P + l;
        T *to = rows + (p * P + l) * F + f;
        Vec<T> r[W];
        if (w) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) r[i] = load(from + i * P) * w[f + i] + b[f + i];
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) r[i] = load(from + i * P);
        }
        transpose_registers<T>(r);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + i * F, r[i]);
      }
}

}  // namespace sne::SNE_ISA
