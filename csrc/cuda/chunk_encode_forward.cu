// Entry of the forward of chunk_encode: see chunk_encode_forward.h.
#include "cuda/chunk_launch.h"

namespace sne {
namespace {

template <class Op, int width, int dim>
int run(const sne_fast_cuda_chunk_args &a, void *out, void *saved, Stream stream) {
  using T = typename Op::Storage;
  using Shape = ChunkShape<Op, width, dim>;
  constexpr int kMost = width <= 32 ? 12 : 8;  // 168 registers a thread, or 255
  const WeightLayout layout(width, dim);
  const int64_t piece = dim > Shape::kOutRows ? dim : Shape::kOutRows;
  const int64_t rows = layout.query_rows() > piece ? layout.query_rows() : piece;
  const LaunchSize size = launch_size(a.shared_limit, VectorLayout{width}.size() * 4, WarpMemory<Op, Shape>::kBytes,
                                      layout.forward_size() * sizeof(T), rows * width * sizeof(T),
                                      int(a.slots / Shape::ROWS), kMost, 8);
  if (!size.warps) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count * (a.slots / Shape::ROWS) + size.warps - 1) / size.warps;
  return launch(stream, tiles < a.programs ? tiles : a.programs, 1, 32 * size.warps, size.shared,
                chunk_encode_forward<Op, Shape, 32 * kMost>, call_of<T>(a), size.resident, bool(a.layer_norm),
                (T *)out, (T *)saved);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_chunk_encode(int precision, const sne_fast_cuda_chunk_args *a, void *out, void *saved,
                                          void *stream) {
  using namespace sne;
  if (!valid(*a) || !out == !saved) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return with_heads(precision, a->hidden, a->heads, [&](auto op, auto width, auto dim) {
    return run<decltype(op), width.value, dim.value>(*a, out, saved, (Stream)stream);
  });
}
