// Backward of the pooling of chunk_encode for full bins.
#pragma once

#include "cuda/chunk_encode/full_backward.h"

namespace sne {
namespace {

// Shared memory of a warp, as offsets in bytes: rows, the gradient of its chunk's result (8, h) as core matrices, and
// what warps tell each other about the softmax: of each head the largest logit, the sum of weights and that of weights
// times their gradients.
template <class Shape>
struct PoolPlaces {
  static constexpr int kGrads = Shape::KT * kPieceBytes, kTops = kGrads + 16 * Shape::W, kTotals = kTops + 32;
  static constexpr int kBytes = kTotals + 64;
};

// grad (N, H, h) -> rows_grad; query_part (SNE_FAST_CUDA_POOL_BLOCKS * multiprocessors, H, h).
template <class Op, class Shape>
SNE_KERNEL SNE_BOUNDS(32 * kFullWarps, 2)
    chunk_full_pool_backward(ChunkCall<typename Op::Storage> call, const typename Op::Storage *grad,
                             const typename Op::Storage *rows, typename Op::Storage *rows_grad, float *query_part) {
  using T = typename Op::Storage;
  using At = PoolPlaces<Shape>;
  constexpr int W = Shape::W, KT = Shape::KT, NT = Shape::NT, H = Shape::HEADS;
  const WeightLayout layout(W, Shape::D);
  unsigned char *memory = (unsigned char *)shared_memory(), *weights_at = memory + kFullWarps * At::kBytes;
  unsigned char *own = memory + warp_id() * At::kBytes;
  const WeightSource<Op> weights{call.prepared, weights_at, true, layout.queries()};
  weights.copy(layout.queries(), 8 * W);
  const SetOfWarps set = set_of_warps(call.cls, 16);
  const int to_other = set.part ? -At::kBytes : At::kBytes;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  float *tops = (float *)(own + At::kTops), *totals = (float *)(own + At::kTotals);
  const float *other_tops = (const float *)(own + to_other + At::kTops);
  const float *other_totals = (const float *)(own + to_other + At::kTotals);
  Tile query_sums[NT] = {};
  const int64_t per_step = kFullBinsAtOnce;
  const FilledBins bins = filled_bins(call);
  for (int64_t step = block_id(); step * per_step < bins.count; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / 2, place = (local * kFullLength + set.part * 16) * W;
    const bool there = local < bins.count;
    const T *pulled = grad + (there ? call.order[bins.first + local] : 0) * H * W + g * W + 2 * t;
    Rows16<Op> x[1][KT];
    load_pieces<Op>(x[0], rows + place, there);
    put_pieces<Op>(own, x[0]);
    Tile logits[1][1] = {}, slopes{};  // heads 2 t and 2 t + 1
    multiply<false>(logits, x, weights.piece(layout.queries(), 8 * W));
    SNE_UNROLL
    for (int k = 0; k < KT; k += 2) {
      uint32_t pairs[4];
      SNE_UNROLL
      for (int i = 0; i < 4; ++i) pairs[i] = there && g < H ? *(const uint32_t *)(pulled + 16 * k + 8 * i) : 0;
      product(slopes, x[0][k], Cols8<Op>{{pairs[0], pairs[1]}});
      product(slopes, x[0][k + 1], Cols8<Op>{{pairs[2], pairs[3]}});
      store_matrices(own + At::kGrads + 256 * k, pairs);
    }
    float (&p)[4] = logits[0][0].c, (&slope)[4] = slopes.c, top[2];
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      top[e] = max_of(p[e], p[2 + e]);
      SNE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) top[e] = max_of(top[e], shuffle_xor(top[e], mask));
      if (g == 0) tops[2 * t + e] = top[e];
    }
    sync_pair(set);
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float shift = -kLog2e * max_of(top[e], other_tops[2 * t + e]);
      float total = 0, weighted = 0;
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        p[2 * r + e] = exp2_fast(multiply_add(p[2 * r + e], kLog2e, shift));
        total += p[2 * r + e], weighted += p[2 * r + e] * slope[2 * r + e];
      }
      SNE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2)
        total += shuffle_xor(total, mask), weighted += shuffle_xor(weighted, mask);
      if (g == 0) totals[4 * t + 2 * e] = total, totals[4 * t + 2 * e + 1] = weighted;
    }
    sync_pair(set);
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float inverse = reciprocal_fast(totals[4 * t + 2 * e] + other_totals[4 * t + 2 * e]);
      const float mean = (totals[4 * t + 2 * e + 1] + other_totals[4 * t + 2 * e + 1]) * inverse;
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        p[2 * r + e] *= inverse;
        slope[2 * r + e] = p[2 * r + e] * (slope[2 * r + e] - mean);
      }
    }
    // The gradient of a row: slopes times queries and weights times gradients of the results, in one product.
    const Rows16<Op> left = rows16<Op>(slopes, logits[0][0]);
    const unsigned char *queries = weights.piece(layout.queries(), 8 * W) + lane * 16;
    Tile dx[1][NT] = {};
    SNE_UNROLL
    for (int j = 0; j < NT; j += 4) {
      uint32_t of_slope[4], of_weight[4];
      load_matrices_transposed<4>(of_slope, queries + 128 * j);
      load_matrices_transposed<4>(of_weight, own + At::kGrads + 128 * j + lane * 16);
      SNE_UNROLL
      for (int n = 0; n < 4; ++n) product(dx[0][j + n], left, Cols8<Op>{{of_slope[n], of_weight[n]}});
    }
    Rows16<Op> out[1][KT];
    to_operands<Op>(out, dx);
    if (there) store_pieces<Op>(rows_grad + place, out[0]);
    const Rows16<Op> by_head{{transpose8(left.r[0]), 0, transpose8(left.r[1]), 0}};
    SNE_UNROLL
    for (int k = 0; k < KT; ++k) {
      Cols8<Op> columns[2];
      piece_columns(columns, own + k * kPieceBytes);
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) product(query_sums[2 * k + half], by_head, columns[half]);
    }
    sync_pair(set);
  }
  sync_block();
  float *sums = (float *)memory + warp_id() * H * W;
  if (g < H) {
    SNE_UNROLL
    for (int j = 0; j < NT; ++j) {
      SNE_UNROLL
      for (int e = 0; e < 2; ++e) sums[g * W + 8 * j + 2 * t + e] = query_sums[j].c[e];
    }
  }
  add_warp_sums(query_part + block_id() * H * W, (const float *)memory, H * W);
}

