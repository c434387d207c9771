// Forward of set_block: a whole attention block of a tile of packed rows.
#pragma once

#include "cuda/set_block/rows.h"

namespace sne::set_block {

// Offsets in bytes of what the forward keeps in shared memory.
template <class Op, class Shape>
struct ForwardPlaces {
  static constexpr int kMatrix = kMatrixBytes<Op, Shape::W>;
  static constexpr int kQuery = Vectors<Shape::W>::kSize * 4, kKey = kQuery + kMatrix, kValue = kKey + kMatrix;
  static constexpr int kOut = kValue + kMatrix, kQueries = kOut + kMatrix;
  static constexpr int kStep = kQueries + OwnMatrix<Op, Shape>::kBytes, kBytes = kStep + Step<Op, Shape>::kBytes;
};

// Starts to load the parameters of the forward.
template <class Op, class Shape>
SNE_DEVICE void load_parameters(unsigned char *memory, const Call<typename Op::Storage> &call) {
  using At = ForwardPlaces<Op, Shape>;
  load_vectors<typename Op::Storage, Shape::W>((float *)memory, call);
  load_matrix<Op, Shape::W>(memory + At::kQuery, call.w_q);
  load_matrix<Op, Shape::W>(memory + At::kKey, call.w_k);
  load_matrix<Op, Shape::W>(memory + At::kValue, call.w_v);
  load_matrix<Op, Shape::W>(memory + At::kOut, call.w_o);
}

// Divides sums of weighted values by the sums of weights, which become lse in base 2.
template <int D, int H>
SNE_DEVICE void finish(Softmax<D> (&s)[H], float scale) {
  SNE_UNROLL
  for (int head = 0; head < H; ++head) {
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_over_quad(s[head].sum[half]), factor = reciprocal_fast(sum);
      SNE_UNROLL
      for (int n = 0; n < D / 8; ++n) s[head].out[n].c[2 * half] *= factor, s[head].out[n].c[2 * half + 1] *= factor;
      s[head].sum[half] = s[head].shift(half) * scale + log2_fast(sum);
    }
  }
}

// Computes the residual sum of queries and attended rows.
template <class Op, class Shape>
SNE_DEVICE void residual_sum(Tile (&o)[1][Shape::NT], const Softmax<Shape::D> (&s)[Shape::HEADS],
                             const Call<typename Op::Storage> &call, const OwnRows &own, const unsigned char *w_q,
                             const float *vectors) {
  own_queries<Op, Shape>(o, call, own, w_q, vectors);
  const float *bias = vectors + Vectors<Shape::W>::kValue + lane_id() % 4 * 2;
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) o[0][j].c[e] += s[j / Shape::DT].out[j % Shape::DT].c[e] + bias[8 * j + e % 2];
  }
}

// Thread blocks that a multiprocessor has registers for.
template <class Op, class Shape>
constexpr int kForwardBlocks = Op::kPacked && (Shape::W == 32 || Shape::D > 8) ? 3 : 2;

template <class Op, class Shape>
SNE_KERNEL SNE_BOUNDS(kThreads, (kForwardBlocks<Op, Shape>)) set_block_forward(Call<typename Op::Storage> call) {
  using At = ForwardPlaces<Op, Shape>;
  constexpr int W = Shape::W;
  unsigned char *memory = (unsigned char *)shared_memory();
  const float *vectors = (const float *)memory;
  const OwnMatrix<Op, Shape> queries(memory + At::kQueries);
  const Step<Op, Shape> step(memory + At::kStep);
  load_parameters<Op, Shape>(memory, call);
  copies_done();
  SNE_LOOP
  for (int64_t tile = block_id(); tile * kTileRows < call.rows; tile += num_blocks()) {
    const OwnRows own = own_rows(call, tile);
    if (tile == block_id()) sync_block();  // parameters are there
    Softmax<Shape::D> s[Shape::HEADS];
    attend_to_sets<Op, Shape>(s, call, own, queries, step, memory + At::kQuery, memory + At::kKey, memory + At::kValue,
                              vectors);
    if (own.count(call.rows) < 1) continue;
    finish(s, kLog2e * Shape::kLogit);
    Tile o[1][Shape::NT];
    residual_sum<Op, Shape>(o, s, call, own, memory + At::kQuery, vectors);
    feed_forward<Op, Shape>(o, whole_matrix<Op>(memory + At::kOut), 0, vectors + Vectors<W>::kOut, call.layer_norm);
    store_rows(call.out + own.row() * W, W, own.count(call.rows), o[0], 1.0f, 1.0f);
  }
}

}  // namespace sne::set_block
