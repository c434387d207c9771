// chunk_encode, backward: every tile is computed again with its activations kept in cache, then walked back.
//
// Every tile owns the gradients of its values and its sums per chunk. Parameter gradients are summed per slice, a fixed
// run of tiles, and slices are added in order, so that the bits do not depend on the number of threads.
#include <omp.h>

#include "cpu/chunk_encode_bf16_backward.h"
#include "cpu/chunk_encode_tile_backward.h"
#include "cpu/kernels.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer shared_buffer, slice_buffer, tile_buffer;

// Walks back the chunks order[first] .. order[last - 1] of the plan as one tile, or one by one where they would disturb
// each other.
template <class Encoder, class Work, class Back, class T = typename Encoder::Real>
void tile_backward(const Encoder &enc, Work &work, Back &back, SliceSums<T> &sums, const TilePlan &plan, int64_t first,
                   int64_t last, const T *grad, T *grad_values, T *chunk_sum) {
  work.tile.lay_out(plan, first, last, enc.chunk_ptr);
  encode_tile(enc, work, plan.tensor_of);
  bool apart = stayed_apart(enc, work);
  for (int64_t i = first; i < last && apart && last - first > 1; ++i)
    apart = all_finite(grad + plan.order[i] * enc.H * enc.h, enc.H * enc.h);
  if (!apart) {
    for (int64_t i = first; i < last; ++i)
      tile_backward(enc, work, back, sums, plan, i, i + 1, grad, grad_values, chunk_sum);
    return;
  }
  pool_backward(enc, work, back, sums, grad);
  attention_block_backward(enc, work, back, sums, 3);
  attention_block_backward(enc, work, back, sums, 2);
  codes_backward(enc, work, back, sums, chunk_sum);
  attention_block_backward(enc, work, back, sums, 1);
  scalar_block_backward(enc, work, back, sums, grad_values);
}

// Returns the number of slices: enough to keep many cores busy, few enough that their sums stay below about 64 MB, and
// of five tiles or more, as clearing and adding them would take noticeable time otherwise.
template <class T>
long number_of_slices(long tiles, long floats) {
  const long max_slices = max_of(8, min_of(64, (64L << 20) / (floats * long(sizeof(T)))));
  return max_of(1, min_of(max_slices, (tiles + 4) / 5));
}

