// Shared by the backward kernels for bins of 32 slots that one chunk of 32 elements fills (full_bins.h).
//
// Two warps hold a bin, 16 rows each. Rows and their gradients are pairs of 16-bit numbers, as operands are, also
// between kernels. In memory and in shared memory they are pieces of 16 x 16, each as four 8 x 8 matrices of 128 bytes
// one behind the other, so that a piece is also the transposed operand of a product over rows. Sums over rows are such
// products: gradients of matrices stay in the registers of a thread block's warps until its last bin, and so do those
// of vectors, up to 8 of them as the columns of one product. Thread blocks add them to a row of a table of their own.
#pragma once

#include "cuda/chunk_encode/backward.h"
#include "cuda/chunk_encode/operands.h"

namespace sne {

constexpr int kFullWarps = 8, kFullBinsAtOnce = kFullWarps / 2, kPieceBytes = 512;

template <class Op, class Shape>
constexpr bool kHasFullBackward = kHasFullBins<Op, Shape> && Shape::D >= 16 && kHasChunkVariant<Op, Shape::W, Shape::D>;

// --------------------------------------------------------------------------------------------------------- pieces

template <class Op>
SNE_DEVICE void put_piece(unsigned char *at, const Rows16<Op> &rows) {
  store_matrices(at, rows.r);
}
template <class Op>
SNE_DEVICE Rows16<Op> piece_rows(const unsigned char *at) {
  Rows16<Op> out;
  load_matrices<4>(out.r, at + lane_id() * 16);
  return out;
}
// The left operand of a product over the rows of a piece.
template <class Op>
SNE_DEVICE Rows16<Op> piece_transposed(const unsigned char *at) {
  Rows16<Op> out;
  const int lane = lane_id(), matrix = lane >> 4 | (lane >> 2 & 2);  // the second and the third one change places
  load_matrices_transposed<4>(out.r, at + matrix * 128 + lane % 8 * 16);
  return out;
}
// The right operands of such a product: columns 0..7, 8..15.
template <class Op>
SNE_DEVICE void piece_columns(Cols8<Op> (&out)[2], const unsigned char *at) {
  uint32_t r[4];
  load_matrices_transposed<4>(r, at + lane_id() * 16);
  out[0].r[0] = r[0], out[0].r[1] = r[1], out[1].r[0] = r[2], out[1].r[1] = r[3];
}

template <class Op, int K>
SNE_DEVICE void put_pieces(unsigned char *at, const Rows16<Op> (&rows)[K]) {
  SNE_UNROLL
  for (int k = 0; k < K; ++k) put_piece(at + k * kPieceBytes, rows[k]);
}

// Loads the rows of a warp, zeros where it has no bin. `at`: the first of its pieces, of 256 numbers each.
template <class Op, int K>
SNE_DEVICE void load_pieces(Rows16<Op> (&rows)[K], const typename Op::Storage *at, bool there) {
  SNE_UNROLL
  for (int k = 0; k < K; ++k) {
    const Words words = there ? load_words(at + 256 * k + 8 * lane_id()) : Words{};
    SNE_UNROLL
    for (int part = 0; part < 4; ++part) rows[k].r[part] = words.w[part];
  }
}

template <class Op>
SNE_DEVICE uint32_t multiply2(uint32_t a, uint32_t b) {
  return multiply_add2<typename Op::Storage>(a, b, 0);
}
template <class Op>
SNE_DEVICE uint32_t both(float v) {
  return pack2<typename Op::Storage>(v, v);
}

// --------------------------------------------------------------------------------------------------- sums over rows

// Vectors whose gradients a warp sums, as columns of a product.
enum FullSums { kGain0, kBias0, kGain1, kBias1, kOutBias, kQueryBias, kKeyBias, kValueBias, kFullSums };

// Adds the sums over the 16 rows of a warp's pieces, which are `stride` bytes apart, to column `which` of sums.
template <class Op, int KT>
SNE_DEVICE void add_row_sums(Tile (&sums)[KT], const unsigned char *at, int which) {
  const uint32_t one = lane_id() / 4 == which ? both<Op>(1.0f) : 0;
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) product(sums[k], piece_transposed<Op>(at + k * kPieceBytes), Cols8<Op>{{one, one}});
}

// Writes sums as (8, 16 KT).
template <int KT>
SNE_DEVICE void store_row_sums(float *to, const Tile (&sums)[KT]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) to[(2 * t + e % 2) * 16 * KT + 16 * k + 8 * (e / 2) + g] = sums[k].c[e];
  }
}

