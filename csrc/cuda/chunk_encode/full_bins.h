// The forward of bins of 32 slots that one chunk of 32 elements fills, for 16-bit operands: what nearly all chunks are.
//
// Two warps of 16 rows hold a bin. Nothing is masked; sums over keys and rows are matrix products, with ones where
// weights are summed; a norm's mean and variance are sums of one pass, as operands lose more than these do.
#pragma once

#include "cuda/chunk_encode/forward_call.h"
#include "cuda/ptx/vectors.h"

namespace sne {

constexpr int kFullLength = 32;

template <class Op, class Shape>
constexpr bool kHasFullBins =
    Op::kPacked && Shape::MT == 1 && Shape::W <= 64;  // weights that can stay in shared memory

// Vectors in shared memory as the registers of tiles: for 8 columns 16 floats, a lane's pair of columns twice, one 16
// byte load for both rows of a lane. Of each block fc_o's bias, of blocks 1 to 3 the biases of q, 0 (the bias of k is
// the same for all keys) and v; behind those slope and offset of block 0's logits in powers of 2, (heads, 2).
struct TileVectors {
  int h;
  SNE_HOST_DEVICE int out_bias(int block) const { return 2 * h * block; }
  SNE_HOST_DEVICE int qkv_bias(int block, int which) const { return 2 * h * (4 + 3 * (block - 1) + which); }
  SNE_HOST_DEVICE int slopes() const { return 2 * h * 13; }
  SNE_HOST_DEVICE int size() const { return slopes() + 16; }
};

// Returns how many floats of vectors a forward kernel keeps in shared memory.
template <class Op, class Shape>
SNE_HOST_DEVICE constexpr int forward_vectors() {
  return 32 * Shape::W + (kHasFullBins<Op, Shape> ? 26 * Shape::W + 16 : 0);
}

template <class T>
SNE_DEVICE void load_tile_vectors(float *to, int h, int heads, const T *logit, const T *b_o, const T *b_qkv) {
  const TileVectors at{h};
  for (int i = thread_id(); i < at.size(); i += num_threads()) {
    const int vector = i / (2 * h), place = i % (2 * h), column = place / 16 * 8 + place / 4 % 4 * 2 + place % 2;
    float v = 0;
    if (vector < 4)
      v = to_real(b_o[vector * h + column]);
    else if (vector < 13 && (vector - 4) % 3 != 1)
      v = to_real(b_qkv[(vector - 4) * h + column]);
    else if (vector == 13 && place < 2 * heads)
      v = to_real(logit[place % 2 * heads + place / 2]) * kLog2e;
    to[i] = v;
  }
}

template <int N>
SNE_DEVICE void fill_tiles(Tile *c, const float *vectors) {
  SNE_UNROLL
  for (int n = 0; n < N; ++n) {
    const Words words = load_words(vectors + 16 * n + lane_id() % 4 * 4);
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) c[n].c[e] = float_of_bits(words.w[e]);
  }
}

// The right operand of a product that sums rows of the left one.
template <class Op>
SNE_DEVICE Cols8<Op> ones() {
  const uint32_t pair = pack2<typename Op::Storage>(1.0f, 1.0f);
  return {{pair, pair}};
}

// The two warps of a bin exchange pieces of 16 x 16 operands through shared memory.
template <class Op>
struct Pieces {
  unsigned char *own;
  int to_other;  // bytes to the memory of the other warp
  SNE_MEMBER void put(int at, const Rows16<Op> &rows) const { store_matrices(own + at, rows.r); }
  // The right operand of a product over columns: the rows of a piece.
  SNE_MEMBER Rows16<Op> rows_of_other(int at) const {
    Rows16<Op> out;
    load_matrices<4>(out.r, own + to_other + at + lane_id() * 16);
    return out;
  }
  // Right operands of a product over the rows of a piece, of the own warp (0) or the other one: columns 0..7, 8..15.
  SNE_MEMBER void columns(Cols8<Op> (&out)[2], int which, int at) const {
    uint32_t r[4];
    load_matrices_transposed<4>(r, own + which * to_other + at + lane_id() * 16);
    out[0].r[0] = r[0], out[0].r[1] = r[1], out[1].r[0] = r[2], out[1].r[1] = r[3];
  }
};

