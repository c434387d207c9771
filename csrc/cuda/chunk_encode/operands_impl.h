// Definitions of the templates in operands.h, for a translation unit to instantiate.
#pragma once

#include "cuda/chunk_encode/block_backward.h"
#include "cuda/chunk_encode/forward_launch.h"
#include "cuda/chunk_encode/operands.h"
#include "cuda/chunk_encode/scalar_backward.h"

namespace sne {

template <class Op>
int chunk_encode_by(const sne_fast_cuda_chunk_args &a, void *out, void *saved, Stream stream) {
  return with_heads(a.hidden, a.heads, [&](auto width, auto dim) {
    if constexpr (kHasChunkVariant<Op, width.value, dim.value>)
      return run_forward<Op, width.value, dim.value>(a, out, saved, stream);
    else
      return int(SNE_FAST_CUDA_BAD_VARIANT);
  });
}

template <class Op>
int chunk_block_backward_by(const sne_fast_cuda_chunk_args &a, const sne_fast_cuda_chunk_space &space, int block,
                            float *norm_part, Stream stream) {
  return with_heads(a.hidden, a.heads, [&](auto width, auto dim) {
    if constexpr (kHasChunkVariant<Op, width.value, dim.value>)
      return run_block_backward<Op, width.value, dim.value>(a, space_of(space), block, norm_part, stream);
    else
      return int(SNE_FAST_CUDA_BAD_VARIANT);
  });
}

template <class Op>
int chunk_scalar_backward_by(const sne_fast_cuda_chunk_args &a, const sne_fast_cuda_chunk_space &space,
                             const sne_fast_cuda_chunk_scalar_grads &grads, Stream stream) {
  return with_width(a.hidden, [&](auto width) {
    if constexpr (kHasChunkVariant<Op, width.value, width.value / 4>)
      return run_scalar_backward<Op, width.value>(a, space_of(space), grads, stream);
    else
      return int(SNE_FAST_CUDA_BAD_VARIANT);
  });
}

#define SNE_CHUNK_OPERANDS(Op)                                                                                       \
  template int chunk_encode_by<Op>(const sne_fast_cuda_chunk_args &, void *, void *, Stream);                        \
  template int chunk_block_backward_by<Op>(const sne_fast_cuda_chunk_args &, const sne_fast_cuda_chunk_space &, int, \
                                           float *, Stream);                                                         \
  template int chunk_scalar_backward_by<Op>(const sne_fast_cuda_chunk_args &, const sne_fast_cuda_chunk_space &,     \
                                            const sne_fast_cuda_chunk_scalar_grads &, Stream);

}  // namespace sne
