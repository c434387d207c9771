// Backward of one of the blocks 1 to 3 of chunk_encode for full bins: from the gradient of its output rows to that of
// its input, with the gradients of its matrices, biases and norms.
#pragma once

#include "cuda/chunk_encode/full_backward.h"

namespace sne {
namespace {

// Shared memory of a warp, as offsets in bytes. A head's q, k and v are at place head + 1, and their gradients at place
// head, where those of the head before have been read by then. Its softmax weights are at place head + 2, and the
// gradients of its logits at place head.
template <class Op, class Shape>
struct BlockPlaces {
  static constexpr int kHeads = Shape::HEADS, kMatrix = Shape::DK * kPieceBytes, kRows = Shape::KT * kPieceBytes;
  static SNE_MEMBER constexpr int qkv(int place, int which = 0) { return (3 * place + which) * kMatrix; }
  static SNE_MEMBER constexpr int weights(int place) { return qkv(kHeads + 1) + 2 * kPieceBytes * place; }
  static SNE_MEMBER constexpr int grads(int head) { return kGrads + head % 2 * kMatrix; }
  static constexpr int kWeights = 3 * (kHeads + 1) * kMatrix, kGrads = kWeights + 2 * kPieceBytes * (kHeads + 2);
  static constexpr int kInputs = kGrads + (kHeads > 1 ? 2 : 1) * kMatrix, kOutputs = kInputs + kRows;  // of fc_o
  static constexpr int kMeans = kOutputs + kRows, kBytes = kMeans + kRows;  // results of the attention
};

// 1 / the sums of weights of a lane's rows, as pairs of the same number.
template <class Shape>
using Inverses = uint32_t[Shape::HEADS][2];

// Computes o = q + attention(q, k, v) again, and keeps q, k, v, the softmax weights and the attention in shared memory.
template <class Op, class Shape>
SNE_DEVICE void attention_again(Tile (&o)[1][Shape::NT], Inverses<Shape> &inverses, const Rows16<Op> (&x)[1][Shape::KT],
                                const WeightSource<Op> &weights, int block, const float *tile_vectors,
                                unsigned char *own, int to_other, const SetOfWarps &set) {
  using At = BlockPlaces<Op, Shape>;
  constexpr int D = Shape::D, DT = Shape::DT, DK = Shape::DK, W = Shape::W;
  const WeightLayout layout(W, D);
  const TileVectors at{W};
  const float scale = kLog2e / __builtin_sqrtf(float(W));
  SNE_UNROLL
  for (int head = 0; head < Shape::HEADS; ++head) {
    Tile q[1][DT];
    Rows16<Op> rows[3][1][DK];
    SNE_UNROLL
    for (int which = 2; which >= 0; --which) {
      fill_tiles<DT>(q[0], tile_vectors + at.qkv_bias(block, which) + 2 * D * head);
      multiply<false>(q, x, weights.piece(layout.qkv(block, head) + which * D * W, D * W));
      head_operands<Op, Shape>(rows[which], q);
      put_pieces<Op>(own + At::qkv(head + 1, which), rows[which][0]);
    }
    sync_pair(set);
    Tile s[4] = {};  // the own warp's keys, then the other one's
    SNE_UNROLL
    for (int k = 0; k < DK; ++k) {
      const Rows16<Op> others = piece_rows<Op>(own + to_other + At::qkv(head + 1, 1) + k * kPieceBytes);
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) {
        product(s[half], rows[0][0][k], cols8(rows[1][0][k], half));
        product(s[2 + half], rows[0][0][k], cols8(others, half));
      }
    }
    exponentials_of_rows(s, scale);
    Tile mean[DT] = {}, total{};
    SNE_UNROLL
    for (int m = 0; m < 2; ++m) {
      const Rows16<Op> p = rows16<Op>(s[2 * m], s[2 * m + 1]);
      put_piece(own + At::weights(head + 2) + m * kPieceBytes, p);
      product(total, p, ones<Op>());
      SNE_UNROLL
      for (int k = 0; k < DK; ++k) {
        Cols8<Op> columns[2];
        piece_columns(columns, own + m * to_other + At::qkv(head + 1, 2) + k * kPieceBytes);
        SNE_UNROLL
        for (int half = 0; half < 2; ++half) product(mean[2 * k + half], p, columns[half]);
      }
    }
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float inverse = reciprocal_fast(total.c[2 * r]);
      inverses[head][r] = both<Op>(inverse);
      SNE_UNROLL
      for (int n = 0; n < DT; ++n) {
        SNE_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          mean[n].c[e] *= inverse;
          o[0][head * DT + n].c[e] = q[0][n].c[e] + mean[n].c[e];
        }
      }
    }
    SNE_UNROLL
    for (int k = 0; k < DK; ++k)
      put_rows(own + At::kMeans + (head * DK + k) * kPieceBytes, rows16<Op>(mean[2 * k], mean[2 * k + 1]));
  }
}