// Block 0: o from the values of the chunk, of which every lane has one.
template <class Op, class Shape>
SNE_DEVICE void scalar_block(Tile (&o)[1][Shape::NT], float value, const float *vectors, const float *slopes,
                             const WarpMemory<Op, Shape> &memory, const SetOfWarps &set) {
  using T = typename Op::Storage;
  constexpr int H = Shape::HEADS, W = Shape::W;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  if (lane / 16 == set.part) memory.values[lane % 16] = value;
  float low = value, high = value;
  SNE_UNROLL
  for (int mask = 1; mask < 32; mask *= 2)
    low = min_of(low, shuffle_xor(low, mask)), high = max_of(high, shuffle_xor(high, mask));
  set.sync();
  const float *values = memory.values - 16 * set.part;
  float key[4][2];    // keys 8 m + 2 t, and the next one
  Cols8<Op> sums[2];  // columns of values and of ones, by turns
  SNE_UNROLL
  for (int m = 0; m < 4; ++m) {
    key[m][0] = values[8 * m + 2 * t], key[m][1] = values[8 * m + 2 * t + 1];
    sums[m / 2].r[m % 2] = g % 2 ? ones<Op>().r[0] : pack2<T>(key[m][0], key[m][1]);
  }
  const float row[2] = {memory.values[g], memory.values[g + 8]};
  float mean[2][H];
  SNE_UNROLL
  for (int head = 0; head < H; ++head) {
    Tile p[4], c{};
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float slope = slopes[2 * head] * row[r] + slopes[2 * head + 1];
      const float shift = slope * (slope >= 0 ? high : low);  // the largest logit
      SNE_UNROLL
      for (int m = 0; m < 4; ++m) {
        SNE_UNROLL
        for (int e = 0; e < 2; ++e) p[m].c[2 * r + e] = exp2_fast(multiply_add(slope, key[m][e], -shift));
      }
    }
    SNE_UNROLL
    for (int i = 0; i < 2; ++i) product(c, rows16<Op>(p[2 * i], p[2 * i + 1]), sums[i]);
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) mean[r][head] = c.c[2 * r] * reciprocal_fast(c.c[2 * r + 1]);
  }
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * j + 2 * t + e;
      const float by_value = vectors[column], by_mean = vectors[W + column], constant = vectors[2 * W + column];
      SNE_UNROLL
      for (int r = 0; r < 2; ++r)
        o[0][j].c[2 * r + e] = multiply_add(mean[r][j / Shape::DT], by_mean, multiply_add(row[r], by_value, constant));
    }
  }
}

