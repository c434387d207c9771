// Kernels of set_block by type of operands, each type in a translation unit of its own (operands_*.cu).
#pragma once

#include "cuda/ptx/simt.h"
#include "sne_fast/cuda_abi.h"

namespace sne::set_block {

template <class Op>
struct Kernels {
  static int forward(const sne_fast_cuda_set_block_args &args, Stream stream);
  static int query_grad(const sne_fast_cuda_set_block_args &args, Stream stream);
  static int key_grad(const sne_fast_cuda_set_block_args &args, Stream stream);
};

}  // namespace sne::set_block
