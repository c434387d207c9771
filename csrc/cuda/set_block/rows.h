// Rows of set_block: who owns them, and keys and values of the rows that a thread block walks through.
//
// A thread block owns a tile of 16 * kWarps packed rows, 16 of each warp, of as many sets as they belong to. It walks
// through the inner rows, those of all these sets, as many at a time: each warp projects 16 of them into shared memory,
// and all warps attend to those that their own rows see. Nothing of it is stored, so sets must be short. Rows of a warp
// that do not exist repeat the last one. A NaN of one set must not reach another: values that are not finite are stored
// as zeros, and their keys as NaN, which makes NaN of the weights of their own set alone.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/ptx/vectors.h"
#include "cuda/tiles/feed_forward.h"
#include "cuda/tiles/finite_rows.h"
#include "cuda/tiles/flash_attention.h"

namespace sne::set_block {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kTileRows = 16 * kWarps;

template <int width, int dim>
struct BlockShape {
  static constexpr bool kWarpgroup = false;
  static constexpr int W = width, D = dim, HEADS = W / D, MT = 1;
  static constexpr int NT = W / 8, KT = W / 16, DT = D / 8;
  static constexpr int kOutRows = 32;
  static constexpr int kStride = W + 8;  // values from row to row of inner rows
  static_assert(W == 32 || W == 64);
  static constexpr float kLogit = W == 64 ? 0.125f : 0.17677669529663687f;  // 1 / sqrt(W): factor of logits
};

template <class T>
struct Call {
  int64_t rows;
  bool layer_norm;
  const T *x;
  const int64_t *ptr, *owner;
  const T *w_q, *b_q, *w_k, *w_v, *b_v, *w_o, *b_o, *norm;
  T *out;
  const T *grad;
  T *factors, *sum_grad;  // (5, rows, h), (rows, h)
  QueryNumbers *numbers;  // (rows, H)
  float *norm_part;       // (thread blocks, 4, h)
  T *x_grad;
};

// ------------------------------------------------------------------------------------------------------ parameters

// Vectors in shared memory, as floats: the biases of q and v, and what feed_forward reads: the bias of fc_o, gains and
// biases of ln0 and ln1.
template <int W>
struct Vectors {
  static constexpr int kQuery = 0, kValue = W, kOut = 2 * W, kSize = 7 * W;
};

template <class T, int W>
SNE_DEVICE void load_vectors(float *to, const Call<T> &call) {
  using At = Vectors<W>;
  for (int i = thread_id(); i < W; i += num_threads()) {
    to[At::kQuery + i] = to_real(call.b_q[i]);
    to[At::kValue + i] = to_real(call.b_v[i]);
    to[At::kOut + i] = to_real(call.b_o[i]);
    SNE_UNROLL
    for (int k = 0; k < 4; ++k) to[At::kOut + (1 + k) * W + i] = call.layer_norm ? to_real(call.norm[k * W + i]) : 0.0f;
  }
}

// Starts to load a matrix (W, W) as the right operand of products.
template <class Op, int W>
SNE_DEVICE void load_matrix(unsigned char *to, const typename Op::Storage *from) {
  for (int i = thread_id(); i < W * W / 8; i += num_threads()) {
    const int row = int(unsigned(i) / (W / 8)), column = int(unsigned(i) % (W / 8)) * 8;
    const typename Op::Storage *at = from + 8 * i;
    if constexpr (Op::kPacked) {
      copy_async(to + core_index<Op>(row, column, W) * kSize<Op>, at);
    } else {
      const Words left = load_words(at), right = load_words(at + 4);
      SNE_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t values[4] = {left.w[odd], left.w[2 + odd], right.w[odd], right.w[2 + odd]};
        Words out;
        SNE_UNROLL
        for (int k = 0; k < 4; ++k) out.w[k] = bits_of_float(operand_value<Op>(float_of_bits(values[k])));
        store_words(to + core_index<Op>(row, column + odd, W) * kSize<Op>, out);
      }
    }
  }
}
// The same with its transpose.
template <class Op, int W>
SNE_DEVICE void load_transpose(unsigned char *to, const typename Op::Storage *from) {
  for (int i = thread_id(); i < W * W; i += num_threads()) {
    const int at = int(core_index<Op>(unsigned(i) % W, unsigned(i) / W, W));
    if constexpr (Op::kPacked)
      ((typename Op::Storage *)to)[at] = from[i];
    else
      ((typename Op::Storage *)to)[at] = operand_value<Op>(from[i]);
  }
}
template <class Op, int W>
constexpr int kMatrixBytes = W * W * int(sizeof(typename Op::Storage));

