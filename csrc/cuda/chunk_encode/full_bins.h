// The forward of bins of 32 slots that one chunk of 32 elements fills, for 16-bit operands: what nearly all chunks are.
//
// Two warps of 16 rows hold a bin. Nothing is masked; sums over keys, rows and columns are matrix products, with ones
// where weights are summed. Between products rows are pairs of 16-bit numbers, as operands are, and gains, residuals,
// relu and codes take a pair at a time; sums of products, logits and the norms' means and variances are floats.
#pragma once

#include "cuda/chunk_encode/full_tiles.h"

namespace sne {

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
  sync_pair(set);
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

// Turns the logits of 32 keys, times `scale`, into powers of two, the largest of each row into 1.
SNE_DEVICE void exponentials_of_rows(Tile (&s)[4], float scale) {
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
      sync_pair(set);
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
      exponentials_of_rows(s, scale);
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
      if constexpr (!kTwoBuffers) sync_pair(set);
    }
    if constexpr (kGroup < Shape::HEADS) turn<kGroup * DT>(o);
  }
}

// What turns rows into (x - mean) / deviation: x scale + shift.
template <class Op, int KT>
SNE_DEVICE void row_norms(float (&scale)[2], float (&shift)[2], const Rows16<Op> (&x)[1][KT]) {
  using T = typename Op::Storage;
  Tile sum{};
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) product(sum, x[0][k], ones<Op>());
  float square[2];
  if constexpr (std::is_same_v<Op, OpBfloat>) {
    Tile squares{};
    SNE_UNROLL
    for (int k = 0; k < KT; ++k) {
      Rows16<Op> squared;
      SNE_UNROLL
      for (int part = 0; part < 4; ++part) squared.r[part] = multiply_add2<T>(x[0][k].r[part], x[0][k].r[part], 0);
      product(squares, squared, ones<Op>());
    }
    square[0] = squares.c[0], square[1] = squares.c[2];
  } else {  // squares may be above what a half can hold: the diagonals of x x^T, which are with the lane of column g
    Tile upper{}, lower{};
    SNE_UNROLL
    for (int k = 0; k < KT; ++k) {
      product(upper, x[0][k], cols8(x[0][k], 0));
      product(lower, x[0][k], cols8(x[0][k], 1));
    }
    const int g = lane_id() / 4, from = 4 * g + g / 2;
    square[0] = shuffle(g % 2 ? upper.c[1] : upper.c[0], from);
    square[1] = shuffle(g % 2 ? lower.c[3] : lower.c[2], from);
  }
  SNE_UNROLL
  for (int r = 0; r < 2; ++r) {
    constexpr float kShare = 1.0f / (16 * KT);
    const float mean = sum.c[2 * r] * kShare, variance = multiply_add(square[r], kShare, -mean * mean);
    scale[r] = rsqrt_fast(max_or_nan(variance, 0.0f) + 1e-5f);
    shift[r] = -mean * scale[r];
  }
}

// Multiplies rows by the gain of a norm and adds its bias.
template <class Op, int KT>
SNE_DEVICE void scale_and_shift_pairs(Rows16<Op> (&x)[1][KT], const float *gain_and_bias) {
  using T = typename Op::Storage;
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    const Words words = load_words(gain_and_bias + 16 * k + lane_id() % 4 * 4);
    SNE_UNROLL
    for (int part = 0; part < 4; ++part)
      x[0][k].r[part] = multiply_add2<T>(x[0][k].r[part], words.w[part / 2 * 2], words.w[part / 2 * 2 + 1]);
  }
}

