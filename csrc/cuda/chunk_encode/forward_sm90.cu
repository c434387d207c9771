// The forward of chunk_encode with Hopper's wgmma, compiled for sm_90a; on other GPUs it is never launched.
#include "cuda/chunk_encode/forward_launch.h"

namespace sne {
namespace {

template <class Op, class Shape, int kThreads>
SNE_KERNEL SNE_BOUNDS(kThreads, 1)
    chunk_encode_forward_wgmma(ChunkCall<typename Op::Storage> call, bool resident, bool layer_norm,
                               typename Op::Storage *out, typename Op::Storage *saved) {
#if defined(SNE_HAS_WGMMA)
  encode_chunks<Op, Shape>(call, resident, layer_norm, out, saved);
#else
  __trap();
#endif
}

}  // namespace

template <class Op>
int chunk_encode_by_wgmma(const sne_fast_cuda_chunk_args &a, void *out, void *saved, Stream stream) {
  return with_head_width(a.hidden / a.heads, [&](auto dim) {
    if constexpr (kHasChunkVariant<Op, kWgmmaWidth, dim.value>) {
      using Shape = ChunkShape<Op, kWgmmaWidth, dim.value, kPieces<Op, kWgmmaWidth>, true>;
      constexpr int kMaxWarps = forward_warps<Shape, Op::kPacked>();
      return run_forward_kernel<Op, Shape, kMaxWarps>(chunk_encode_forward_wgmma<Op, Shape, 32 * kMaxWarps>, a, out,
                                                      saved, stream);
    } else {
      return int(SNE_FAST_CUDA_BAD_VARIANT);
    }
  });
}

template int chunk_encode_by_wgmma<OpHalf>(const sne_fast_cuda_chunk_args &, void *, void *, Stream);
template int chunk_encode_by_wgmma<OpBfloat>(const sne_fast_cuda_chunk_args &, void *, void *, Stream);

}  // namespace sne
