// Which chunk stands in which row of a warp. Chunks come ordered by length; a block of S slots holds one chunk, or, of
// chunks of up to 16, floor(32 / n) of one length n ("shared"). sne_fast/_plans/chunks.py makes the table: where each
// length begins in that order (entries 0 to 257) and, behind those, at which block each length up to 16.
//
// Rows without an element are parked: zeros that attend to themselves, so that they stay finite.
#pragma once

#include "cuda/ptx/simt.h"

namespace sne {

constexpr int kLongestShared = 16, kSharedStarts = 258;

struct SlotClass {
  int slots, lowest, shared;
};

// Of one row of a warp; keys are the slots of its block that it attends to.
struct Slot {
  int64_t chunk;  // -1: parked
  int16_t element, key_begin, key_end, unused;
};

// Chunks of one block: all of `length`, `count` of them from place `first` of the order on.
struct Chunks {
  int64_t first;
  int length, count;
};

SNE_DEVICE Chunks find_chunks(const int64_t *table, const int64_t *order, const int64_t *chunk_ptr, SlotClass cls,
                              int64_t block, int64_t blocks) {
  const int lane = lane_id();
  Chunks out{0, 1, 0};
  if (cls.shared) {
    const int64_t start = table[kSharedStarts + lane % kLongestShared];
    const uint32_t reached = ballot(lane < kLongestShared && start <= block);
    if (block >= blocks) return out;
    out.length = count_bits(reached);
    const int per_block = cls.slots / out.length;
    out.first = table[out.length] + (block - table[kSharedStarts + out.length - 1]) * per_block;
    const int64_t left = table[out.length + 1] - out.first;
    out.count = int(left < per_block ? left : per_block);
  } else if (block < blocks) {
    out.first = table[cls.lowest] + block;
    const int64_t end = table[cls.slots + 1];
    if (out.first < end) {
      const int64_t chunk = order[out.first];
      out.length = int(chunk_ptr[chunk + 1] - chunk_ptr[chunk]);
      out.count = 1;
    }
  }
  return out;
}

// Slot `slot` of the block that holds `chunks`.
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
