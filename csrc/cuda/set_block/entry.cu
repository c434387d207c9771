// Entry points of set_block.
#include "cuda/dispatch.h"
#include "cuda/set_block/operands.h"

using namespace sne;

extern "C" int sne_fast_cuda_set_block(int precision, const sne_fast_cuda_set_block_args *args, void *stream) {
  return with_operands(precision,
                       [&](auto op) { return set_block::Kernels<decltype(op)>::forward(*args, (Stream)stream); });
}

extern "C" int sne_fast_cuda_set_block_query_grad(int precision, const sne_fast_cuda_set_block_args *args,
                                                  void *stream) {
  return with_operands(precision,
                       [&](auto op) { return set_block::Kernels<decltype(op)>::query_grad(*args, (Stream)stream); });
}

extern "C" int sne_fast_cuda_set_block_key_grad(int precision, const sne_fast_cuda_set_block_args *args, void *stream) {
  return with_operands(precision,
                       [&](auto op) { return set_block::Kernels<decltype(op)>::key_grad(*args, (Stream)stream); });
}
