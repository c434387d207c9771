// Backward of set_block as queries: computes the forward of a tile again, goes back through its feed-forward half, and
// gives the gradients of the residual sums and of the queries, factors of fc_o's gradient and sums of the norms'.
#pragma once

#include "cuda/set_block/forward.h"
#include "cuda/tiles/feed_forward_backward.h"

namespace sne::set_block {

// Thread blocks that a multiprocessor has registers and shared memory for.
template <class Op>
constexpr int kBackwardBlocks = Op::kPacked ? SNE_FAST_CUDA_SET_BLOCKS : 1;

// Groups of 16 inner rows that a warp takes at a time.
template <class Op, class Shape>
constexpr int kBackwardGroups = Shape::W == 64 ? 1 : kGroups<Op>;

// Behind what the forward keeps: the transpose of fc_o, gradients of own rows, and sums of the norms' gradients.
template <class Op, class Shape>
struct QueryGradPlaces : ForwardPlaces<Op, Shape> {
  using Forward = ForwardPlaces<Op, Shape>;
  static constexpr int kOutTransposed = Forward::kBytes, kGrads = kOutTransposed + Forward::kMatrix;
  static constexpr int kSums = kGrads + OwnMatrix<Op, Shape>::kBytes, kBytes = kSums + kWarps * 4 * Shape::W * 4;
};

// Sums of a warp's own rows, by head.
template <class Op, class Shape>
using QuerySums = QueryGradSums<Op, Shape::D>[Shape::HEADS];

// Goes back through the feed-forward half: from what is attended and lse to the gradient of the residual sum, which is
// stored and put to `grads`, and to guesses of the means of weights' gradients.
template <class Op, class Shape>
SNE_DEVICE void sum_gradient(QuerySums<Op, Shape> &d, Softmax<Shape::D> (&s)[Shape::HEADS],
                             const Call<typename Op::Storage> &call, const OwnRows &own,
                             const OwnMatrix<Op, Shape> &grads, unsigned char *memory) {
  using At = QueryGradPlaces<Op, Shape>;
  using T = typename Op::Storage;
  constexpr int W = Shape::W, NT = Shape::NT, DT = Shape::DT;
  const float *vectors = (const float *)memory;
  const int64_t at = own.row() * W;
  finish(s, kLog2e * Shape::kLogit);
  Tile o[1][NT], grad[1][NT];
  residual_sum<Op, Shape>(o, s, call, own, memory + At::kQuery, vectors);
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) grad[0][j] = s[j / DT].out[j % DT];
  grads.put(grad);  // out of the way
  load_tiles<T, Shape>(grad, call.grad + at, own.count(call.rows), true);
  const auto keep = [&](Factor which, const Rows16<Op>(&rows)[1][Shape::KT]) {
    SNE_UNROLL
    for (int k = 0; k < Shape::KT; ++k)
      store_rows16(call.factors + which * call.rows * W + at + 16 * k, W, rows[0][k], own.count(call.rows));
  };
  feed_forward_backward<Op, Shape>(grad, o, whole_matrix<Op>(memory + At::kOut), 0,
                                   whole_matrix<Op>(memory + At::kOutTransposed), 0, vectors + Vectors<W>::kOut,
                                   (float *)(memory + At::kSums) + warp_id() * 4 * W, call.layer_norm, keep);
  SNE_UNROLL
  for (int head = 0; head < Shape::HEADS; ++head) {
    float guess[2] = {0, 0};
    SNE_UNROLL
    for (int n = 0; n < DT; ++n) {
      const int j = head * DT + n;
      const Tile attended = load_tile(grads.rows + 8 * j, Shape::kStride);
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) guess[e / 2] += grad[0][j].c[e] * attended.c[e];
    }
    d[head] = {};
    SNE_UNROLL
    for (int half = 0; half < 2; ++half)
      d[head].guess[half] = sum_over_quad(guess[half]), d[head].lse[half] = s[head].sum[half];
  }
  grads.put(grad);
  store_rows(call.sum_grad + at, W, own.count(call.rows), grad[0], 1.0f, 1.0f);
}

