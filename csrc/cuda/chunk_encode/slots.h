// Bins of slots: which chunk stands in which row of a warp. Chunks are ordered by length. A bin of S slots holds one
// chunk or, of chunks of up to 16 elements, floor(S / n) chunks of the same length n. The table comes from
// sne_fast/backends/gpu_plans/chunks.py: where each length begins in the order (entries 0 to 257) and, behind those,
// the first bin of each length up to 16.
//
// Slots without an element are parked: zeros that attend to themselves, so that they stay finite.
#pragma once

#include "cuda/ptx/simt.h"

namespace sne {

constexpr int kMaxMultiLength = 16, kMultiStarts = 258;

// Chunks of min_length to max_length elements, in bins of `slots`.
struct BinClass {
  int slots, min_length, max_length, multi_chunk;
};

// The slot of one row of a warp. It attends to the slots key_begin .. key_end - 1 of its bin.
struct Slot {
  int64_t chunk;  // -1: parked
  int16_t element, key_begin, key_end, unused;
};

// The chunks of one bin: `count` chunks of the same length, from place `first` of the order on.
struct Chunks {
  int64_t first;
  int length, count;
};

SNE_DEVICE Chunks find_chunks(const int64_t *table, const int64_t *order, const int64_t *chunk_ptr, BinClass cls,
                              int64_t bin, int64_t bins) {
  const int lane = lane_id();
  Chunks out{0, 1, 0};
  if (cls.multi_chunk) {
    const int64_t start = table[kMultiStarts + lane % kMaxMultiLength];
    const uint32_t reached = ballot(lane < kMaxMultiLength && start <= bin);
    if (bin >= bins) return out;
    out.length = count_bits(reached);
    const int per_bin = cls.slots / out.length;
    out.first = table[out.length] + (bin - table[kMultiStarts + out.length - 1]) * per_bin;
    const int64_t left = table[out.length + 1] - out.first;
    out.count = int(left < per_bin ? left : per_bin);
  } else if (bin < bins) {
    out.first = table[cls.min_length] + bin;
    const int64_t end = table[cls.max_length + 1];
    if (out.first < end) {
      const int64_t chunk = order[out.first];
      out.length = int(chunk_ptr[chunk + 1] - chunk_ptr[chunk]);
      out.count = 1;
    }
  }
  return out;
}

// Returns slot `slot` of the bin that holds `chunks`.
SNE_DEVICE Slot slot_of(const Chunks &chunks, const int64_t *order, int slot) {
  const int group = slot / chunks.length;
  Slot out{-1, 0, int16_t(slot), int16_t(slot + 1), 0};
  if (group < chunks.count) {
    out.chunk = order[chunks.first + group];
    out.element = int16_t(slot - group * chunks.length);
    out.key_begin = int16_t(group * chunks.length);
    out.key_end = int16_t(out.key_begin + chunks.length);
  }
  return out;
}

}  // namespace sne
