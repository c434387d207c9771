// Backward of one of the blocks 1 to 3 of chunk_encode: turns the gradient of its output rows into that of its input,
// and leaves the factors of its matrices' gradients and the sums of its norms'.
#pragma once

#include "cuda/chunk_encode/backward.h"

namespace sne {
namespace {

// Adds a times a head's slice of fc_q, fc_k or fc_v to c. `piece` is the transpose (h, d) of that slice.
template <class Op, class Shape>
SNE_DEVICE void multiply_head(Tile (&c)[1][Shape::NT], const Rows16<Op> (&a)[1][Shape::DK],
                              const unsigned char *piece) {
  constexpr int kTiles = tiles_per_turn<Op, Shape::DK, Shape::NT>();
  SNE_LOOP
  for (int first = 0; first < Shape::NT; first += kTiles) {
    SNE_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      SNE_UNROLL
      for (int k = 0; k < Shape::DK; ++k) {
        if constexpr (Shape::D == 8)
          product_left(c[0][n], a[0][k], load_cols8_left<Op>(piece, first + n));
        else
          product(c[0][n], a[0][k], load_cols8<Op>(piece, first + n, k, Shape::D));
      }
    }
    if constexpr (kTiles < Shape::NT) turn<kTiles>(c);
  }
}

// Backward of the attention of all heads, which it computes again: turns grad, the gradient of o = q + attention, into
// dx, the gradient of x. Two rows of a bin attend to each other or not at all, so one range per row serves for both.
template <class Op, class Shape, class Memory>
SNE_DEVICE void attention_backward(Tile (&dx)[1][Shape::NT], Tile (&grad)[1][Shape::NT],
                                   const Rows16<Op> (&x)[1][Shape::KT], const WeightSource<Op> &weights,
                                   const WeightSource<Op> &transposed, int block, const float *bias,
                                   const Memory &memory, const SetOfWarps &set,
                                   const ProductRows<typename Op::Storage> &products) {
  constexpr int DT = Shape::DT, DK = Shape::DK, D = Shape::D, W = Shape::W, ROWS = Shape::ROWS;
  const WeightLayout layout(W, D);
  const KeyRanges<1> keys = key_ranges<Shape>(memory.slots);
  const float per_logit = 1.0f / __builtin_sqrtf(float(W)), scale = kLog2e * per_logit;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  SNE_LOOP
  for (int head = 0; head < Shape::HEADS; ++head) {
    const int64_t offset = layout.qkv(block, head);
    Rows16<Op> q_rows[1][DK], k_rows[1][DK], v_rows[1][DK], g_rows[1][DK];
    {
      Tile q[1][DT], k[1][DT], v[1][DT], a[1][DT];
      project<Op, Shape>(q, x, weights, offset, 0, bias + head * D);
      project<Op, Shape>(k, x, weights, offset, 1, bias + W + head * D);
      project<Op, Shape>(v, x, weights, offset, 2, bias + 2 * W + head * D);
      SNE_UNROLL
      for (int n = 0; n < DT; ++n) a[0][n] = grad[0][n];
      if (set.multi_chunk) {  // all of them are multiplied by zeros of other chunks
        const uint32_t bad = bad_rows<Op>(k, v) | bad_rows<Op>(q, a);
        if (lane == 0) *memory.poison = bad;
        clear_rows(q, bad);
        clear_rows(k, bad);
        clear_rows(v, bad);
        clear_rows(a, bad);
      }
      head_operands<Op, Shape>(q_rows, q);
      head_operands<Op, Shape>(k_rows, k);
      head_operands<Op, Shape>(v_rows, v);
      head_operands<Op, Shape>(g_rows, a);
    }
    offer<Shape>(memory, kKeys, k_rows);
    offer<Shape>(memory, kValues, v_rows);
    offer<Shape>(memory, kQueries, q_rows);
    offer<Shape>(memory, kGrads, g_rows);
    set.sync();

    // Own rows as queries: first the softmax and the mean of its gradient, then dq.
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, mean[2] = {0, 0};
    for (int part = 0; part < set.warps; ++part) {
      const int warp = part - set.part, first = part * ROWS;
      Tile s[2], dp[2];
      products_with<Shape>(s, q_rows[0], memory, warp, kKeys);
      products_with<Shape>(dp, g_rows[0], memory, warp, kValues);
      const uint32_t bad = set.multi_chunk ? memory.poison[4 * warp] : 0;
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int begin = keys.begin(0, r), end = keys.end(0, r);
        float highest = top[r];
        SNE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int key = first + 8 * (i / 2) + 2 * t + i % 2;
          float &logit = s[i / 2].c[2 * r + i % 2];
          logit = key >= begin && key < end ? logit * scale : -INFINITY;
          highest = max_of(highest, logit);
        }
        highest = max_over_quad(highest);
        const float shift = highest == -INFINITY ? 0.0f : highest, decay = exp2_fast(top[r] - shift);
        float sum = 0, weighted = 0;
        SNE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float logit = s[i / 2].c[2 * r + i % 2], p = exp2_fast(logit - shift);
          sum += p;
          weighted += logit == -INFINITY ? 0.0f : p * dp[i / 2].c[2 * r + i % 2];
        }
        total[r] = total[r] * decay + sum_over_quad(sum);
        mean[r] = mean[r] * decay + sum_over_quad(weighted);
        if (bad && touches(bad, begin, end, first, ROWS)) total[r] = NAN;
        top[r] = highest;
      }
    }
    float lse[2];
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      lse[r] = top[r] + log2_fast(total[r]);
      mean[r] /= total[r];
      if (t == 0) {
        memory.head_values[2 * (g + 8 * r)] = lse[r];
        memory.head_values[2 * (g + 8 * r) + 1] = mean[r];
      }
    }
    set.sync();
    Tile dq[DT] = {}, dk[DT] = {}, dv[DT] = {};
    for (int part = 0; part < set.warps; ++part) {
      const int warp = part - set.part, first = part * ROWS;
      Tile s[2], dp[2];
      products_with<Shape>(s, q_rows[0], memory, warp, kKeys);
      products_with<Shape>(dp, g_rows[0], memory, warp, kValues);
      SNE_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int r = i / 2 % 2, key = first + 8 * (i / 4) + 2 * t + i % 2;
        float &logit = s[i / 4].c[i % 4];
        const float p = exp2_fast(logit * scale - lse[r]);
        logit = key >= keys.begin(0, r) && key < keys.end(0, r) ? p * (dp[i / 4].c[i % 4] - mean[r]) * per_logit : 0.0f;
      }
      add_weighted<Op, Shape>(dq, s, memory, warp, kKeys);
    }
    // Own rows as keys: columns are queries, whose softmax the other warps have stored.
    for (int part = 0; part < set.warps; ++part) {
      const int warp = part - set.part, first = part * ROWS;
      Tile p[2], ds[2];
      products_with<Shape>(p, k_rows[0], memory, warp, kQueries);
      products_with<Shape>(ds, v_rows[0], memory, warp, kGrads);
      const float *stats = memory.head_values + warp * Memory::kHeadBytes / 4;
      SNE_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int r = i / 2 % 2, column = 8 * (i / 4) + 2 * t + i % 2, query = first + column;
        const bool meets = query >= keys.begin(0, r) && query < keys.end(0, r);
        float &weight = p[i / 4].c[i % 4], &slope = ds[i / 4].c[i % 4];
        weight = meets ? exp2_fast(weight * scale - stats[2 * column]) : 0.0f;
        slope = meets ? weight * (slope - stats[2 * column + 1]) * per_logit : 0.0f;
      }
      add_weighted<Op, Shape>(dv, p, memory, warp, kGrads);
      add_weighted<Op, Shape>(dk, ds, memory, warp, kQueries);
    }
    SNE_UNROLL
    for (int which = 0; which < 3; ++which) {
      Tile d[1][DT];
      SNE_UNROLL
      for (int n = 0; n < DT; ++n) {
        d[0][n] = which == 0 ? dq[n] : which == 1 ? dk[n] : dv[n];
        if (which == 0) {
          SNE_UNROLL
          for (int e = 0; e < 4; ++e) d[0][n].c[e] += grad[0][n].c[e];
        }
        if (products.at) store_tile(products.of(which) + head * D + 8 * n, W, d[0][n]);
      }
      Rows16<Op> rows[1][DK];
      head_operands<Op, Shape>(rows, d);
      multiply_head<Op, Shape>(dx, rows, transposed.piece(layout.qkv_transposed(block, head) + which * W * D, W * D));
    }
    turn<DT>(grad);
    set.sync();
  }
}

