// What the kernels of chunk_encode are called with, and how their warps find their bins and save their rows.
#pragma once

#include "cuda/chunk_encode/attention.h"
#include "sne_fast/cuda_abi.h"

namespace sne {

// Arguments of all kernels of chunk_encode, as device pointers of the right type.
template <class T>
struct ChunkCall {
  const int64_t *chunk_ptr, *order, *owner, *table;
  const T *values, *row_code, *element_code, *logit, *basis, *b_qkv, *b_o, *norm, *pool_query, *prepared;
  BinClass cls;
  int64_t bins;       // of this class
  int64_t first_bin;  // where this launch begins
  int64_t count;      // bins of this launch; the last ones may be empty
};

// Of a launch whose bins hold one chunk each: how many bins have one, and where in the order the first of these chunks
// is.
struct FilledBins {
  int64_t first, count;
};

template <class T>
SNE_DEVICE FilledBins filled_bins(const ChunkCall<T> &call) {
  const int64_t first = call.table[call.cls.min_length] + call.first_bin;
  const int64_t left = call.table[call.cls.max_length + 1] - first;
  return {first, left < call.count ? left : call.count};
}

template <class Shape, class Memory, class T>
SNE_DEVICE void load_slots(const Memory &memory, const ChunkCall<T> &call, const Chunks &chunks, int part) {
  const int row = lane_id();
  if (row < Shape::ROWS) {
    const Slot slot = slot_of(chunks, call.order, part * Shape::ROWS + row);
    memory.slots[row] = slot;
    memory.values[row] = slot.chunk < 0 ? 0.0f : to_real(call.values[call.chunk_ptr[slot.chunk] + slot.element]);
  }
}

// Returns the chunks in bin `local` of the launch, none if there is no such bin. All lanes of the warp call it
// together.
template <class T>
SNE_DEVICE Chunks chunks_of_bin(const ChunkCall<T> &call, int64_t local) {
  return find_chunks(call.table, call.order, call.chunk_ptr, call.cls, call.first_bin + local,
                     local < call.count ? call.bins : 0);
}

// The same, and loads the bin's slots and values into shared memory, for all warps of the set.
template <class Shape, class Memory, class T>
SNE_DEVICE Chunks load_bin(const Memory &memory, const ChunkCall<T> &call, const SetOfWarps &set, int64_t local) {
  const Chunks chunks = chunks_of_bin(call, local);
  load_slots<Shape>(memory, call, chunks, set.part);
  set.sync();
  return chunks;
}

template <class Op, class Shape>
SNE_DEVICE void save_rows(typename Op::Storage *to, const Rows16<Op> (&x)[Shape::MT][Shape::KT]) {
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int k = 0; k < Shape::KT; ++k) store_rows16(to + int64_t(16 * i) * Shape::W + 16 * k, Shape::W, x[i][k]);
  }
}

}  // namespace sne
