// Cutting ragged sets into pieces of 2^bits rows without a table, a prefix sum or a host synchronisation.
//
// Set s owns the slots (ptr[s] >> bits) + s up to, not including, (ptr[s + 1] >> bits) + s + 1: always enough for its
// pieces, at most one more, and at least one. There are (rows >> bits) + sets in all, which the host knows.
#pragma once

#include "cuda/tiles/warp_search.h"

namespace sne {

struct SetSlot {
  int64_t set, index;  // of the slot among those of its set
  int64_t begin, end;  // its first row, and the end of the set's rows: begin >= end where it holds none
};

SNE_DEVICE SetSlot find_slot(const int64_t *ptr, int64_t sets, int64_t slot, int bits) {
  SetSlot out;
  out.set = last_at_most(sets, slot, [=](int64_t set) { return (ptr[set] >> bits) + set; });
  const int64_t begin = ptr[out.set];
  out.index = slot - ((begin >> bits) + out.set);
  out.begin = begin + (out.index << bits);
  out.end = ptr[out.set + 1];
  return out;
}

}  // namespace sne
