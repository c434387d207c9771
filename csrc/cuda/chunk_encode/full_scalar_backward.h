// Backward of block 0 of chunk_encode (docs/method.md 4.1) for full bins: from the gradient of its rows to that of the
// values, with the gradients of its parameters.
//
// With the softmax weights p_ij of a head, y_j = (x_j - c) / r for the middle c of the chunk's values and half their
// range r, and m_i the mean of y over p_i: a row's gradient G_i of the mean of x is that of its slope times the
// variance of x, and gives value j the gradient p_ij (u_i + w_i y_j) with w_i = G_i slope_i r and u_i = G_i - w_i m_i.
// So sums of y, y^2, u and w with p as weights are all there is: products with matrices of few columns.
#pragma once

#include "cuda/chunk_encode/full_backward.h"

namespace sne {
namespace {

// Shared memory of a warp, as offsets in bytes.
template <class Shape>
struct ScalarPlaces {
  static constexpr int kHeads = Shape::HEADS, kGroups = (kHeads + 3) / 4, kRows = Shape::KT * kPieceBytes;
  static constexpr int kFactors = kHeads + 2 <= 8 ? 8 : 16;  // columns of what o is made of, 16 rows of each
  static SNE_MEMBER constexpr int weights(int head) { return 2 * kPieceBytes * head; }
  static constexpr int kInputs = weights(kHeads), kOutputs = kInputs + kRows;  // of fc_o
  static constexpr int kScratch = kOutputs + kRows;
  static constexpr int kSums = kScratch + kRows;  // u and w, as operands: 16 rows, 8 columns of each group of heads
  static constexpr int kOfRows = kSums + 256 * kGroups, kBytes = kOfRows + 64 * kFactors;
};

// What a lane keeps of rows g and g + 8 for the heads 4 i + t.
template <int groups>
struct ScalarRows {
  float slope[groups][2], inverse[groups][2], mean[groups][2], variance[groups][2];  // mean and variance of y
};

template <class Op>
SNE_DEVICE float rounded(float v) {
  return to_real(from_float<typename Op::Storage>(v));
}

// Computes o from the values of the chunk, of which every lane has one, and keeps the softmax weights as pieces.
// factors: the columns 1, x, means by head of what o is made of.
template <class Op, class Shape>
SNE_DEVICE void scalar_block_again(Tile (&o)[1][Shape::NT], ScalarRows<(Shape::HEADS + 3) / 4> &kept,
                                   const float (&row)[2], const float (&key)[4][2], float centre, float radius,
                                   const float *vectors, const float *slopes, unsigned char *own, float low,
                                   float high) {
  using At = ScalarPlaces<Shape>;
  using T = typename Op::Storage;
  constexpr int H = Shape::HEADS, W = Shape::W;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const float per_radius = radius > 0 ? 1.0f / radius : radius;  // values that are not finite stay so
  Cols8<Op> values[2], squares[2];                               // columns x and 1, and y^2 in two parts, by turns
  SNE_UNROLL
  for (int m = 0; m < 4; ++m) {
    float part[2];
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float y = (key[m][e] - centre) * per_radius, square = y * y, upper = rounded<Op>(square);
      part[e] = g % 2 ? square - upper : upper;
    }
    values[m / 2].r[m % 2] = g % 2 ? ones<Op>().r[0] : pack2<T>(key[m][0], key[m][1]);
    squares[m / 2].r[m % 2] = pack2<T>(part[0], part[1]);
  }
  float *factors = (float *)(own + At::kOfRows);
  if (t == 0) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      factors[g + 8 * r] = 1.0f;
      factors[16 + g + 8 * r] = row[r];
      SNE_UNROLL
      for (int column = H + 2; column < At::kFactors; ++column) factors[16 * column + g + 8 * r] = 0.0f;
    }
  }
  float mean[2][H];
  SNE_UNROLL
  for (int head = 0; head < H; ++head) {
    Tile p[4], sum{}, square{};
    float slope[2];
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      slope[r] = slopes[2 * head] * row[r] + slopes[2 * head + 1];
      const float shift = slope[r] * (slope[r] >= 0 ? high : low);  // the largest logit
      SNE_UNROLL
      for (int m = 0; m < 4; ++m) {
        SNE_UNROLL
        for (int e = 0; e < 2; ++e) p[m].c[2 * r + e] = exp2_fast(multiply_add(slope[r], key[m][e], -shift));
      }
    }
    SNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Rows16<Op> weights = rows16<Op>(p[2 * i], p[2 * i + 1]);
      put_piece(own + At::weights(head) + i * kPieceBytes, weights);
      product(sum, weights, values[i]);
      product(square, weights, squares[i]);
    }
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float inverse = reciprocal_fast(sum.c[2 * r + 1]);
      mean[r][head] = sum.c[2 * r] * inverse;
      if (t == head % 4) {
        const float of_y = (mean[r][head] - centre) * per_radius;
        kept.slope[head / 4][r] = slope[r], kept.inverse[head / 4][r] = inverse, kept.mean[head / 4][r] = of_y;
        kept.variance[head / 4][r] = (square.c[2 * r] + square.c[2 * r + 1]) * inverse - of_y * of_y;
        factors[16 * (2 + head) + g + 8 * r] = mean[r][head];
      }
    }
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

