// The kernels of chunk_encode by type of operands, each type in a translation unit of its own
// (chunk_operands_{float,tf32,half,bfloat}.cu): together they would compile for minutes on one core.
#pragma once

#include "cuda/simt.h"
#include "sne_fast/cuda_abi.h"

namespace sne {

template <class Op>
int chunk_encode_by(const sne_fast_cuda_chunk_args &args, void *out, void *saved, Stream stream);
template <class Op>
int chunk_block_backward_by(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space, int block,
                            float *norm_part, Stream stream);
template <class Op>
int chunk_scalar_backward_by(const sne_fast_cuda_chunk_args &args, const sne_fast_cuda_chunk_space &space,
                             const sne_fast_cuda_chunk_scalar_grads &grads, Stream stream);

}  // namespace sne