template <class Encoder, class Back>
int backward(const sne_fast_chunk_encode_args &args, const TilePlan &plan, const sne_fast_chunk_encode_grads &grads,
             Interrupt &interrupt) {
  using T = typename Encoder::Real;
  constexpr long W = kLanes<T>;
  Encoder enc(args);
  const long h = enc.h, H = enc.H, N = args.num_chunks;
  SliceSums<T> layout;
  layout.place(nullptr, h, H, plan.longest);
  const long slices = number_of_slices<T>(plan.num_tiles, layout.count), count = layout.count;
  Scratch size;
  enc.take(size, true);
  size.take<T>(N * h);
  char *shared = shared_buffer.reserve(size.size());
  char *sums_at = slice_buffer.reserve(size_t(slices * count) * sizeof(T));
  if (!shared || !sums_at) return SNE_FAST_NO_MEMORY;
  Scratch shared_scratch(shared);
  enc.take(shared_scratch, true);
  T *chunk_sum = shared_scratch.take<T>(N * h), *sums_base = (T *)sums_at;
  enc.pack_weights(true);
  for (int64_t t = 0; t < N; ++t)
    if (args.chunk_ptr[t + 1] == args.chunk_ptr[t]) memset(chunk_sum + t * h, 0, size_t(h) * sizeof(T));

  int failed = 0;
  const int threads = int(max_of(1, min_of(args.num_threads, slices)));
#pragma omp parallel num_threads(threads)
  {
    const TileRegisters registers;
    typename Encoder::Work work;
    Back back;
    Scratch tile_size;
    work.take(tile_size, plan.slots, h, H, true);
    back.take(tile_size, plan.slots, h, H);
    char *base = tile_buffer.reserve(tile_size.size());
    if (base) {
      Scratch scratch(base);
      work.take(scratch, plan.slots, h, H, true);
      back.take(scratch, plan.slots, h, H);
    } else {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (long s = 0; s < slices; ++s) {
      if (!base || interrupt.stop()) continue;
      SliceSums<T> sums;
      sums.place(sums_base + s * count, h, H, plan.longest);
      memset(sums.begin, 0, size_t(count) * sizeof(T));
      const long end = plan.num_tiles * (s + 1) / slices;
      for (long i = plan.num_tiles * s / slices; i < end && !interrupt.stop(); ++i)
        tile_backward(enc, work, back, sums, plan, plan.first[i], plan.first[i + 1], (const T *)grads.grad,
                      (T *)grads.values, chunk_sum);
    }
    tile_buffer.trim();
    if (!failed && !interrupt.stopped()) {  // neither changes any more
      // Add all slices to slice 0, in order.
      const long step = 4096;
#pragma omp for schedule(static)
      for (long from = 0; from < count; from += step) {
        const long to = min_of(count, from + step);
        for (long s = 1; s < slices; ++s)
          for (long i = from; i < to; ++i) sums_base[i] += sums_base[s * count + i];
      }
      T *row_code = (T *)grads.row_code;
#pragma omp for schedule(static)
      for (long s = 0; s < args.num_tensors; ++s) {
        T *to = row_code + s * h;
        memset(to, 0, size_t(h) * sizeof(T));
        for (int64_t t = args.tensor_ptr[s]; t < args.tensor_ptr[s + 1]; ++t)
          for (long f = 0; f < h; f += W) store(to + f, load(to + f) + load(chunk_sum + t * h + f));
      }
    }
  }
  if (failed || interrupt.stopped()) return interrupt.status(failed);
  SliceSums<T> sums;
  sums.place(sums_base, h, H, plan.longest);
  memcpy(grads.w_qkv, sums.w_qkv, size_t(9 * h * h) * sizeof(T));
  memcpy((T *)grads.w_o + h * h, sums.w_o, size_t(3 * h * h) * sizeof(T));
  memcpy(grads.pool_query, sums.pool_query, size_t(H * h) * sizeof(T));
  memcpy(grads.element_code, sums.element_code, size_t(plan.longest * h) * sizeof(T));
  memset((T *)grads.element_code + plan.longest * h, 0, size_t((args.element_rows - plan.longest) * h) * sizeof(T));
  auto add_lanes = [](const T *lanes, long n, void *to) {
    for (long i = 0; i < n; ++i) ((T *)to)[i] = horizontal_sum<T>(load(lanes + i * W));
  };
  add_lanes(sums.b_qkv_lanes, 9 * h, grads.b_qkv);
  add_lanes(sums.b_o_lanes, 4 * h, grads.b_o);
  for (long row = 0; row < h; ++row)  // W_o of block 0 was applied to the generators and to ln0's bias
    for (long f = 0; f < h; f += W) {
      Vec<T> sum = enc.norms ? load(enc.norm_of(0, 1) + f) * ((const T *)grads.b_o)[row] : zero<T>();
      for (long k = 0; k < H + 2; ++k) sum += load(enc.generators + k * h + f) * sums.table[k * h + row];
      store((T *)grads.w_o + row * h + f, sum);
    }
  if (enc.norms) add_lanes(sums.norm_lanes, 16 * h, grads.norm);
  add_lanes(sums.basis_lanes, 3 * h, grads.basis);
  add_lanes(sums.logit_lanes, 2 * H, grads.logit);
  shared_buffer.trim();
  slice_buffer.trim();
  return SNE_FAST_OK;
}

}  // namespace

int chunk_encode_backward(int dtype, const sne_fast_chunk_encode_args &args, const TilePlan &plan,
                          const sne_fast_chunk_encode_grads &grads, Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? backward<Bf16Encoder, Bf16BackWork>(args, plan, grads, interrupt)
                                : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? backward<ChunkEncoder<double>, BackWork<double> >(args, plan, grads, interrupt)
                               : backward<ChunkEncoder<float>, BackWork<float> >(args, plan, grads, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