// Sums of the gradients of rows that have codes. A thread block's warps have 16 columns each of a bin, and several bins
// at once: chunk_grad (N, h), the sums over a chunk's rows, and element_part (multiprocessors, codes, h), those over
// chunks.
template <class T, int W>
SNE_KERNEL SNE_BOUNDS(512, 2) chunk_full_codes_backward(ChunkCall<T> call, const T *rows_grad, int codes,
                                                        float *chunk_grad, float *element_part) {
  constexpr int KT = W / 16, kBins = 16 / KT;  // at once
  const int lane = lane_id(), g = lane / 4, t = lane % 4, k = warp_id() % KT;
  float sums[2][8] = {};
  const int64_t per_step = kBins;
  const FilledBins bins = filled_bins(call);
  for (int64_t step = block_id(); step * per_step < bins.count; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / KT;
    const bool there = local < bins.count;
    const T *at = rows_grad + local * kFullLength * W + 256 * k + 8 * lane;
    float of_chunk[4] = {0, 0, 0, 0};  // columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t
    SNE_UNROLL
    for (int part = 0; part < 2; ++part) {
      float v[8];
      unpack<T>(v, there ? load_words(at + 16 * W * part) : Words{});
      SNE_UNROLL
      for (int i = 0; i < 8; ++i) sums[part][i] += v[i], of_chunk[i / 4 * 2 + i % 2] += v[i];
    }
    detail::fold<2>(of_chunk, 16);
    detail::fold<1>(of_chunk, 8);
    const float total = of_chunk[0] + shuffle_xor(of_chunk[0], 4);
    const int column = 16 * k + 8 * (lane >> 4) + 2 * t + (lane >> 3 & 1);
    if (there && g % 2 == 0) chunk_grad[call.order[bins.first + local] * W + column] = total;
  }
  float *table = (float *)shared_memory();  // (16 warps, 16, 32)
  SNE_UNROLL
  for (int i = 0; i < 16; ++i) table[(warp_id() * 16 + i) * 32 + lane] = sums[i / 8][i % 8];
  sync_block();
  for (int i = thread_id(); i < 32 * W; i += num_threads()) {
    // Number i / 32 % 16 of lane i % 32, of columns 16 (i / 512)...
    float sum = 0;
    for (int bin = 0; bin < kBins; ++bin) sum += table[bin * KT * 512 + i];
    const int number = i / 32 % 16, from = i % 32;
    const int row = 16 * (number / 8) + 8 * (number / 2 % 2) + from / 4;
    element_part[(block_id() * codes + row) * W + i / 512 * 16 + 8 * (number / 4 % 2) + from % 4 * 2 + number % 2] +=
        sum;
  }
}

template <class Op, int width, int dim>
int run_full_pool_backward(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space, const void *grad,
                           float *query_part, Stream stream) {
  using T = typename Op::Storage;
  using Shape = ChunkShape<Op, width, dim, 1>;
  int64_t shared = kFullWarps * PoolPlaces<Shape>::kBytes + 8 * width * int64_t(sizeof(T));
  const int64_t sums = kFullWarps * Shape::HEADS * width * 4;
  if (shared < sums) shared = sums;
  if (shared > a.shared_limit) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count + kFullBinsAtOnce - 1) / kFullBinsAtOnce;
  const int64_t blocks = SNE_FAST_CUDA_POOL_BLOCKS * a.multiprocessors;
  const T *rows = (const T *)space.saved + 3 * a.count * a.slots * width;
  return launch(stream, tiles < blocks ? tiles : blocks, 1, 32 * kFullWarps, shared,
                chunk_full_pool_backward<Op, Shape>, call_of<T>(a), (const T *)grad, rows, (T *)space.rows_grad,
                query_part);
}

template <class Op, int width>
int run_full_codes_backward(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space, int64_t codes,
                            float *chunk_grad, float *element_part, Stream stream) {
  using T = typename Op::Storage;
  constexpr int kBins = 256 / width;
  if (codes < kFullLength) return SNE_FAST_CUDA_BAD_ARGUMENT;
  const int64_t tiles = (a.count + kBins - 1) / kBins;
  return launch(stream, tiles < a.multiprocessors ? tiles : a.multiprocessors, 1, 512, 32 << 10,
                chunk_full_codes_backward<T, width>, call_of<T>(a), (const T *)space.rows_grad, int(codes), chunk_grad,
                element_part);
}

}  // namespace
}  // namespace sne