// Computes o = q + attention(q, k, v) of every head, from the rows x as operands.
template <class Op, class Shape>
SNE_DEVICE void attention_of_full(Tile (&o)[1][Shape::NT], const Rows16<Op> (&x)[1][Shape::KT],
                                  const WeightSource<Op> &weights, int block, const float *tile_vectors,
                                  const Pieces<Op> &pieces, const SetOfWarps &set) {
  constexpr int D = Shape::D, DT = Shape::DT, DK = Shape::DK, W = Shape::W;
  constexpr int kGroup = Shape::HEADS < 4 ? Shape::HEADS : 4, kBytes = 512 * DK;
  constexpr bool kTwoBuffers = WarpMemory<Op, Shape>::kTwoBuffers;
  const WeightLayout layout(W, D);
  const TileVectors at{W};
  const float scale = kLog2e / __builtin_sqrtf(float(W));
  SNE_LOOP
  for (int first = 0; first < Shape::HEADS; first += kGroup) {
    SNE_UNROLL
    for (int sub = 0; sub < kGroup; ++sub) {
      const int head = first + sub, keys = kTwoBuffers ? sub % 2 * 2 * kBytes : 0, values = keys + kBytes;
      const int64_t offset = layout.qkv(block, head);
      Tile q[1][DT];
      Rows16<Op> q_rows[1][DK], k_rows[1][DK];
      const auto put = [&](int to, const Rows16<Op>(&rows)[1][DK]) {
        SNE_UNROLL
        for (int k = 0; k < DK; ++k) pieces.put(to + 512 * k, rows[0][k]);
      };
      Rows16<Op> v_rows[1][DK];
      if constexpr (D <= 32) {  // one product, which keeps tensor cores busy
        Tile c[1][3 * DT], k[1][DT], v[1][DT];
        SNE_UNROLL
        for (int which = 0; which < 3; ++which)
          fill_tiles<DT>(c[0] + which * DT, tile_vectors + at.qkv_bias(block, which) + 2 * D * head);
        multiply<Shape::kWarpgroup>(c, x, weights.piece(offset, 3 * D * W));
        SNE_UNROLL
        for (int n = 0; n < DT; ++n) q[0][n] = c[0][n], k[0][n] = c[0][DT + n], v[0][n] = c[0][2 * DT + n];
        head_operands<Op, Shape>(k_rows, k);
        head_operands<Op, Shape>(v_rows, v);
      } else {
        fill_tiles<DT>(q[0], tile_vectors + at.qkv_bias(block, 1) + 2 * D * head);
        multiply<Shape::kWarpgroup>(q, x, weights.piece(offset + D * W, D * W));
        head_operands<Op, Shape>(k_rows, q);
        fill_tiles<DT>(q[0], tile_vectors + at.qkv_bias(block, 2) + 2 * D * head);
        multiply<Shape::kWarpgroup>(q, x, weights.piece(offset + 2 * D * W, D * W));
        head_operands<Op, Shape>(v_rows, q);
        fill_tiles<DT>(q[0], tile_vectors + at.qkv_bias(block, 0) + 2 * D * head);
        multiply<Shape::kWarpgroup>(q, x, weights.piece(offset, D * W));
      }
      put(keys, k_rows);
      put(values, v_rows);
      head_operands<Op, Shape>(q_rows, q);
      set.sync();
      Tile s[4] = {};  // the own warp's keys, then the other one's
      SNE_UNROLL
      for (int k = 0; k < DK; ++k) {
        const Rows16<Op> others = pieces.rows_of_other(keys + 512 * k);
        SNE_UNROLL
        for (int half = 0; half < 2; ++half) {
          head_product<Shape>(s[half], q_rows[0][k], cols8(k_rows[0][k], half));
          head_product<Shape>(s[2 + half], q_rows[0][k], cols8(others, half));
        }
      }
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float top = max_of(s[0].c[2 * r], s[0].c[2 * r + 1]);
        SNE_UNROLL
        for (int n = 1; n < 4; ++n) top = max_of(top, max_of(s[n].c[2 * r], s[n].c[2 * r + 1]));
        const float shift = -scale * max_over_quad(top);
        SNE_UNROLL
        for (int n = 0; n < 4; ++n) {
          SNE_UNROLL
          for (int e = 2 * r; e < 2 * r + 2; ++e) s[n].c[e] = exp2_fast(multiply_add(s[n].c[e], scale, shift));
        }
      }
      Tile attended[DT] = {}, total{};
      SNE_UNROLL
      for (int m = 0; m < 2; ++m) {
        const Rows16<Op> p = rows16<Op>(s[2 * m], s[2 * m + 1]);
        product(total, p, ones<Op>());
        SNE_UNROLL
        for (int k = 0; k < DK; ++k) {
          Cols8<Op> columns[2];
          pieces.columns(columns, m, values + 512 * k);
          SNE_UNROLL
          for (int half = 0; half < (D == 8 ? 1 : 2); ++half) product(attended[2 * k + half], p, columns[half]);
        }
      }
      const float inverse[2] = {reciprocal_fast(total.c[0]), reciprocal_fast(total.c[2])};
      SNE_UNROLL
      for (int n = 0; n < DT; ++n) {
        SNE_UNROLL
        for (int e = 0; e < 4; ++e)
          o[0][sub * DT + n].c[e] = multiply_add(attended[n].c[e], inverse[e / 2], q[0][n].c[e]);
      }
      if constexpr (!kTwoBuffers) set.sync();
    }
    if constexpr (kGroup < Shape::HEADS) turn<kGroup * DT>(o);
  }
}