// Bytes of the weights that this kernel uses: fc_q, fc_k, fc_v and fc_o of one block, and their transposes.
template <class Op, class Shape>
struct BlockWeights {
  static constexpr int64_t kSquare = int64_t(Shape::W) * Shape::W, kSize = sizeof(typename Op::Storage);
  static constexpr int64_t kAll = 8 * kSquare * kSize;
  static constexpr int64_t kPiece = Shape::W * int64_t(Shape::D > Shape::kOutRows ? Shape::D : Shape::kOutRows) * kSize;
};

template <class Op, class Shape>
using BlockMemory = WarpMemory<Op, Shape, 4, 2>;
template <int width>
constexpr int kNormSums = 4 * width;  // that a warp adds up

template <class Op, class Shape, int kThreads>
SNE_KERNEL SNE_BOUNDS(kThreads, 1) chunk_block_backward(ChunkCall<typename Op::Storage> call, ChunkSpace space,
                                                        int block, bool resident, bool layer_norm, float *norm_part) {
  using T = typename Op::Storage;
  constexpr int W = Shape::W, NT = Shape::NT;
  constexpr int64_t kSquare = int64_t(W) * W;
  const WeightLayout layout(W, Shape::D);
  const VectorLayout at{W};
  unsigned char *memory_at = (unsigned char *)shared_memory();
  float *vectors = (float *)memory_at;
  memory_at += at.size() * 4;
  float *sums = (float *)memory_at;
  memory_at += num_warps() * kNormSums<W> * 4;
  const BlockMemory<Op, Shape> memory(memory_at, num_warps(), warp_id());
  memory_at += num_warps() * BlockMemory<Op, Shape>::kBytes;
  const auto source = [&](int64_t first, int64_t behind) {
    return WeightSource<Op>{call.prepared, resident ? memory_at + behind * sizeof(T) : memory_at, resident, first};
  };
  const WeightSource<Op> weights = source(layout.qkv(block, 0), 0);
  const WeightSource<Op> out_transposed = source(layout.out_transposed(block), 4 * kSquare);
  const WeightSource<Op> transposed = source(layout.qkv_transposed(block, 0), 5 * kSquare);
  load_vectors(vectors, W, call.basis, call.b_o, layer_norm ? call.norm : nullptr, call.b_qkv);
  clear(sums, num_warps() * kNormSums<W>);
  if (resident) {
    weights.copy(layout.qkv(block, 0), 4 * kSquare);
    out_transposed.copy(layout.out_transposed(block), kSquare);
    transposed.copy(layout.qkv_transposed(block, 0), 3 * kSquare);
  }
  sync_block();

  const SetOfWarps set = set_of_warps(call.cls, Shape::ROWS);
  const int64_t per_step = num_warps() / set.warps, rows = call.count * call.cls.slots;
  for (int64_t step = block_id(); step * per_step < call.count; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / set.warps;
    const bool there = local < call.count;
    load_bin<Shape>(memory, call, set, local);
    const int64_t row = local * call.cls.slots + set.part * Shape::ROWS;
    Rows16<Op> x[1][Shape::KT];
    Tile o[1][NT], grad[1][NT];
    const T *saved = (const T *)space.saved + ((block - 1) * rows + row) * W;
    SNE_UNROLL
    for (int k = 0; k < Shape::KT; ++k) x[0][k] = there ? load_rows16<Op>(saved + 16 * k, W) : Rows16<Op>{};
    attention_block<Op, Shape>(o, x, weights, block, vectors + at.qkv_bias(block), memory, set);
    load_grad(grad[0], space, there, row);
    const ProductRows<T> products = product_rows<T>(space, there, row, rows, W);
    feed_forward_backward<Op, Shape>(grad, o, weights, layout.out(block), out_transposed, layout.out_transposed(block),
                                     vectors + at.out_bias(block), sums + warp_id() * kNormSums<W>, layer_norm,
                                     saving<Op, Shape>(products));
    Tile dx[1][NT] = {};
    attention_backward<Op, Shape>(dx, grad, x, weights, transposed, block, vectors + at.qkv_bias(block), memory, set,
                                  products);
    if (there) {
      SNE_UNROLL
      for (int j = 0; j < NT; ++j) store_tile(space.rows_grad + row * W + 8 * j, W, dx[0][j]);
    }
    set.sync();
  }
  if (layer_norm) add_warp_sums(norm_part + block_id() * kNormSums<W>, sums, kNormSums<W>);
}

template <class Op, int width, int dim>
int run_block_backward(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space, int block, float *norm_part,
                       Stream stream) {
  using T = typename Op::Storage;
  using Shape = ChunkShape<Op, width, dim, 1>;
  constexpr int kMaxWarps = 8;
  const LaunchSize size =
      launch_size(a.shared_limit, VectorLayout{width}.size() * 4, BlockMemory<Op, Shape>::kBytes + kNormSums<width> * 4,
                  BlockWeights<Op, Shape>::kAll, BlockWeights<Op, Shape>::kPiece, int(a.slots / 16), kMaxWarps, 8);
  if (!size.warps) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count * (a.slots / 16) + size.warps - 1) / size.warps;
  return launch(stream, tiles < a.multiprocessors ? tiles : a.multiprocessors, 1, 32 * size.warps, size.shared,
                chunk_block_backward<Op, Shape, 32 * kMaxWarps>, call_of<T>(a), space, block, size.resident,
                bool(a.layer_norm), norm_part);
}

}  // namespace
}  // namespace sne
