// Definitions of the templates in operands.h for bins that one chunk fills, for a translation unit to instantiate.
#pragma once

#include "cuda/chunk_encode/full_block_backward.h"
#include "cuda/chunk_encode/full_pool_backward.h"
#include "cuda/chunk_encode/full_scalar_backward.h"

namespace sne {

// run(Constant<width>{}, Constant<width of a head>{}) where there are such kernels.
template <class Op, class Run>
int with_full_backward(const sne_fast_cuda_chunk_args &a, Run run) {
  return with_heads(a.hidden, a.heads, [&](auto width, auto dim) {
    if constexpr (kHasFullBackward<Op, ChunkShape<Op, width.value, dim.value>>)
      return run(width, dim);
    else
      return int(SNE_FAST_CUDA_BAD_VARIANT);
  });
}

template <class Op>
int FullBackward<Op>::pool(const sne_fast_cuda_chunk_args &a, const sne_fast_cuda_chunk_space &space, const void *grad,
                           float *query_part, Stream stream) {
  return with_full_backward<Op>(a, [&](auto width, auto dim) {
    return run_full_pool_backward<Op, width.value, dim.value>(a, space_of(space), grad, query_part, stream);
  });
}
template <class Op>
int FullBackward<Op>::block(const sne_fast_cuda_chunk_args &a, const sne_fast_cuda_chunk_space &space, int block,
                            const sne_fast_cuda_chunk_block_grads &grads, Stream stream) {
  return with_full_backward<Op>(a, [&](auto width, auto dim) {
    return run_full_block_backward<Op, width.value, dim.value>(a, space_of(space), block, grads, stream);
  });
}
template <class Op>
int FullBackward<Op>::codes(const sne_fast_cuda_chunk_args &a, const sne_fast_cuda_chunk_space &space, int64_t codes,
                            float *chunk_grad, float *element_part, Stream stream) {
  return with_full_backward<Op>(a, [&](auto width, auto) {
    return run_full_codes_backward<Op, width.value>(a, space_of(space), codes, chunk_grad, element_part, stream);
  });
}
template <class Op>
int FullBackward<Op>::scalar(const sne_fast_cuda_chunk_args &a, const sne_fast_cuda_chunk_space &space,
                             const sne_fast_cuda_chunk_scalar_grads &grads, Stream stream) {
  return with_full_backward<Op>(a, [&](auto width, auto dim) {
    return run_full_scalar_backward<Op, width.value, dim.value>(a, space_of(space), grads, stream);
  });
}

}  // namespace sne