struct FullScalarGrads {
  FullVectorParts vectors;
  float *logit, *basis, *w_o;  // (multiprocessors, 2, H), (.., 3, h), (.., h, h)
};

// Vectors of block 0 in shared memory: the basis (3, h) and, of each group of 4 heads, the right operands of a product
// with a row's gradient: column 2 i is basis 1 in the columns of head i of the group, and odd columns are basis 0.
template <class Op, class Shape>
struct ScalarVectors {
  static constexpr int kOperands = 3 * Shape::W;
  static constexpr int kSize = kOperands + ScalarPlaces<Shape>::kGroups * Shape::KT * 64;
  static SNE_MEMBER void load(float *to, const typename Op::Storage *basis) {
    constexpr int W = Shape::W;
    for (int i = thread_id(); i < kSize; i += num_threads()) {
      if (i < kOperands) {
        to[i] = to_real(basis[i]);
        continue;
      }
      const int at = i - kOperands, lane = at / 2 % 32, k = at / 64 % Shape::KT, group = at / 64 / Shape::KT;
      const int column = 16 * k + at % 2 * 8 + lane % 4 * 2, g = lane / 4;
      const typename Op::Storage *from = basis + (g % 2 ? 0 : W) + column;
      const bool used = g % 2 || column / Shape::D == 4 * group + g / 2;
      ((uint32_t *)to)[i] = used ? uint32_t(from[0].bits) | uint32_t(from[1].bits) << 16 : 0;
    }
  }
};

