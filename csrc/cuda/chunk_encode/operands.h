// Kernels of chunk_encode by type of operands, each type in a translation unit of its own (operands_*.cu), as together
// they would compile for minutes on one core. Forward kernels with Hopper's matrix instruction have another translation
// unit (forward_sm90.cu), compiled for that architecture alone.
#pragma once

#include "cuda/ptx/simt.h"
#include "sne_fast/cuda_abi.h"

namespace sne {

// Rows of 256 floats do not fit into registers. With SNE_REPRESENTATIVE (for tests of compilation) one head width
// stands for all.
template <class Op, int width, int dim>
constexpr bool kHasChunkVariant =
#if defined(SNE_REPRESENTATIVE)
    width <= 128 && width == 4 * dim;
#else
    Op::kPacked || width <= 128;
#endif

template <class Op>
int chunk_encode_by(const sne_fast_cuda_chunk_args &args, void *out, void *saved, Stream stream);

constexpr int kWgmmaWidth = 64;
template <class Op>  // half or bfloat
int chunk_encode_by_wgmma(const sne_fast_cuda_chunk_args &args, void *out, void *saved, Stream stream);

template <class Op>
int chunk_block_backward_by(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space, int block,
                            float *norm_part, Stream stream);
// Backward of launches of bins that one chunk fills, with 16-bit operands. The parts with matrices leave their
// gradients too.
template <class Op>  // half or bfloat
struct FullBackward {
  static int pool(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space, const void *grad,
                  float *query_part, Stream stream);
  static int block(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space, int block,
                   const sne_fast_cuda_chunk_block_grads &grads, Stream stream);
  static int codes(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space, int64_t codes,
                   float *chunk_grad, float *element_part, Stream stream);
  static int scalar(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space,
                    const sne_fast_cuda_chunk_scalar_grads &grads, Stream stream);
};

template <class Op>
int chunk_scalar_backward_by(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space,
                             const sne_fast_cuda_chunk_scalar_grads &grads, Stream stream);

}  // namespace sne
