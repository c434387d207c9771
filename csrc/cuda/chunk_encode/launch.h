// Chooses how many warps a kernel of chunk_encode gets, and whether its weights stay in shared memory.
#pragma once

#include "cuda/chunk_encode/forward.h"
#include "cuda/dispatch.h"

namespace sne {

template <class T>
ChunkCall<T> call_of(const sne_fast_cuda_chunk_args &a) {
  return {a.chunk_ptr,
          a.order,
          a.owner,
          a.table,
          (const T *)a.values,
          (const T *)a.row_code,
          (const T *)a.element_code,
          (const T *)a.logit,
          (const T *)a.basis,
          (const T *)a.b_qkv,
          (const T *)a.b_o,
          (const T *)a.norm,
          (const T *)a.pool_query,
          (const T *)a.prepared,
          {int(a.slots), int(a.min_length), int(a.max_length), int(a.multi_chunk)},
          a.bins,
          a.first_bin,
          a.count};
}

inline bool valid(const sne_fast_cuda_chunk_args &a) {
  const bool slots = a.slots == 32 || a.slots == 64 || a.slots == 128;
  const bool lengths = 0 < a.min_length && a.min_length <= a.max_length && a.max_length <= a.slots;
  return slots && lengths && a.heads > 0 && a.hidden % a.heads == 0 && a.count >= 0 && a.first_bin >= 0 &&
         a.multiprocessors > 0;
}

// Returns whether one chunk fills each bin of a launch: no chunk of fewer elements is in its class.
inline bool all_full(const sne_fast_cuda_chunk_args &a) {
  return a.slots == kFullLength && a.min_length == kFullLength;
}

struct LaunchSize {
  int warps;  // 0: does not fit
  bool resident;
  int64_t shared;
};

// Returns as many warps as fit beside the vectors and the weights, a multiple of those of one bin.
inline LaunchSize launch_size(int64_t limit, int64_t vectors, int64_t per_warp, int64_t all_weights, int64_t one_piece,
                              int warps_of_set, int max_warps, int enough_warps) {
  for (const bool resident : {true, false}) {
    const int64_t weights = resident ? all_weights : one_piece;
    int64_t warps = (limit - vectors - weights) / per_warp;
    if (warps > max_warps) warps = max_warps;
    warps -= warps % warps_of_set;
    // Weights that leave room for few warps are better read anew for every tile.
    if (warps > 0 && (!resident || warps >= enough_warps || warps == max_warps))
      return {int(warps), resident, vectors + weights + warps * per_warp};
  }
  return {0, false, 0};
}

}  // namespace sne
