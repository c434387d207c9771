// Launches the forward of chunk_encode: chooses the kernel and the number of warps.
#pragma once

#include "cuda/chunk_encode/launch.h"
#include "cuda/chunk_encode/operands.h"

namespace sne {
namespace {

template <class Op, class Shape, int kMaxWarps, class Kernel>
int run_forward_kernel(Kernel kernel, const sne_fast_cuda_chunk_args &a, void *out, void *saved, Stream stream) {
  using T = typename Op::Storage;
  const WeightLayout layout(Shape::W, Shape::D);
  constexpr bool kFull = kHasFullBins<Op, Shape>;
  int64_t rows = Shape::kTogether || kFull ? 3 * Shape::D : Shape::D;  // of the largest piece of the weights
  if (kFull && rows < Shape::W) rows = Shape::W;
  for (const int64_t other : {int64_t(Shape::kOutRows), layout.query_rows()}) rows = other > rows ? other : rows;
  const int of_set = int(a.slots / Shape::ROWS);
  const LaunchSize size = launch_size(a.shared_limit, forward_vectors<Op, Shape>() * 4, WarpMemory<Op, Shape>::kBytes,
                                      layout.forward_size() * sizeof(T), rows * Shape::W * sizeof(T),
                                      Shape::kWarpgroup && of_set < 4 ? 4 : of_set, kMaxWarps, 8);
  if (!size.warps) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count * of_set + size.warps - 1) / size.warps;
  return launch(stream, tiles < a.multiprocessors ? tiles : a.multiprocessors, 1, 32 * size.warps, size.shared, kernel,
                call_of<T>(a), size.resident, bool(a.layer_norm), (T *)out, (T *)saved);
}

template <class Op, int width, int dim>
int run_forward(const sne_fast_cuda_chunk_args &a, void *out, void *saved, Stream stream) {
  if constexpr (Op::kPacked && width == kWgmmaWidth)
    if (a.wgmma) return chunk_encode_by_wgmma<Op>(a, out, saved, stream);
  using Shape = ChunkShape<Op, width, dim>;
  constexpr int kMaxWarps = forward_warps<Shape, Op::kPacked>();
  return run_forward_kernel<Op, Shape, kMaxWarps>(chunk_encode_forward<Op, Shape, 32 * kMaxWarps>, a, out, saved,
                                                  stream);
}

}  // namespace
}  // namespace sne
