// The matrices of chunk_encode as right operands: their places in one array of core matrices, which weights.cu fills
// before a pass.
#pragma once

#include "cuda/tiles/weights.h"

namespace sne {

// Offsets in elements. For the forward: fc_o of block 0; of blocks 1 to 3 the rows of fc_q, fc_k, fc_v head by head,
// then fc_o; the pool's queries, padded to 8. For the backward: the transposes of all fc_o, then those of q, k, v, head
// by head.
struct WeightLayout {
  int64_t h, d;
  SNE_HOST_DEVICE WeightLayout(int64_t width, int64_t dim) : h(width), d(dim) {}
  SNE_HOST_DEVICE int64_t heads() const { return h / d; }
  SNE_HOST_DEVICE int64_t query_rows() const { return heads() < 8 ? 8 : heads(); }
  SNE_HOST_DEVICE int64_t qkv(int64_t block, int64_t head) const {  // (3d, h)
    return h * h + (block - 1) * 4 * h * h + head * 3 * d * h;
  }
  SNE_HOST_DEVICE int64_t out(int64_t block) const {  // (h, h)
    return block ? qkv(block, 0) + 3 * h * h : 0;
  }
  SNE_HOST_DEVICE int64_t queries() const { return 13 * h * h; }  // (query_rows, h)
  SNE_HOST_DEVICE int64_t forward_size() const { return queries() + query_rows() * h; }
  SNE_HOST_DEVICE int64_t out_transposed(int64_t block) const { return forward_size() + block * h * h; }  // (h, h)
  SNE_HOST_DEVICE int64_t qkv_transposed(int64_t block, int64_t head) const {  // three of (h, d)
    return forward_size() + 4 * h * h + ((block - 1) * heads() + head) * 3 * h * d;
  }
  SNE_HOST_DEVICE int64_t size() const { return forward_size() + 13 * h * h; }
};

}  // namespace sne