// Adds the products over rows of M pieces at `left`, `step` bytes apart, with N pieces at `right`, of all warps of the
// thread block, whose memory is `per_warp` bytes apart. All of them must have written theirs.
template <int per_warp, class Op, int M, int N>
SNE_DEVICE void add_products(Tile (&sum)[M][2 * N], const unsigned char *left, int step, const unsigned char *right) {
  SNE_UNROLL
  for (int warp = 0; warp < kFullWarps; ++warp) {
    Rows16<Op> a[M];
    SNE_UNROLL
    for (int i = 0; i < M; ++i) a[i] = piece_transposed<Op>(left + warp * per_warp + i * step);
    SNE_UNROLL
    for (int k = 0; k < N; ++k) {
      Cols8<Op> columns[2];
      piece_columns(columns, right + warp * per_warp + k * kPieceBytes);
      SNE_UNROLL
      for (int i = 0; i < M; ++i) {
        SNE_UNROLL
        for (int half = 0; half < 2; ++half) product(sum[i][2 * k + half], a[i], columns[half]);
      }
    }
  }
}

// Adds sums to a matrix whose rows are `width` apart.
template <int M, int N>
SNE_DEVICE void add_to_matrix(float *to, int width, const Tile (&sum)[M][N]) {
  SNE_UNROLL
  for (int i = 0; i < M; ++i) {
    SNE_UNROLL
    for (int j = 0; j < N; ++j) {
      float *at = to + 16 * i * width + 8 * j;
      Tile total = load_tile(at, width);
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) total.c[e] += sum[i][j].c[e];
      store_tile(at, width, total);
    }
  }
}

// Returns the sum over warps, in order, of number i of each, `size` numbers apart.
SNE_DEVICE float sum_of_warps(const float *sums, int size, int i) {
  float total = 0;
  for (int warp = 0; warp < kFullWarps; ++warp) total += sums[warp * size + i];
  return total;
}

// ------------------------------------------------------------------------------------- feed-forward half of a block

// What the backward of the feed-forward half of a block needs of its forward. Without layer norm fc_o's input is
// `first`.
template <class Op, class Shape>
struct HalfBlock {
  Rows16<Op> first[1][Shape::KT], second[1][Shape::KT];  // results of ln0 and ln1 before gain and bias
  Rows16<Op> relu[1][Shape::KT];
  float rstd0[2], rstd1[2];
};

// Computes the half again from o (full_bins.h: feed_forward_of_full), and writes fc_o's input as pieces.
template <class Op, class Shape>
SNE_DEVICE void feed_forward_again(HalfBlock<Op, Shape> &half, const Tile (&o)[1][Shape::NT],
                                   const WeightSource<Op> &weights, int block, const float *tile_vectors,
                                   bool layer_norm, unsigned char *inputs) {
  using T = typename Op::Storage;
  constexpr int W = Shape::W, KT = Shape::KT;
  const WeightLayout layout(W, Shape::D);
  const TileVectors at{W};
  Rows16<Op> x[1][KT];
  to_operands<Op>(x, o);
  if (layer_norm) {
    float shift[2];
    row_norms<Op>(half.rstd0, shift, x);
    Tile normalized[1][Shape::NT];
    SNE_UNROLL
    for (int j = 0; j < Shape::NT; ++j) {
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) normalized[0][j].c[e] = multiply_add(o[0][j].c[e], half.rstd0[e / 2], shift[e / 2]);
    }
    to_operands<Op>(half.first, normalized);
    SNE_UNROLL
    for (int k = 0; k < KT; ++k) x[0][k] = half.first[0][k];
    scale_and_shift_pairs<Op>(x, tile_vectors + at.norm(block, 0));
  }
  put_pieces<Op>(inputs, x[0]);
  Tile z[1][Shape::NT];
  fill_tiles<Shape::NT>(z[0], tile_vectors + at.out_bias(block));
  multiply<false>(z, x, weights.piece(layout.out(block), W * W));
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part) {
      const float *pair = z[0][2 * k + part / 2].c + part % 2 * 2;
      half.relu[0][k].r[part] = pack2_relu<T>(pair[0], pair[1]);
      half.second[0][k].r[part] = add2<T>(x[0][k].r[part], half.relu[0][k].r[part]);
    }
  }
  if (layer_norm) {
    float shift[2];
    row_norms<Op>(half.rstd1, shift, half.second);
    SNE_UNROLL
    for (int k = 0; k < KT; ++k) {
      SNE_UNROLL
      for (int part = 0; part < 4; ++part) {
        uint32_t &pair = half.second[0][k].r[part];
        pair = multiply_add2<T>(pair, both<Op>(half.rstd1[part % 2]), both<Op>(shift[part % 2]));
      }
    }
  }
}

