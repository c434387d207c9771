// Cuts ragged sets into pieces of 2^bits rows without a table, a prefix sum or a host synchronisation.
//
// Set s owns the piece numbers from (ptr[s] >> bits) + s up to, not including, (ptr[s + 1] >> bits) + s + 1. That is at
// least one number, always enough for its pieces, and at most one too many. There are (rows >> bits) + sets numbers in
// all, which the host knows.
#pragma once

#include "cuda/tiles/warp_search.h"

namespace sne {

struct SetPiece {
  int64_t set, index;  // the set, and the number of the piece among those of its set
  int64_t begin, end;  // first row of the piece and end of the set's rows; begin >= end where the piece is empty
};

SNE_DEVICE SetPiece find_piece(const int64_t *ptr, int64_t sets, int64_t piece, int bits) {
  SetPiece out;
  out.set = last_at_most(sets, piece, [=](int64_t set) { return (ptr[set] >> bits) + set; });
  const int64_t begin = ptr[out.set];
  out.index = piece - ((begin >> bits) + out.set);
  out.begin = begin + (out.index << bits);
  out.end = ptr[out.set + 1];
  return out;
}

}  // namespace sne
