// Binary search by a warp, 32 places at a time, for tables that are too large to walk.
#pragma once

#include "cuda/ptx/simt.h"

namespace sne {

// Returns the last i of 0 .. count - 1 with key(i) <= value, where key never falls and key(0) <= value. All lanes of a
// warp call it together and get the same result. Every step waits for memory once, whatever the number of lanes.
template <class Key>
SNE_DEVICE int64_t last_at_most(int64_t count, int64_t value, const Key &key) {
  int64_t low = 0;
  for (int64_t size = count; size > 1;) {
    const int64_t step = (size + kWarp - 1) / kWarp, at = low + lane_id() * step, end = low + size;
    const int below = count_bits(ballot(at < end && key(at) <= value)) - 1;
    low += below * step;
    size = end - low < step ? end - low : step;
  }
  return low;
}

}  // namespace sne
