// The tile plan: which chunks share a tile of rows. It depends on the instruction set only by the vector width.
#pragma once

#include <stdint.h>

#include "sne_fast/cpu_abi.h"

namespace sne {

// Chunks of tile i: order[first[i]] .. order[first[i+1]-1], placed one behind the other in `slots` row slots.
struct TilePlan {
  long num_tiles = 0;
  long slots = 0;                // row slots of a tile, a multiple of the panel width
  long longest = 0;              // longest chunk
  int64_t *first = nullptr;      // (num_tiles + 1)
  int64_t *order = nullptr;      // (num_chunks), a permutation of the non-empty chunks
  int64_t *tensor_of = nullptr;  // (num_chunks) tensor a chunk belongs to
};

// Returns whether ptr (sets + 1) cuts `rows` rows into sets: it starts at 0, never decreases and ends at `rows`.
bool pointers_fit(int64_t sets, const int64_t *ptr, int64_t rows);

// Makes the plan and returns a sne_fast_status. The plan does not depend on the number of threads.
int make_tile_plan(const sne_fast_chunk_encode_args &args, long lanes, long panel, TilePlan *plan);
void free_tile_plan(TilePlan *plan);

}  // namespace sne