template <class Op>
SNE_DEVICE WeightSource<Op> whole_matrix(unsigned char *at) {
  return {nullptr, at, true, 0};
}

// ---------------------------------------------------------------------------------------------------------- own rows

// Inner rows from `from` to `to`, both in one register: a tile has fewer than 2^16.
struct Range {
  uint32_t bits;
  SNE_MEMBER int from() const { return int(bits & 0xffff); }
  SNE_MEMBER int to() const { return int(bits >> 16); }
};

// The 16 rows of a warp. Inner rows count from the first row of the tile's first set.
struct OwnRows {
  int64_t tile;
  int64_t begin;  // first inner row
  int inner;      // inner rows of the tile
  Range sees[2];  // inner rows that rows g and g + 8 see
  Range all;      // that the rows of the warp see
  bool one_set;   // whether they are all of one set

  SNE_MEMBER int64_t row() const { return tile * kTileRows + 16 * warp_id(); }  // first row of the warp
  // How many rows the warp has of all, none if below 1.
  SNE_MEMBER int count(int64_t rows) const { return row() + 16 < rows ? 16 : int(rows - row()); }
  SNE_MEMBER bool sees_any(int first, int rows) const { return first < all.to() && first + rows > all.from(); }
  SNE_MEMBER bool sees_all(int first, int rows) const {
    return one_set && first >= all.from() && first + rows <= all.to();
  }
};

template <class T>
SNE_DEVICE OwnRows own_rows(const Call<T> &call, int64_t tile) {
  OwnRows own;
  const int64_t first = tile * kTileRows, end = first + kTileRows < call.rows ? first + kTileRows : call.rows;
  own.begin = call.ptr[call.owner[first]];
  own.inner = int(call.ptr[call.owner[end - 1] + 1] - own.begin);
  own.tile = tile;
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = own.row() + lane_id() / 4 + 8 * half, set = call.owner[row < call.rows ? row : call.rows - 1];
    own.sees[half].bits = uint32_t(call.ptr[set] - own.begin) | uint32_t(call.ptr[set + 1] - own.begin) << 16;
  }
  const Range low{shuffle(own.sees[0].bits, 0)}, high{shuffle(own.sees[1].bits, 31)};
  own.all.bits = own.count(call.rows) < 1 ? 0 : uint32_t(low.from()) | uint32_t(high.to()) << 16;
  own.one_set = low.bits == high.bits;
  return own;
}

// The mask of a warp's own rows for inner rows from `first` on.
template <class Op>
struct OwnSets {
  const OwnRows &own;
  int first;
  SNE_MEMBER bool operator()(int n, int i) const {
    const int at = first + 8 * n + inner_row<Op>(i % 2);
    return at >= own.sees[i / 2].from() && at < own.sees[i / 2].to();
  }
};

// Loads 16 rows as left operand. Rows from `count` (at least 1) on repeat the last one.
template <class Op, class Shape>
SNE_DEVICE void load_operands(Rows16<Op> (&x)[1][Shape::KT], const typename Op::Storage *from, int count) {
  Own<Op, Shape::W> rows;
  rows.load(from, Shape::W, count);
  SNE_UNROLL
  for (int k = 0; k < Shape::KT; ++k) x[0][k] = rows.a[k];
}
template <class Op, class Shape>
SNE_DEVICE void load_own(Rows16<Op> (&x)[1][Shape::KT], const Call<typename Op::Storage> &call,
                         const typename Op::Storage *from, const OwnRows &own) {
  load_operands<Op, Shape>(x, from + own.row() * Shape::W, own.count(call.rows));
}

