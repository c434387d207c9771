// Writes the matrices of chunk_encode as the kernels read them: rounded to the operand type, as core matrices.
#include "cuda/chunk_encode/weights.h"

#include "cuda/dispatch.h"

namespace sne {
namespace {

template <class Op>
SNE_KERNEL SNE_BOUNDS(256, 4)
    prepare(const typename Op::Storage *w_qkv, const typename Op::Storage *w_o, const typename Op::Storage *query,
            typename Op::Storage *out, int width, int dim, int backward) {
  using T = typename Op::Storage;
  const WeightLayout at(width, dim);
  const int64_t h = width, d = dim, square = h * h, heads = at.heads(),
                all = at.forward_size() + backward * 13 * square;
  for (int64_t i = block_id() * num_threads() + thread_id(); i < all; i += num_blocks() * num_threads()) {
    const bool transposed = i >= at.forward_size();
    int64_t j = transposed ? i - at.forward_size() : i, to;
    T value;
    if (!transposed && j >= 13 * square) {  // pool
      const int64_t n = (j - 13 * square) / h, k = j % h;
      to = at.queries() + core_index<Op>(n, k, h);
      value = n < heads ? query[n * h + k] : from_float<T>(0);
    } else if (j < 4 * square) {  // fc_o
      const int64_t block = j / square, row = j / h % h, column = j % h;
      value = w_o[j];
      to = transposed ? at.out_transposed(block) + core_index<Op>(column, row, h)
                      : at.out(block) + core_index<Op>(row, column, h);
    } else {  // fc_q, fc_k, fc_v
      j -= 4 * square;
      const int64_t block = 1 + j / (3 * square), which = j / square % 3, row = j / h % h, column = j % h;
      const int64_t head = row / d, r = row % d;
      value = w_qkv[j];
      to = transposed ? at.qkv_transposed(block, head) + which * h * d + core_index<Op>(column, r, d)
                      : at.qkv(block, head) + core_index<Op>(which * d + r, column, h);
    }
    if constexpr (Op::kPacked)
      out[to] = value;
    else
      out[to] = operand_value<Op>(value);
  }
}

template <class Op>
int run(const sne_fast_chunk_weights_args &a, Stream stream) {
  using T = typename Op::Storage;
  return launch(stream, 256, 1, 256, 0, prepare<Op>, (const T *)a.w_qkv, (const T *)a.w_o, (const T *)a.pool_query,
                (T *)a.prepared, int(a.hidden), int(a.hidden / a.heads), int(a.backward));
}

}  // namespace
}  // namespace sne

extern "C" int64_t sne_fast_cuda_chunk_weights_size(int64_t hidden, int64_t heads) {
  return sne::WeightLayout(hidden, hidden / heads).size();
}

extern "C" int sne_fast_cuda_chunk_weights(int precision, const sne_fast_chunk_weights_args *a, void *stream) {
  using namespace sne;
  if (a->heads < 1 || a->hidden % a->heads || a->hidden % 32 || a->hidden / a->heads % 8)
    return SNE_FAST_CUDA_BAD_ARGUMENT;
  return with_operands(precision, [&](auto op) { return run<decltype(op)>(*a, (Stream)stream); });
}
