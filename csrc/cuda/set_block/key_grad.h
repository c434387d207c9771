// Backward of set_block as keys and values: their gradients, which are factors of the projections' gradients, and with
// them the gradient of the rows.
#pragma once

#include "cuda/set_block/query_grad.h"

namespace sne::set_block {

// Offsets in bytes of what the kernel keeps in shared memory.
template <class Op, class Shape>
struct KeyGradPlaces {
  static constexpr int kMatrix = kMatrixBytes<Op, Shape::W>, kOwn = OwnMatrix<Op, Shape>::kBytes;
  static constexpr int kQuery = Vectors<Shape::W>::kSize * 4, kKey = kQuery + kMatrix, kValue = kKey + kMatrix;
  static constexpr int kKeys = kValue + kMatrix, kValues = kKeys + kOwn, kStep = kValues + kOwn;
  static constexpr int kNumbers = kStep + Step<Op, Shape>::kBytes;  // (H, kTileRows)
  static constexpr int kBytes = kNumbers + kTileRows * Shape::HEADS * int(sizeof(QueryNumbers));
};

// Puts queries of the warp's rows of a step, gradients of their results, and their numbers. Those of a row of which
// something is not finite are zeros, and its lse is NaN, which makes NaN of the weights of its own set alone.
template <class Op, class Shape>
SNE_DEVICE void put_queries_and_grads(const Step<Op, Shape> &step, QueryNumbers *numbers,
                                      const Call<typename Op::Storage> &call, const OwnRows &own, int first,
                                      const unsigned char *w_q, const float *vectors) {
  using T = typename Op::Storage;
  constexpr int W = Shape::W, H = Shape::HEADS;
  const InnerRows<Op> inner(own, first);
  if (inner.none) return;
  Tile q[1][Shape::NT], grad[1][Shape::NT];
  {
    Rows16<Op> x[1][Shape::KT];
    load_operands<Op, Shape>(x, call.x + inner.row * W, inner.count);
    project<Op, Shape>(q, x, w_q, vectors + Vectors<W>::kQuery);
  }
  load_tiles<T, Shape>(grad, call.sum_grad + inner.row * W, inner.count, false);
  const uint32_t bad = bad_rows<Op>(q, grad);
  if (bad) {
    clear_rows(q, bad);
    clear_rows(grad, bad);
  }
  put_inner<Op, Shape>(step.first, q);
  put_inner<Op, Shape>(step.second, grad);
  for (int i = lane_id(); i < 16 * H; i += kWarp) {
    const int row = i / H, head = i % H;
    QueryNumbers of = call.numbers[(inner.row + (row < inner.count ? row : inner.count - 1)) * H + head];
    if (bad >> row & 1) of.lse = NAN;
    numbers[head * kTileRows + 16 * warp_id() + row] = of;
  }
}

// Stores a gradient of the warp's rows as a factor of the gradient of a projection, and adds what comes through its
// matrix to that of the rows.
template <class Op, class Shape>
SNE_DEVICE void through_projection(Tile (&x_grad)[1][Shape::NT], const Tile (&grad)[Shape::HEADS][Shape::DT],
                                   float scale, const Call<typename Op::Storage> &call, const OwnRows &own,
                                   Factor which, const unsigned char *matrix) {
  constexpr int W = Shape::W;
  Tile c[1][Shape::NT];
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) c[0][j].c[e] = grad[j / Shape::DT][j % Shape::DT].c[e] * scale;
  }
  store_rows(call.factors + which * call.rows * W + own.row() * W, W, own.count(call.rows), c[0], 1.0f, 1.0f);
  Rows16<Op> rows[1][Shape::KT];
  to_operands<Op>(rows, c);
  multiply_by_rows<Op, W>(x_grad[0], rows[0], matrix);
}

template <class Op, class Shape>
SNE_KERNEL SNE_BOUNDS(kThreads, kBackwardBlocks<Op>) set_block_key_grad(Call<typename Op::Storage> call) {
  using At = KeyGradPlaces<Op, Shape>;
  constexpr int W = Shape::W, D = Shape::D, H = Shape::HEADS;
  unsigned char *memory = (unsigned char *)shared_memory();
  const float *vectors = (const float *)memory;
  const OwnMatrix<Op, Shape> keys(memory + At::kKeys), values(memory + At::kValues);
  const Step<Op, Shape> step(memory + At::kStep);
  QueryNumbers *numbers = (QueryNumbers *)(memory + At::kNumbers);
  load_vectors<typename Op::Storage, W>((float *)memory, call);
  load_matrix<Op, W>(memory + At::kQuery, call.w_q);
  load_matrix<Op, W>(memory + At::kKey, call.w_k);
  load_matrix<Op, W>(memory + At::kValue, call.w_v);
  copies_done();
  SNE_LOOP
  for (int64_t tile = block_id(); tile * kTileRows < call.rows; tile += num_blocks()) {
    const OwnRows own = own_rows(call, tile);
    if (tile == block_id()) sync_block();  // parameters are there
    {
      Rows16<Op> x[1][Shape::KT];
      Tile c[1][Shape::NT];
      load_own<Op, Shape>(x, call, call.x, own);
      project<Op, Shape>(c, x, memory + At::kKey);
      keys.put(c);
      project<Op, Shape>(c, x, memory + At::kValue);
      values.put(c);
    }
    Tile grad_k[H][Shape::DT] = {}, grad_v[H][Shape::DT] = {};
    SNE_LOOP
    for (int first = 0; first < own.inner; first += kTileRows) {
      sync_block();  // the step before has been read
      put_queries_and_grads<Op, Shape>(step, numbers, call, own, first, memory + At::kQuery, vectors);
      sync_block();
      for_seen_rows<Op, kBackwardGroups<Op, Shape>>(own, first, [&](int at, const auto &seen) {
        SNE_UNROLL
        for (int head = 0; head < H; ++head) {
          const int offset = at * Shape::kStride + head * D;
          Own<Op, D> k = keys.head(head), v = values.head(head);
          add_queries<Op, D, Shape::kStride, kBackwardGroups<Op, Shape>>(
              grad_k[head], grad_v[head], k, v, step.first + offset, step.second + offset,
              numbers + head * kTileRows + at, seen, kLog2e * Shape::kLogit);
        }
      });
    }
    if (own.count(call.rows) < 1) continue;
    Tile x_grad[1][Shape::NT] = {};
    through_projection<Op, Shape>(x_grad, grad_k, Shape::kLogit, call, own, kKeyGrad, memory + At::kKey);
    through_projection<Op, Shape>(x_grad, grad_v, 1.0f, call, own, kValueGrad, memory + At::kValue);
    Rows16<Op> grad_q[1][Shape::KT];
    load_own<Op, Shape>(grad_q, call, call.factors + kQueryGrad * call.rows * W, own);
    multiply_by_rows<Op, W>(x_grad[0], grad_q[0], memory + At::kQuery);
    store_rows(call.x_grad + own.row() * W, W, own.count(call.rows), x_grad[0], 1.0f, 1.0f);
  }
}

}  // namespace sne::set_block