// Loads 16 rows as sums. Rows from `count` (at least 1) on repeat the last one or are zeros.
template <class T, class Shape>
SNE_DEVICE void load_tiles(Tile (&c)[1][Shape::NT], const T *from, int count, bool zeros) {
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane_id() / 4 + 8 * half;
    const bool there = row < count;
    const T *at = from + (there ? row : count - 1) * Shape::W + lane_id() % 4 * 2;
    SNE_UNROLL
    for (int j = 0; j < Shape::NT; ++j) {
      SNE_UNROLL
      for (int e = 0; e < 2; ++e) c[0][j].c[2 * half + e] = there || !zeros ? to_real(at[8 * j + e]) : 0.0f;
    }
  }
}

// Computes x times the transpose of a matrix, plus a bias if there is one.
template <class Op, class Shape>
SNE_DEVICE void project(Tile (&c)[1][Shape::NT], Rows16<Op> (&x)[1][Shape::KT], const unsigned char *matrix,
                        const float *bias = nullptr) {
  constexpr int N = Op::kPacked ? Shape::NT : Shape::NT / 2;
  SNE_UNROLL
  for (int first = 0; first < Shape::NT; first += N) {
    Tile part[1][N] = {};
    if (bias) fill_rows(part, bias + 8 * first);
    SNE_UNROLL
    for (int k = 0; k < Shape::KT; ++k) keep_whole(x[0][k]);
    multiply<false>(part, x, matrix + 8 * first * Shape::W * int(sizeof(typename Op::Storage)));
    SNE_UNROLL
    for (int n = 0; n < N; ++n) c[0][first + n] = part[0][n];
  }
}

// Computes the queries of a warp's rows.
template <class Op, class Shape>
SNE_DEVICE void own_queries(Tile (&q)[1][Shape::NT], const Call<typename Op::Storage> &call, const OwnRows &own,
                            const unsigned char *w_q, const float *vectors) {
  Rows16<Op> x[1][Shape::KT];
  load_own<Op, Shape>(x, call, call.x, own);
  project<Op, Shape>(q, x, w_q, vectors + Vectors<Shape::W>::kQuery);
}

// Own rows of all warps, a matrix in shared memory from which each warp reads 16, a head at a time: in registers all of
// them would be too many.
template <class Op, class Shape>
struct OwnMatrix {
  using T = typename Op::Storage;
  static constexpr int kBytes = kTileRows * Shape::kStride * int(sizeof(T));
  T *rows;  // of the warp
  SNE_MEMBER explicit OwnMatrix(unsigned char *at) : rows((T *)at + 16 * warp_id() * Shape::kStride) {}
  SNE_MEMBER void put(const Tile (&c)[1][Shape::NT]) const {
    SNE_UNROLL
    for (int j = 0; j < Shape::NT; ++j) store_tile(rows + 8 * j, Shape::kStride, c[0][j]);
    sync_warp();
  }
  SNE_MEMBER Own<Op, Shape::D> head(int head) const {
    Own<Op, Shape::D> out;
    out.load(rows + head * Shape::D, Shape::kStride, 16);
    return out;
  }
};

// -------------------------------------------------------------------------------------------------------- inner rows

// Groups of 16 inner rows that a warp takes at a time: floats fill the registers with one group.
template <class Op>
constexpr int kGroups = Op::kPacked ? 2 : 1;

// A step of inner rows in shared memory: two matrices, keys and values or queries and gradients.
template <class Op, class Shape>
struct Step {
  using T = typename Op::Storage;
  static constexpr int kValues = kTileRows * Shape::kStride, kBytes = 2 * kValues * int(sizeof(T));
  T *first, *second;
  SNE_MEMBER explicit Step(unsigned char *at) : first((T *)at), second((T *)at + kValues) {}
};

// The 16 inner rows of a warp in the step from `first` on.
template <class Op>
struct InnerRows {
  int64_t row;
  int count;
  bool none;  // of a group of which no row exists
  SNE_MEMBER InnerRows(const OwnRows &own, int first) {
    const int at = first + 16 * warp_id(), left = own.inner - at;
    row = own.begin + (left > 0 ? at : own.inner - 1);
    count = left < 1 ? 1 : left < 16 ? left : 16;
    none = first + warp_id() / kGroups<Op> * kGroups<Op> * 16 >= own.inner;
  }
};

template <class Op, class Shape>
SNE_DEVICE void put_inner(typename Op::Storage *to, const Tile (&c)[1][Shape::NT]) {
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j) store_tile(to + 16 * warp_id() * Shape::kStride + 8 * j, Shape::kStride, c[0][j]);
}