// Goes back through the attention to the queries, by the keys and values of all steps. The last one is in shared memory
// already, with `bad` rows of the warp.
template <class Op, class Shape>
SNE_DEVICE void attention_gradient(QuerySums<Op, Shape> &d, const Call<typename Op::Storage> &call, const OwnRows &own,
                                   const OwnMatrix<Op, Shape> &queries, const OwnMatrix<Op, Shape> &grads,
                                   const Step<Op, Shape> &step, unsigned char *memory, uint32_t bad) {
  using At = QueryGradPlaces<Op, Shape>;
  SNE_LOOP
  for (int first = 0; first < own.inner; first += kTileRows) {
    sync_block();  // the step before has been read
    // Zeros for keys that are not finite: lse makes NaN of the weights of their set.
    if (own.inner > kTileRows)
      put_keys_and_values<Op, Shape>(step, call, own, first, memory + At::kKey, memory + At::kValue, 0.0f);
    else if (bad)
      put_in_bad_rows<Op, Shape>(step.first, bad, 0.0f);
    sync_block();
    for_seen_rows<Op, kBackwardGroups<Op, Shape>>(own, first, [&](int at, const auto &seen) {
      SNE_UNROLL
      for (int head = 0; head < Shape::HEADS; ++head) {
        const int offset = at * Shape::kStride + head * Shape::D;
        Own<Op, Shape::D> q = queries.head(head), grad = grads.head(head);
        add_keys<Op, Shape::D, Shape::kStride, kBackwardGroups<Op, Shape>>(
            d[head], q, grad, step.first + offset, step.second + offset, seen, kLog2e * Shape::kLogit);
      }
    });
  }
}

// Stores the gradients of the queries, with that of the residual sum, and the numbers that the keys' need.
template <class Op, class Shape>
SNE_DEVICE void store_query_grads(QuerySums<Op, Shape> &d, const Call<typename Op::Storage> &call, const OwnRows &own,
                                  const OwnMatrix<Op, Shape> &grads) {
  constexpr int W = Shape::W, DT = Shape::DT;
  Tile grad[1][Shape::NT];
  SNE_UNROLL
  for (int head = 0; head < Shape::HEADS; ++head) {
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float lack = sum_over_quad(d[head].lack[half]);
      if constexpr (kCorrected<Op>) {
        SNE_UNROLL
        for (int n = 0; n < DT; ++n) {
          SNE_UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e) d[head].grad[n].c[e] -= lack * d[head].key[n].c[e];
        }
      }
      const int row = lane_id() / 4 + 8 * half;
      if (lane_id() % 4 == 0 && row < own.count(call.rows))
        call.numbers[(own.row() + row) * Shape::HEADS + head] = {d[head].lse[half], d[head].guess[half] + lack};
    }
    SNE_UNROLL
    for (int n = 0; n < DT; ++n) {
      const int j = head * DT + n;
      grad[0][j] = load_tile(grads.rows + 8 * j, Shape::kStride);
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) grad[0][j].c[e] += d[head].grad[n].c[e] * Shape::kLogit;
    }
  }
  store_rows(call.factors + kQueryGrad * call.rows * W + own.row() * W, W, own.count(call.rows), grad[0], 1.0f, 1.0f);
}

template <class Op, class Shape>
SNE_KERNEL SNE_BOUNDS(kThreads, kBackwardBlocks<Op>) set_block_query_grad(Call<typename Op::Storage> call) {
  using At = QueryGradPlaces<Op, Shape>;
  constexpr int W = Shape::W;
  unsigned char *memory = (unsigned char *)shared_memory();
  const OwnMatrix<Op, Shape> queries(memory + At::kQueries), grads(memory + At::kGrads);
  const Step<Op, Shape> step(memory + At::kStep);
  float *sums = (float *)(memory + At::kSums);
  load_parameters<Op, Shape>(memory, call);
  load_transpose<Op, W>(memory + At::kOutTransposed, call.w_o);
  clear(sums, kWarps * 4 * W);
  copies_done();
  SNE_LOOP
  for (int64_t tile = block_id(); tile * kTileRows < call.rows; tile += num_blocks()) {
    const OwnRows own = own_rows(call, tile);
    if (tile == block_id()) sync_block();  // parameters are there
    QuerySums<Op, Shape> d;
    uint32_t bad;
    {
      Softmax<Shape::D> s[Shape::HEADS];
      bad = attend_to_sets<Op, Shape>(s, call, own, queries, step, memory + At::kQuery, memory + At::kKey,
                                      memory + At::kValue, (const float *)memory);
      if (own.count(call.rows) > 0) sum_gradient<Op, Shape>(d, s, call, own, grads, memory);
    }
    attention_gradient<Op, Shape>(d, call, own, queries, grads, step, memory, bad);
    if (own.count(call.rows) > 0) store_query_grads<Op, Shape>(d, call, own, grads);
  }
  if (call.layer_norm) add_warp_sums(call.norm_part + block_id() * 4 * W, sums, 4 * W);
}

}  // namespace sne::set_block
