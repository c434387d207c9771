// Definitions of the templates in operands.h, for a translation unit to instantiate.
#pragma once

#include "cuda/set_block/key_grad.h"
#include "cuda/set_block/operands.h"
#include "cuda/set_block/query_grad.h"

namespace sne::set_block {

// With SNE_REPRESENTATIVE (for tests of compilation) one head width stands for all.
template <int width, int dim>
constexpr bool kHasVariant = width <= 64
#if defined(SNE_REPRESENTATIVE)
                             && width == 4 * dim
#endif
    ;

template <class T>
Call<T> call_of(const sne_fast_cuda_set_block_args &a) {
  return {a.rows,
          bool(a.layer_norm),
          (const T *)a.x,
          a.ptr,
          a.owner,
          (const T *)a.w_q,
          (const T *)a.b_q,
          (const T *)a.w_k,
          (const T *)a.w_v,
          (const T *)a.b_v,
          (const T *)a.w_o,
          (const T *)a.b_o,
          (const T *)a.norm,
          (T *)a.out,
          (const T *)a.grad,
          (T *)a.factors,
          (T *)a.sum_grad,
          (QueryNumbers *)a.numbers,
          a.norm_part,
          (T *)a.x_grad};
}

// launch_kernel(shape, bytes of shared memory -> thread blocks) where there is such a variant.
template <class Run>
int with_shape(const sne_fast_cuda_set_block_args &a, Run run) {
  if (a.rows < 0 || a.heads < 1 || a.width % a.heads || a.multiprocessors < 1) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return with_heads(a.width, a.heads, [&](auto width, auto dim) {
    if constexpr (kHasVariant<width.value, dim.value>)
      return run(BlockShape<width.value, dim.value>{});
    else
      return int(SNE_FAST_CUDA_BAD_VARIANT);
  });
}

// Launches a kernel, with at most `blocks` thread blocks a multiprocessor.
template <class T, class Kernel>
int launch_tiles(const sne_fast_cuda_set_block_args &a, Kernel kernel, int64_t shared, int blocks, Stream stream) {
  if (shared > a.shared_limit) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, most = blocks * a.multiprocessors;
  return launch(stream, tiles < most ? tiles : most, 1, kThreads, size_t(shared), kernel, call_of<T>(a));
}

template <class Op>
int Kernels<Op>::query_grad(const sne_fast_cuda_set_block_args &a, Stream stream) {
  return with_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    return launch_tiles<typename Op::Storage>(a, set_block_query_grad<Op, Shape>, QueryGradPlaces<Op, Shape>::kBytes,
                                              kBackwardBlocks<Op>, stream);
  });
}

template <class Op>
int Kernels<Op>::key_grad(const sne_fast_cuda_set_block_args &a, Stream stream) {
  return with_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    return launch_tiles<typename Op::Storage>(a, set_block_key_grad<Op, Shape>, KeyGradPlaces<Op, Shape>::kBytes,
                                              kBackwardBlocks<Op>, stream);
  });
}

template <class Op>
int Kernels<Op>::forward(const sne_fast_cuda_set_block_args &a, Stream stream) {
  return with_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    return launch_tiles<typename Op::Storage>(a, set_block_forward<Op, Shape>, ForwardPlaces<Op, Shape>::kBytes,
                                              kForwardBlocks<Op, Shape>, stream);
  });
}

}  // namespace sne::set_block