// Writes `value` to the rows of a warp whose bits are set.
template <class Op, class Shape>
SNE_DEVICE void put_in_bad_rows(typename Op::Storage *to, uint32_t bad, float value) {
  for (int row = 0; row < 16; ++row)
    if (bad >> row & 1)
      for (int i = lane_id(); i < Shape::W; i += kWarp)
        to[(16 * warp_id() + row) * Shape::kStride + i] = from_float<typename Op::Storage>(value);
}

// Projects keys and values of the warp's rows of a step, without biases: that of the keys is constant in the softmax,
// that of the values is added to their mean. Returns a bit for each row that is not finite: its values are zeros, its
// keys are `key`.
template <class Op, class Shape>
SNE_DEVICE uint32_t put_keys_and_values(const Step<Op, Shape> &step, const Call<typename Op::Storage> &call,
                                        const OwnRows &own, int first, const unsigned char *w_k,
                                        const unsigned char *w_v, float key) {
  const InnerRows<Op> inner(own, first);
  if (inner.none) return 0;
  Rows16<Op> x[1][Shape::KT];
  load_operands<Op, Shape>(x, call.x + inner.row * Shape::W, inner.count);
  Tile c[1][Shape::NT];
  project<Op, Shape>(c, x, w_k);
  uint32_t bad = bad_rows<Op>(c, c);
  put_inner<Op, Shape>(step.first, c);
  project<Op, Shape>(c, x, w_v);
  bad |= bad_rows<Op>(c, c);
  if (bad) clear_rows(c, bad);
  put_inner<Op, Shape>(step.second, c);
  if (bad) {
    sync_warp();
    put_in_bad_rows<Op, Shape>(step.first, bad, key);
  }
  return bad;
}

// Calls attend(where inner rows are in the step, mask) for all of them, some groups at a time, that the warp's rows
// see.
template <class Op, int groups, class Attend>
SNE_DEVICE void for_seen_rows(const OwnRows &own, int first, const Attend &attend) {
  constexpr int kRows = 16 * groups;
  SNE_LOOP
  for (int at = 0; at < kTileRows; at += kRows) {
    if (!own.sees_any(first + at, kRows)) continue;
    if (own.sees_all(first + at, kRows))
      attend(at, AllSeen{});
    else
      attend(at, OwnSets<Op>{own, first + at});
  }
}

// Attends from the warp's rows to the rows of their sets. Ends with the last step in shared memory; returns the bits of
// put_keys_and_values for it.
template <class Op, class Shape>
SNE_DEVICE uint32_t attend_to_sets(Softmax<Shape::D> (&s)[Shape::HEADS], const Call<typename Op::Storage> &call,
                                   const OwnRows &own, const OwnMatrix<Op, Shape> &queries, const Step<Op, Shape> &step,
                                   const unsigned char *w_q, const unsigned char *w_k, const unsigned char *w_v,
                                   const float *vectors) {
  {
    Tile q[1][Shape::NT];
    own_queries<Op, Shape>(q, call, own, w_q, vectors);
    queries.put(q);
  }
  SNE_UNROLL
  for (int head = 0; head < Shape::HEADS; ++head) s[head] = Softmax<Shape::D>{{-INFINITY, -INFINITY}, {}, {}};
  uint32_t bad = 0;
  SNE_LOOP
  for (int first = 0; first < own.inner; first += kTileRows) {
    sync_block();  // the step before has been read
    bad = put_keys_and_values<Op, Shape>(step, call, own, first, w_k, w_v, NAN);
    sync_block();
    for_seen_rows<Op, kGroups<Op>>(own, first, [&](int at, const auto &seen) {
      SNE_UNROLL
      for (int head = 0; head < Shape::HEADS; ++head) {
        const int offset = at * Shape::kStride + head * Shape::D;
        Own<Op, Shape::D> q = queries.head(head);
        attend<Op, Shape::D, Shape::kStride, kGroups<Op>>(s[head], q, step.first + offset, step.second + offset, seen,
                                                          kLog2e * Shape::kLogit);
      }
    });
  }
  return bad;
}

}  // namespace sne::set_block