// Turns sums into operands, times `factor`.
template <class Op, int K>
SNE_DEVICE void scaled_operands(Rows16<Op> (&out)[K], const Tile (&sum)[2 * K], float factor) {
  SNE_UNROLL
  for (int k = 0; k < K; ++k) {
    Tile pair[2] = {sum[2 * k], sum[2 * k + 1]};
    SNE_UNROLL
    for (int e = 0; e < 8; ++e) pair[e / 4].c[e % 4] *= factor;
    out[k] = rows16<Op>(pair[0], pair[1]);
  }
}

// Adds the product over rows of the pieces at `left` (16 x 16) and `right` (16 x 8 N) to c.
template <class Op, int N>
SNE_DEVICE void add_over_rows(Tile (&c)[N], const unsigned char *left, const unsigned char *right) {
  const Rows16<Op> a = piece_transposed<Op>(left);
  SNE_UNROLL
  for (int k = 0; k < N / 2; ++k) {
    Cols8<Op> columns[2];
    piece_columns(columns, right + k * kPieceBytes);
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) product(c[2 * k + half], a, columns[half]);
  }
}

// Computes dx, the gradient of x, from that of o = q + attention; leaves the gradients of q, k and v as pieces.
//
// Gradients of o are divided by the sums of weights at once, so that weights need not be.
template <class Op, class Shape>
SNE_DEVICE void attention_grad_of_full(Tile (&dx)[Shape::NT], const Rows16<Op> (&grad)[1][Shape::KT],
                                       const Inverses<Shape> &inverses, const WeightSource<Op> &weights, int block,
                                       unsigned char *own, int to_other, const SetOfWarps &set) {
  using T = typename Op::Storage;
  using At = BlockPlaces<Op, Shape>;
  constexpr int D = Shape::D, DT = Shape::DT, DK = Shape::DK, W = Shape::W;
  const WeightLayout layout(W, D);
  const float per_logit = 1.0f / __builtin_sqrtf(float(W));
  SNE_UNROLL
  for (int head = 0; head < Shape::HEADS; ++head) {
    Rows16<Op> scaled[DK], ds[2], rows[3][DK];
    Tile minus{};  // the sums of weight times its gradient, negative
    SNE_UNROLL
    for (int k = 0; k < DK; ++k) {
      const Rows16<Op> mean = get_rows<Op>(own + At::kMeans + (head * DK + k) * kPieceBytes);
      Rows16<Op> products;
      SNE_UNROLL
      for (int part = 0; part < 4; ++part) {
        scaled[k].r[part] = multiply2<Op>(grad[0][head * DK + k].r[part], inverses[head][part % 2]);
        products.r[part] = multiply2<Op>(scaled[k].r[part], mean.r[part]);
      }
      put_piece(own + At::grads(head) + k * kPieceBytes, scaled[k]);
      const uint32_t minus_one = both<Op>(-1.0f);
      product(minus, products, Cols8<Op>{{minus_one, minus_one}});
    }
    Tile dq[DT] = {}, dk[DT] = {}, dv[DT] = {};
    SNE_UNROLL
    for (int m = 0; m < 2; ++m) {
      const unsigned char *theirs = own + m * to_other;
      Tile dp[2] = {minus, minus};
      SNE_UNROLL
      for (int k = 0; k < DK; ++k) {
        const Rows16<Op> values = piece_rows<Op>(theirs + At::qkv(head + 1, 2) + k * kPieceBytes);
        SNE_UNROLL
        for (int half = 0; half < 2; ++half) product(dp[half], scaled[k], cols8(values, half));
      }
      ds[m] = rows16<Op>(dp[0], dp[1]);
      const Rows16<Op> p = piece_rows<Op>(own + At::weights(head + 2) + m * kPieceBytes);
      SNE_UNROLL
      for (int part = 0; part < 4; ++part) ds[m].r[part] = multiply2<Op>(ds[m].r[part], p.r[part]);
      put_piece(own + At::weights(head) + m * kPieceBytes, ds[m]);
      SNE_UNROLL
      for (int k = 0; k < DK; ++k) {
        Cols8<Op> columns[2];
        piece_columns(columns, theirs + At::qkv(head + 1, 1) + k * kPieceBytes);
        SNE_UNROLL
        for (int half = 0; half < 2; ++half) product(dq[2 * k + half], ds[m], columns[half]);
      }
    }
    scaled_operands<Op>(rows[0], dq, per_logit);
    SNE_UNROLL
    for (int k = 0; k < DK; ++k) {
      SNE_UNROLL
      for (int part = 0; part < 4; ++part)
        rows[0][k].r[part] = add2<T>(rows[0][k].r[part], grad[0][head * DK + k].r[part]);
    }
    sync_pair(set);
    SNE_UNROLL
    for (int m = 0; m < 2; ++m) {  // the own rows as keys of the queries of either warp
      const unsigned char *theirs = own + m * to_other;
      add_over_rows<Op>(dv, theirs + At::weights(head + 2) + m * kPieceBytes, theirs + At::grads(head));
      add_over_rows<Op>(dk, theirs + At::weights(head) + m * kPieceBytes, theirs + At::qkv(head + 1));
    }
    scaled_operands<Op>(rows[1], dk, per_logit);
    scaled_operands<Op>(rows[2], dv, 1.0f);
    SNE_UNROLL
    for (int which = 0; which < 3; ++which) {
      put_pieces<Op>(own + At::qkv(head, which), rows[which]);
      multiply_by_rows<Op, W>(dx, rows[which], weights.piece(layout.qkv(block, head) + which * D * W, D * W));
    }
  }
}