// Turns the gradient of a norm's result into that of its input, and adds to the sums of its gain and bias. scratch: KT
// pieces of this warp's.
template <class Op, int KT>
SNE_DEVICE void norm_grad(Rows16<Op> (&grad)[1][KT], const Rows16<Op> (&normalized)[1][KT], const float (&rstd)[2],
                          const float *gain_and_bias, unsigned char *scratch, Tile (&sums)[KT], int gain, int bias) {
  using T = typename Op::Storage;
  constexpr float kShare = 1.0f / (16 * KT);
  Rows16<Op> tilted[KT];
  put_pieces<Op>(scratch, grad[0]);
  sync_warp();
  add_row_sums<Op>(sums, scratch, bias);
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part)
      tilted[k].r[part] = multiply2<Op>(grad[0][k].r[part], normalized[0][k].r[part]);
  }
  sync_warp();
  put_pieces<Op>(scratch, tilted);
  sync_warp();
  add_row_sums<Op>(sums, scratch, gain);
  Tile mean{}, slope{};
  Words gains[KT];
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    gains[k] = load_words(gain_and_bias + 16 * k + lane_id() % 4 * 4);
    const Cols8<Op> column{{gains[k].w[0], gains[k].w[2]}};
    product(mean, grad[0][k], column);
    product(slope, tilted[k], column);
  }
  uint32_t scale[2], shift[2], tilt[2];
  SNE_UNROLL
  for (int r = 0; r < 2; ++r) {
    scale[r] = both<Op>(rstd[r]);
    shift[r] = both<Op>(-kShare * rstd[r] * mean.c[2 * r]);
    tilt[r] = both<Op>(-kShare * rstd[r] * slope.c[2 * r]);
  }
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part) {
      uint32_t &pair = grad[0][k].r[part];
      const uint32_t rest = multiply_add2<T>(normalized[0][k].r[part], tilt[part % 2], shift[part % 2]);
      pair = multiply_add2<T>(multiply2<Op>(pair, gains[k].w[part / 2 * 2]), scale[part % 2], rest);
    }
  }
  sync_warp();
}

// Turns grad from the gradient of a block's result into that of its feed-forward half's input o. Writes the gradient of
// fc_o's result as pieces to `outputs`; scratch: KT other pieces of this warp's.
template <class Op, class Shape>
SNE_DEVICE void feed_forward_grad(Rows16<Op> (&grad)[1][Shape::KT], const HalfBlock<Op, Shape> &half,
                                  const WeightSource<Op> &weights, int block, const float *tile_vectors,
                                  bool layer_norm, unsigned char *outputs, unsigned char *scratch,
                                  Tile (&sums)[Shape::KT]) {
  using T = typename Op::Storage;
  constexpr int W = Shape::W, KT = Shape::KT;
  const WeightLayout layout(W, Shape::D);
  const TileVectors at{W};
  if (layer_norm)
    norm_grad<Op>(grad, half.second, half.rstd1, tile_vectors + at.norm(block, 1), scratch, sums, kGain1, kBias1);
  Rows16<Op> through[KT];
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part)
      through[k].r[part] = grad[0][k].r[part] & where_not_zero(half.relu[0][k].r[part]);
  }
  put_pieces<Op>(outputs, through);
  Tile inner[Shape::NT] = {};
  multiply_by_rows<Op, W>(inner, through, weights.piece(layout.out(block), W * W));
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part) {
      const float *pair = inner[2 * k + part / 2].c + part % 2 * 2;
      grad[0][k].r[part] = add2<T>(grad[0][k].r[part], pack2<T>(pair[0], pair[1]));
    }
  }
  sync_warp();
  add_row_sums<Op>(sums, outputs, kOutBias);
  if (layer_norm)
    norm_grad<Op>(grad, half.first, half.rstd0, tile_vectors + at.norm(block, 0), scratch, sums, kGain0, kBias0);
}

// Adds the sums of a thread block's warps, vectors of `width`, to its rows of the tables; those of a warp are
// `per_warp` behind those of the one before.
struct FullVectorParts {
  float *norm, *out_bias, *qkv_bias;  // (multiprocessors, 4, h), (.., h), (.., 3, h)
};
SNE_DEVICE void add_vector_sums(const FullVectorParts &parts, const float *sums, int width, int vectors, int per_warp,
                                bool layer_norm) {
  for (int i = thread_id(); i < vectors * width; i += num_threads()) {
    const int vector = i / width, column = i % width;
    if (vector < kOutBias && !layer_norm) continue;
    float *to = parts.qkv_bias + (block_id() * 3 + vector - kQueryBias) * width;
    if (vector < kOutBias)
      to = parts.norm + (block_id() * 4 + vector) * width;
    else if (vector == kOutBias)
      to = parts.out_bias + block_id() * width;
    to[column] += sum_of_warps(sums, per_warp, i);
  }
}

}  // namespace sne
