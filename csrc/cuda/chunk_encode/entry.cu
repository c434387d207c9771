// Entry points of chunk_encode and of those parts of its backward that depend on the type of operands.
#include "cuda/chunk_encode/launch.h"
#include "cuda/chunk_encode/operands.h"

using namespace sne;

extern "C" int sne_fast_cuda_chunk_encode(int precision, const sne_fast_cuda_chunk_args *a, void *out, void *saved,
                                          void *stream) {
  if (!valid(*a) || !out == !saved) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return with_operands(precision,
                       [&](auto op) { return chunk_encode_by<decltype(op)>(*a, out, saved, (Stream)stream); });
}

extern "C" int sne_fast_cuda_chunk_block_backward(int precision, const sne_fast_cuda_chunk_args *a,
                                                  const sne_fast_cuda_chunk_space *space, int64_t block,
                                                  const sne_fast_cuda_chunk_block_grads *grads, void *stream) {
  if (!valid(*a) || block < 1 || block > 3) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (all_full(*a))
    return with_half_operands(precision, [&](auto op) {
      return FullBackward<decltype(op)>::block(*a, *space, int(block), *grads, (Stream)stream);
    });
  return with_operands(precision, [&](auto op) {
    return chunk_block_backward_by<decltype(op)>(*a, *space, int(block), (float *)grads->norm_part, (Stream)stream);
  });
}

extern "C" int sne_fast_cuda_chunk_scalar_backward(int precision, const sne_fast_cuda_chunk_args *a,
                                                   const sne_fast_cuda_chunk_space *space,
                                                   const sne_fast_cuda_chunk_scalar_grads *grads, void *stream) {
  if (!valid(*a) || a->heads > a->hidden / 8) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (all_full(*a))
    return with_half_operands(
        precision, [&](auto op) { return FullBackward<decltype(op)>::scalar(*a, *space, *grads, (Stream)stream); });
  return with_operands(
      precision, [&](auto op) { return chunk_scalar_backward_by<decltype(op)>(*a, *space, *grads, (Stream)stream); });
}