// Turns o into (o - mean) / deviation.
template <int NT>
SNE_DEVICE void normalize_once(Tile (&o)[NT]) {
  SNE_UNROLL
  for (int r = 0; r < 2; ++r) {
    float sum = 0, square = 0;
    SNE_UNROLL
    for (int j = 0; j < NT; ++j) {
      SNE_UNROLL
      for (int e = 2 * r; e < 2 * r + 2; ++e) sum += o[j].c[e], square = multiply_add(o[j].c[e], o[j].c[e], square);
    }
    const float mean = sum_over_quad(sum) * (1.0f / (8 * NT));
    const float variance = multiply_add(-mean, mean, sum_over_quad(square) * (1.0f / (8 * NT)));
    const float rstd = rsqrt_fast((variance < 0 ? 0.0f : variance) + 1e-5f), shift = -mean * rstd;
    SNE_UNROLL
    for (int j = 0; j < NT; ++j) {
      SNE_UNROLL
      for (int e = 2 * r; e < 2 * r + 2; ++e) o[j].c[e] = multiply_add(o[j].c[e], rstd, shift);
    }
  }
}

// Feed-forward half of a block, as feed_forward in tile.h.
template <class Op, class Shape>
SNE_DEVICE void feed_forward_of_full(Tile (&o)[1][Shape::NT], const WeightSource<Op> &weights, int64_t offset,
                                     const float *out_bias, const float *norm, bool layer_norm) {
  constexpr int W = Shape::W, N = W / 8;
  if (layer_norm) {
    normalize_once(o[0]);
    scale_and_shift(o, norm, norm + W);
  }
  Rows16<Op> x[1][Shape::KT];
  to_operands<Op>(x, o);
  Tile z[1][N];
  fill_tiles<N>(z[0], out_bias);
  multiply<Shape::kWarpgroup>(z, x, weights.piece(offset, W * W));
  SNE_UNROLL
  for (int n = 0; n < N; ++n) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) o[0][n].c[e] += max_or_nan(z[0][n].c[e], 0.0f);
  }
  if (layer_norm) {
    normalize_once(o[0]);
    scale_and_shift(o, norm + 2 * W, norm + 3 * W);
  }
}

template <class T>
SNE_DEVICE void add_pair(float &first, float &second, const T *at) {
  const uint32_t pair = *(const uint32_t *)at;
  first += to_real(T{uint16_t(pair)}), second += to_real(T{uint16_t(pair >> 16)});
}

template <class Shape, class T>
SNE_DEVICE void add_codes_of_full(Tile (&o)[1][Shape::NT], const T *row_code, const T *element_code, int part) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const T *row = row_code + 2 * t, *element = element_code + (16 * part + g) * Shape::W + 2 * t;
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      add_pair(o[0][j].c[2 * r], o[0][j].c[2 * r + 1], row + 8 * j);
      add_pair(o[0][j].c[2 * r], o[0][j].c[2 * r + 1], element + 8 * r * Shape::W + 8 * j);
    }
  }
}