// Feed-forward half of a block, as feed_forward in tile.h: from o to the rows x of the next block.
template <class Op, class Shape>
SNE_DEVICE void feed_forward_of_full(Rows16<Op> (&x)[1][Shape::KT], const Tile (&o)[1][Shape::NT],
                                     const WeightSource<Op> &weights, int block, const float *tile_vectors,
                                     bool layer_norm) {
  using T = typename Op::Storage;
  constexpr int W = Shape::W;
  const WeightLayout layout(W, Shape::D);
  const TileVectors at{W};
  to_operands<Op>(x, o);
  if (layer_norm) {
    float scale[2], shift[2];
    row_norms<Op>(scale, shift, x);
    Tile normalized[1][Shape::NT];
    SNE_UNROLL
    for (int j = 0; j < Shape::NT; ++j) {
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) normalized[0][j].c[e] = multiply_add(o[0][j].c[e], scale[e / 2], shift[e / 2]);
    }
    to_operands<Op>(x, normalized);
    scale_and_shift_pairs<Op>(x, tile_vectors + at.norm(block, 0));
  }
  Tile z[1][Shape::NT];
  fill_tiles<Shape::NT>(z[0], tile_vectors + at.out_bias(block));
  multiply<Shape::kWarpgroup>(z, x, weights.piece(layout.out(block), W * W));
  SNE_UNROLL
  for (int k = 0; k < Shape::KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part) {
      const float *pair = z[0][2 * k + part / 2].c + part % 2 * 2;
      x[0][k].r[part] = add2<T>(x[0][k].r[part], pack2_relu<T>(pair[0], pair[1]));
    }
  }
  if (layer_norm) {
    float scale[2], shift[2];
    row_norms<Op>(scale, shift, x);
    SNE_UNROLL
    for (int k = 0; k < Shape::KT; ++k) {
      SNE_UNROLL
      for (int part = 0; part < 4; ++part) {
        const int r = part % 2;
        x[0][k].r[part] = multiply_add2<T>(x[0][k].r[part], pack2<T>(scale[r], scale[r]), pack2<T>(shift[r], shift[r]));
      }
    }
    scale_and_shift_pairs<Op>(x, tile_vectors + at.norm(block, 1));
  }
}

template <class Op, class Shape>
SNE_DEVICE void add_codes_of_full(Rows16<Op> (&x)[1][Shape::KT], const typename Op::Storage *row_code,
                                  const typename Op::Storage *element_code, int part_of_bin) {
  using T = typename Op::Storage;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const T *row = row_code + 2 * t, *element = element_code + (16 * part_of_bin + g) * Shape::W + 2 * t;
  SNE_UNROLL
  for (int k = 0; k < Shape::KT; ++k) {
    SNE_UNROLL
    for (int part = 0; part < 4; ++part) {
      const int column = 16 * k + 8 * (part / 2);
      const uint32_t code =
          add2<T>(*(const uint32_t *)(row + column), *(const uint32_t *)(element + 8 * (part % 2) * Shape::W + column));
      x[0][k].r[part] = add2<T>(x[0][k].r[part], code);
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
  sync_pair(set);
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
  sync_pair(set);
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

// Writes the rows of a warp for the backward: as pieces in launches of full bins alone (full_backward.h).
template <class Op, class Shape>
SNE_DEVICE void save_full(typename Op::Storage *to, const Rows16<Op> (&x)[1][Shape::KT], bool pieces) {
  if (!pieces)
    save_rows<Op, Shape>(to, x);
  else
    store_pieces<Op>(to, x[0]);
}

// Takes a bin from its values to its pooled rows or, where `saved` is not null, to the inputs of blocks 1 to 3 and of
// the pool: planes of rows, of which `saved` points to this warp's first one.
template <class Op, class Shape>
SNE_DEVICE void encode_full_bin(const ChunkCall<typename Op::Storage> &call, const WeightSource<Op> &weights,
                                const float *vectors, const float *tile_vectors, const WarpMemory<Op, Shape> &memory,
                                const SetOfWarps &set, bool layer_norm, int64_t chunk, typename Op::Storage *out,
                                typename Op::Storage *saved, int64_t plane) {
  constexpr int W = Shape::W;
  const bool as_pieces = call.cls.min_length == kFullLength;
  const Pieces<Op> pieces{memory.exchange,
                          set.part ? -WarpMemory<Op, Shape>::kExchange : WarpMemory<Op, Shape>::kExchange};
  Tile o[1][Shape::NT];
  Rows16<Op> x[1][Shape::KT];
  scalar_block<Op, Shape>(o, to_real(call.values[call.chunk_ptr[chunk] + lane_id()]), vectors,
                          tile_vectors + TileVectors{W}.slopes(), memory, set);
  feed_forward_of_full<Op, Shape>(x, o, weights, 0, tile_vectors, layer_norm);
  SNE_LOOP
  for (int block = 1; block < 4; ++block) {
    if (block == 2) add_codes_of_full<Op, Shape>(x, call.row_code + call.owner[chunk] * W, call.element_code, set.part);
    if (saved) save_full<Op, Shape>(saved + (block - 1) * plane, x, as_pieces);
    attention_of_full<Op, Shape>(o, x, weights, block, tile_vectors, pieces, set);
    feed_forward_of_full<Op, Shape>(x, o, weights, block, tile_vectors, layer_norm);
  }
  if (saved)
    save_full<Op, Shape>(saved + 3 * plane, x, as_pieces);
  else
    pool_of_full<Op, Shape>(x, weights, memory, pieces, set, out + chunk * Shape::HEADS * W);
  sync_pair(set);
}

}  // namespace sne