// Adds the sums over rows of the gradients of q, k and v.
template <class Op, class Shape>
SNE_DEVICE void add_qkv_sums(Tile (&sums)[Shape::KT], const unsigned char *own) {
  using At = BlockPlaces<Op, Shape>;
  SNE_UNROLL
  for (int which = 0; which < 3; ++which) {
    const uint32_t one = lane_id() / 4 == kQueryBias + which ? both<Op>(1.0f) : 0;
    SNE_UNROLL
    for (int k = 0; k < Shape::KT; ++k) {
      const unsigned char *at = own + At::qkv(k / Shape::DK, which) + k % Shape::DK * kPieceBytes;
      product(sums[k], piece_transposed<Op>(at), Cols8<Op>{{one, one}});
    }
  }
}

struct FullBlockGrads {
  FullVectorParts vectors;
  float *w_qkv, *w_o;  // (multiprocessors, 3, h, h), (multiprocessors, h, h)
};

template <class Op, class Shape>
SNE_KERNEL SNE_BOUNDS(32 * kFullWarps, 1)
    chunk_full_block_backward(ChunkCall<typename Op::Storage> call, const typename Op::Storage *rows,
                              typename Op::Storage *rows_grad, int block, bool layer_norm, FullBlockGrads grads) {
  using At = BlockPlaces<Op, Shape>;
  constexpr int W = Shape::W, KT = Shape::KT, NT = Shape::NT, M = W / 32;
  const WeightLayout layout(W, Shape::D);
  float *tile_vectors = (float *)shared_memory();
  unsigned char *memory = (unsigned char *)(tile_vectors + TileVectors{W}.size());
  unsigned char *weights_at = memory + kFullWarps * At::kBytes, *own = memory + warp_id() * At::kBytes;
  const WeightSource<Op> weights{call.prepared, weights_at, true, layout.qkv(block, 0)};
  load_tile_vectors(tile_vectors, W, Shape::HEADS, call.logit, call.b_o, call.b_qkv, layer_norm ? call.norm : nullptr);
  weights.copy(layout.qkv(block, 0), 4 * W * W);
  const SetOfWarps set = set_of_warps(call.cls, 16);
  const int to_other = set.part ? -At::kBytes : At::kBytes;

  // A warp has half of the rows of one matrix's gradient.
  const int matrix = warp_id() / 2, first = warp_id() % 2 * M;
  const int place = At::qkv(first / Shape::DK, matrix) + first % Shape::DK * kPieceBytes;
  const unsigned char *left = memory + (matrix == 3 ? At::kOutputs + first * kPieceBytes : place);
  const unsigned char *right = memory + (matrix == 3 ? At::kInputs : At::kWeights);
  const int between = matrix == 3 || Shape::DK > 1 ? kPieceBytes : 3 * kPieceBytes;
  Tile matrix_sums[M][NT] = {}, sums[KT] = {};
  const int64_t per_step = kFullBinsAtOnce, bins = filled_bins(call).count;
  for (int64_t step = block_id(); step * per_step < bins; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / 2;
    const bool there = local < bins;
    const int64_t place = (local * kFullLength + set.part * 16) * W;
    Rows16<Op> grad[1][KT];
    Inverses<Shape> inverses;
    {
      HalfBlock<Op, Shape> half;
      Tile o[1][NT];
      {
        Rows16<Op> x[1][KT];
        load_pieces<Op>(x[0], rows + place, there);
        attention_again<Op, Shape>(o, inverses, x, weights, block, tile_vectors, own, to_other, set);
      }
      feed_forward_again<Op, Shape>(half, o, weights, block, tile_vectors, layer_norm, own + At::kInputs);
      load_pieces<Op>(grad[0], rows_grad + place, there);
      feed_forward_grad<Op, Shape>(grad, half, weights, block, tile_vectors, layer_norm, own + At::kOutputs,
                                   own + At::kWeights, sums);
    }
    Tile dx[1][NT] = {};
    attention_grad_of_full<Op, Shape>(dx[0], grad, inverses, weights, block, own, to_other, set);
    to_operands<Op>(grad, dx);
    if (there) store_pieces<Op>(rows_grad + place, grad[0]);
    sync_pair(set);  // the other warp has read the weights, in whose place the rows go
    load_pieces<Op>(grad[0], rows + place, there);
    put_pieces<Op>(own + At::kWeights, grad[0]);
    add_qkv_sums<Op, Shape>(sums, own);
    sync_block();
    add_products<At::kBytes, Op, M, KT>(matrix_sums, left, between, right);
    sync_block();
  }
  float *w = matrix == 3 ? grads.w_o + block_id() * W * W : grads.w_qkv + (block_id() * 3 + matrix) * W * W;
  add_to_matrix(w + 16 * first * W, W, matrix_sums);
  float *warp_sums = (float *)memory;
  store_row_sums(warp_sums + warp_id() * kFullSums * W, sums);
  sync_block();
  add_vector_sums(grads.vectors, warp_sums, W, kFullSums, kFullSums * W, layer_norm);
}

template <class Op, int width, int dim>
int run_full_block_backward(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space, int block,
                            const sne_fast_cuda_chunk_block_grads &g, Stream stream) {
  using T = typename Op::Storage;
  using Shape = ChunkShape<Op, width, dim, 1>;
  const int64_t shared = TileVectors{width}.size() * 4 + kFullWarps * BlockPlaces<Op, Shape>::kBytes +
                         4 * width * width * int64_t(sizeof(T));
  if (shared > a.shared_limit) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count + kFullBinsAtOnce - 1) / kFullBinsAtOnce;
  const T *rows = (const T *)space.saved + (block - 1) * a.count * a.slots * width;
  const FullBlockGrads grads{
      {(float *)g.norm_part, (float *)g.b_o_part, (float *)g.b_qkv_part}, (float *)g.w_qkv_part, (float *)g.w_o_part};
  return launch(stream, tiles < a.multiprocessors ? tiles : a.multiprocessors, 1, 32 * kFullWarps, shared,
                chunk_full_block_backward<Op, Shape>, call_of<T>(a), rows, (T *)space.rows_grad, block,
                bool(a.layer_norm), grads);
}

}  // namespace
}  // namespace sne