// Pools the chunk to out (H, h): the softmax of <query_a, x> over its rows, and the sum of its rows with these weights.
template <class Op, class Shape>
SNE_DEVICE void pool_of_full(const Rows16<Op> (&x)[1][Shape::KT], const WeightSource<Op> &weights,
                             const WarpMemory<Op, Shape> &memory, const Pieces<Op> &pieces, const SetOfWarps &set,
                             typename Op::Storage *out) {
  using T = typename Op::Storage;
  constexpr int W = Shape::W, KT = Shape::KT, kWeights = 512 * KT;  // behind the rows
  const WeightLayout layout(W, Shape::D);
  const int lane = lane_id(), g = lane / 4, t = lane % 4, other = set.part ? -1 : 1;
  Tile logits[1][1] = {};
  multiply<Shape::kWarpgroup>(logits, x, weights.piece(layout.queries(), 8 * W));
  float (&logit)[4] = logits[0][0].c, top[2];  // of heads 2 t and 2 t + 1
  SNE_UNROLL
  for (int e = 0; e < 2; ++e) {
    top[e] = max_of(logit[e], logit[2 + e]);
    SNE_UNROLL
    for (int mask = 4; mask < 32; mask *= 2) top[e] = max_of(top[e], shuffle_xor(top[e], mask));
    if (g == 0) memory.tops[2 * t + e] = top[e];
  }
  set.sync();
  SNE_UNROLL
  for (int e = 0; e < 2; ++e) {
    const float shift = -kLog2e * max_of(top[e], memory.tops[8 * other + 2 * t + e]);
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) logit[2 * r + e] = exp2_fast(multiply_add(logit[2 * r + e], kLog2e, shift));
  }
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) pieces.put(512 * k, x[0][k]);
  uint32_t *weight = (uint32_t *)(pieces.own + kWeights) + 2 * lane;  // of head g and rows 2 t.., 8 + 2 t..
  weight[0] = transpose8(pack2<T>(logit[0], logit[1]));
  weight[1] = transpose8(pack2<T>(logit[2], logit[3]));
  set.sync();
  Tile sum[KT] = {}, total{};  // of this warp's half of the columns
  SNE_UNROLL
  for (int m = 0; m < 2; ++m) {
    const uint32_t *at = (const uint32_t *)(pieces.own + m * pieces.to_other + kWeights) + 2 * lane;
    const Rows16<Op> p{{at[0], 0, at[1], 0}};
    product(total, p, ones<Op>());
    SNE_UNROLL
    for (int k = 0; k < KT / 2; ++k) {
      Cols8<Op> columns[2];
      pieces.columns(columns, m, 512 * (set.part * (KT / 2) + k));
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) product(sum[2 * k + half], p, columns[half]);
    }
  }
  if (g < Shape::HEADS) {
    const float inverse = reciprocal_fast(total.c[0]);
    T *to = out + g * W + set.part * (W / 2) + 2 * t;
    SNE_UNROLL
    for (int j = 0; j < KT; ++j) *(uint32_t *)(to + 8 * j) = pack2<T>(sum[j].c[0] * inverse, sum[j].c[1] * inverse);
  }
}

// Takes a bin from its values to its pooled rows or, where `saved` is not null, to the inputs of blocks 1 to 3 and of
// the pool: planes of rows, of which `saved` points to this warp's first one.
template <class Op, class Shape>
SNE_DEVICE void encode_full_bin(const ChunkCall<typename Op::Storage> &call, const WeightSource<Op> &weights,
                                const float *vectors, const float *tile_vectors, const WarpMemory<Op, Shape> &memory,
                                const SetOfWarps &set, bool layer_norm, int64_t chunk, typename Op::Storage *out,
                                typename Op::Storage *saved, int64_t plane) {
  constexpr int W = Shape::W;
  const WeightLayout layout(W, Shape::D);
  const VectorLayout at{W};
  const TileVectors tiles{W};
  const Pieces<Op> pieces{memory.exchange,
                          set.part ? -WarpMemory<Op, Shape>::kExchange : WarpMemory<Op, Shape>::kExchange};
  Tile o[1][Shape::NT];
  scalar_block<Op, Shape>(o, to_real(call.values[call.chunk_ptr[chunk] + lane_id()]), vectors,
                          tile_vectors + tiles.slopes(), memory, set);
  feed_forward_of_full<Op, Shape>(o, weights, layout.out(0), tile_vectors, vectors + at.norm(0), layer_norm);
  Rows16<Op> x[1][Shape::KT];
  SNE_LOOP
  for (int block = 1; block < 4; ++block) {
    if (block == 2) add_codes_of_full<Shape>(o, call.row_code + call.owner[chunk] * W, call.element_code, set.part);
    to_operands<Op>(x, o);
    if (saved) save_rows<Op, Shape>(saved + (block - 1) * plane, x);
    attention_of_full<Op, Shape>(o, x, weights, block, tile_vectors, pieces, set);
    feed_forward_of_full<Op, Shape>(o, weights, layout.out(block), tile_vectors + tiles.out_bias(block),
                                    vectors + at.norm(block), layer_norm);
  }
  to_operands<Op>(x, o);
  if (saved)
    save_rows<Op, Shape>(saved + 3 * plane, x);
  else
    pool_of_full<Op, Shape>(x, weights, memory, pieces, set, out + chunk * Shape::HEADS * W);
  set.sync();
}

}  // namespace sne
