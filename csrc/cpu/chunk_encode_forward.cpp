// chunk_encode, forward: tiles are independent, and each writes the pooled rows of its own chunks.
#include <omp.h>

#include "cpu/chunk_encode_bf16.h"
#include "cpu/chunk_encode_tile.h"
#include "cpu/kernels.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer shared_buffer, tile_buffer;

// Encodes the chunks order[first] .. order[last - 1] of the plan as one tile, or one by one where they disturb each
// other.
template <class Encoder, class Work>
void encode(const Encoder &enc, Work &work, const TilePlan &plan, int64_t first, int64_t last,
            typename Encoder::Real *out) {
  using T = typename Encoder::Real;
  const long h = enc.h, H = enc.H;
  work.tile.lay_out(plan, first, last, enc.chunk_ptr);
  encode_tile(enc, work, plan.tensor_of);
  if (!stayed_apart(enc, work)) {
    for (int64_t i = first; i < last; ++i) encode(enc, work, plan, i, i + 1, out);
    return;
  }
  for (int c = 0; c < work.tile.num_chunks; ++c) {
    const TileChunk &chunk = work.tile.chunks[c];
    product_wide<T, 0, 1>(H, work.weight + chunk.slot, work.tile.slots, 1, work.rows + chunk.slot * h, h, chunk.n,
                          out + chunk.id * H * h, h, h);
  }
}

template <class Encoder>
int forward(const sne_fast_chunk_encode_args &args, const TilePlan &plan, void *result, Interrupt &interrupt) {
  using T = typename Encoder::Real;
  T *out = (T *)result;
  Encoder enc(args);
  const long h = enc.h, H = enc.H;
  if (!shared_buffer.lay_out(enc, false)) return SNE_FAST_NO_MEMORY;
  enc.pack_weights(false);
  for (int64_t t = 0; t < args.num_chunks; ++t)  // empty chunks are in no tile
    if (args.chunk_ptr[t + 1] == args.chunk_ptr[t]) memset(out + t * H * h, 0, size_t(H * h) * sizeof(T));

  int failed = 0;
  const int threads = int(max_of(1, min_of(args.num_threads, plan.num_tiles)));
#pragma omp parallel num_threads(threads)
  {
    const TileRegisters registers;
    typename Encoder::Work work;
    char *base = tile_buffer.lay_out(work, plan.slots, h, H, false);
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < plan.num_tiles; ++i) {
      if (!base || interrupt.stop()) continue;
      encode(enc, work, plan, plan.first[i], plan.first[i + 1], out);
    }
    tile_buffer.trim();
  }
  return interrupt.status(failed);
}

}  // namespace

int chunk_encode_forward(int dtype, const sne_fast_chunk_encode_args &args, const TilePlan &plan, void *out,
                         Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? forward<Bf16Encoder>(args, plan, out, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? forward<ChunkEncoder<double> >(args, plan, out, interrupt)
                               : forward<ChunkEncoder<float> >(args, plan, out, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