template <class Op, class Shape>
SNE_KERNEL SNE_BOUNDS(32 * kFullWarps, 1)
    chunk_full_scalar_backward(ChunkCall<typename Op::Storage> call, const typename Op::Storage *rows_grad,
                               bool layer_norm, typename Op::Storage *values_grad, FullScalarGrads grads) {
  using T = typename Op::Storage;
  using At = ScalarPlaces<Shape>;
  constexpr int W = Shape::W, KT = Shape::KT, NT = Shape::NT, H = Shape::HEADS, G = At::kGroups;
  const TileVectors at{W};
  float *tile_vectors = (float *)shared_memory(), *vectors = tile_vectors + at.size();
  unsigned char *memory = (unsigned char *)(vectors + ScalarVectors<Op, Shape>::kSize);
  unsigned char *weights_at = memory + kFullWarps * At::kBytes, *own = memory + warp_id() * At::kBytes;
  const WeightSource<Op> weights{call.prepared, weights_at, true, 0};
  load_tile_vectors(tile_vectors, W, H, call.logit, call.b_o, call.b_qkv, layer_norm ? call.norm : nullptr);
  ScalarVectors<Op, Shape>::load(vectors, call.basis);
  weights.copy(0, W * W);
  const SetOfWarps set = set_of_warps(call.cls, 16);
  const int to_other = set.part ? -At::kBytes : At::kBytes;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;

  // A warp has 16 rows of the matrix's gradient, and of those some columns.
  constexpr int kPieces = KT / (kFullWarps / KT) ? KT / (kFullWarps / KT) : 1;  // of 16 columns
  const int matrix_row = warp_id() % KT, matrix_piece = warp_id() / KT * kPieces;
  const bool has_part = matrix_piece < KT;
  Tile matrix_sums[1][2 * kPieces] = {}, sums[KT] = {}, basis_sums[At::kFactors / 8][KT] = {};
  float logit_sums[G][2] = {}, logit[G];
  SNE_UNROLL
  for (int group = 0; group < G; ++group) logit[group] = 4 * group + t < H ? to_real(call.logit[4 * group + t]) : 0.0f;
  const int64_t per_step = kFullBinsAtOnce;
  const FilledBins bins = filled_bins(call);
  for (int64_t step = block_id(); step * per_step < bins.count; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / 2;
    const bool there = local < bins.count;
    const int64_t begin = there ? call.chunk_ptr[call.order[bins.first + local]] : 0;
    const float value = there ? to_real(call.values[begin + lane]) : 0.0f;
    float low = value, high = value;
    SNE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2)
      low = min_of(low, shuffle_xor(low, mask)), high = max_of(high, shuffle_xor(high, mask));
    const float centre = 0.5f * (low + high), radius = 0.5f * (high - low);
    float row[2], key[4][2];  // values of the lane's rows, and of its keys: the own warp's, then the other one's
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) row[r] = shuffle(value, 16 * set.part + 8 * r + g);
    SNE_UNROLL
    for (int m = 0; m < 4; ++m) {
      SNE_UNROLL
      for (int e = 0; e < 2; ++e) key[m][e] = shuffle(value, (16 * set.part + 8 * m + 2 * t + e) % 32);
    }
    Rows16<Op> grad[1][KT];
    ScalarRows<G> kept{};
    {
      HalfBlock<Op, Shape> half;
      Tile o[1][NT];
      scalar_block_again<Op, Shape>(o, kept, row, key, centre, radius, vectors, tile_vectors + at.slopes(), own, low,
                                    high);
      feed_forward_again<Op, Shape>(half, o, weights, 0, tile_vectors, layer_norm, own + At::kInputs);
      load_pieces<Op>(grad[0], rows_grad + (local * kFullLength + set.part * 16) * W, there);
      feed_forward_grad<Op, Shape>(grad, half, weights, 0, tile_vectors, layer_norm, own + At::kOutputs,
                                   own + At::kScratch, sums);
    }

    // o = x basis_0 + mean basis_1 + basis_2.
    put_pieces<Op>(own + At::kScratch, grad[0]);
    sync_warp();
    const float *factors = (const float *)(own + At::kOfRows);
    SNE_UNROLL
    for (int i = 0; i < At::kFactors / 8; ++i) {
      const float *column = factors + 16 * (8 * i + g) + 2 * t;
      const Cols8<Op> right{{pack2<T>(column[0], column[1]), pack2<T>(column[8], column[9])}};
      SNE_UNROLL
      for (int k = 0; k < KT; ++k)
        product(basis_sums[i][k], piece_transposed<Op>(own + At::kScratch + k * kPieceBytes), right);
    }
    float direct[2], through[2] = {0, 0};
    SNE_UNROLL
    for (int group = 0; group < G; ++group) {
      Tile of_mean{};  // gradients of the mean of head 4 group + t, and of x beside the attention
      const uint32_t *operands = (const uint32_t *)vectors + 3 * W + (group * KT * 32 + lane) * 2;
      SNE_UNROLL
      for (int k = 0; k < KT; ++k) product(of_mean, grad[0][k], Cols8<Op>{{operands[64 * k], operands[64 * k + 1]}});
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float of = of_mean.c[2 * r];
        const float of_slope = of * kept.variance[group][r] * radius * radius;
        direct[r] = of_mean.c[2 * r + 1];
        logit_sums[group][0] += of_slope * row[r], logit_sums[group][1] += of_slope;
        through[r] += of_slope * logit[group];
        const float one = of * kept.inverse[group][r], by_y = one * kept.slope[group][r] * (kLn2 * radius);
        *(uint32_t *)(own + At::kSums + 256 * group + 16 * (8 * r + g) + 4 * t) =
            pack2<T>(one - by_y * kept.mean[group][r], by_y);
      }
    }
    sync_pair(set);
    Tile as_keys{};  // sums over queries, of u and w of head t and those 4 apart
    SNE_UNROLL
    for (int m = 0; m < 2; ++m) {
      const unsigned char *theirs = own + m * to_other;
      SNE_UNROLL
      for (int group = 0; group < G; ++group) {
        uint32_t all[2];
        load_matrices_transposed<2>(all, theirs + At::kSums + 256 * group + lane % 16 * 16);
        SNE_UNROLL
        for (int head = 4 * group; head < H && head < 4 * group + 4; ++head) {
          const bool used = g / 2 == head % 4;
          product(as_keys, piece_transposed<Op>(theirs + At::weights(head) + m * kPieceBytes),
                  Cols8<Op>{{used ? all[0] : 0, used ? all[1] : 0}});
        }
      }
    }
    const float per_radius = radius > 0 ? 1.0f / radius : radius;
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float y = (row[r] - centre) * per_radius;
      const float sum = sum_over_quad(through[r] + as_keys.c[2 * r] + y * as_keys.c[2 * r + 1]) + direct[r];
      if (there && t == 0) values_grad[begin + 16 * set.part + 8 * r + g] = from_float<T>(sum);
    }
    sync_block();
    if (has_part)
      add_products<At::kBytes, Op, 1, kPieces>(matrix_sums, memory + At::kOutputs + matrix_row * kPieceBytes, 0,
                                               memory + At::kInputs + matrix_piece * kPieceBytes);
    sync_block();
  }
  if (has_part) add_to_matrix(grads.w_o + block_id() * W * W + 16 * matrix_row * W + 16 * matrix_piece, W, matrix_sums);
  // Sums of a warp: those of vectors (8, h), those by factor of o (8 or 16, h), and those of logits (2, H).
  constexpr int kVectors = kFullSums * W, kFactors = At::kFactors * W, kOfWarp = kVectors + kFactors + 2 * H;
  float *warp_sums = (float *)memory + warp_id() * kOfWarp;
  store_row_sums(warp_sums, sums);
  SNE_UNROLL
  for (int i = 0; i < At::kFactors / 8; ++i) store_row_sums(warp_sums + kVectors + 8 * W * i, basis_sums[i]);
  SNE_UNROLL
  for (int group = 0; group < G; ++group) {
    SNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      float sum = logit_sums[group][i];
      SNE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (g == 0 && 4 * group + t < H) warp_sums[kVectors + kFactors + i * H + 4 * group + t] = sum;
    }
  }
  sync_block();
  add_vector_sums(grads.vectors, (const float *)memory, W, kOutBias + 1, kOfWarp, layer_norm);
  for (int i = thread_id(); i < 3 * W + 2 * H; i += num_threads()) {
    if (i < 3 * W) {
      const int column = i % W, factor = i < W ? 1 : i < 2 * W ? 2 + column / Shape::D : 0;
      grads.basis[block_id() * 3 * W + i] +=
          sum_of_warps((const float *)memory, kOfWarp, kVectors + factor * W + column);
    } else {
      grads.logit[block_id() * 2 * H + i - 3 * W] +=
          sum_of_warps((const float *)memory, kOfWarp, kVectors + kFactors + i - 3 * W);
    }
  }
}

template <class Op, int width, int dim>
int run_full_scalar_backward(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space,
                             const sne_fast_cuda_chunk_scalar_grads &g, Stream stream) {
  using T = typename Op::Storage;
  using Shape = ChunkShape<Op, width, dim, 1>;
  const int64_t shared = (TileVectors{width}.size() + ScalarVectors<Op, Shape>::kSize) * 4 +
                         kFullWarps * ScalarPlaces<Shape>::kBytes + width * width * int64_t(sizeof(T));
  if (shared > a.shared_limit) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count + kFullBinsAtOnce - 1) / kFullBinsAtOnce;
  const FullScalarGrads grads{{(float *)g.norm_part, (float *)g.b_o_part, nullptr},
                              (float *)g.logit_part,
                              (float *)g.basis_part,
                              (float *)g.w_o_part};
  return launch(stream, tiles < a.multiprocessors ? tiles : a.multiprocessors, 1, 32 * kFullWarps, shared,
                chunk_full_scalar_backward<Op, Shape>, call_of<T>(a), (const T *)space.rows_grad, bool(a.layer_norm),
                (T *)g.values, grads);
}

}  // namespace
}  // namespace sne
