// The set-attention blocks of chunk_encode on the rows of one warp: norms, feed-forward, attention inside chunks.
//
// A warp holds 16 MT rows of width W as tiles o[i][j], rows 16 i.., columns 8 j... A block of slots (see chunk_slots.h)
// is one warp's rows or those of several neighbours, which exchange keys and values through shared memory.
#pragma once

#include <math.h>

#include "cuda/chunk_slots.h"
#include "cuda/chunk_weights.h"

namespace sne {

// Two pieces of 16 rows where they fit into registers, so that every weight read serves both.
template <class Op, int width>
constexpr int kPieces = width <= (Op::kPacked ? 64 : 32) ? 2 : 1;

template <class Op, int width, int dim, int pieces = kPieces<Op, width>, bool by_warpgroup = false>
struct ChunkShape {
  static constexpr bool kWarpgroup = by_warpgroup;  // products with weights by wgmma
  static constexpr int W = width, D = dim, HEADS = W / D, MT = pieces, ROWS = 16 * MT;
  static constexpr int NT = W / 8, KT = W / 16, DT = D / 8, DK = (D + 15) / 16;
  static constexpr int kOutRows = kWarpgroup ? 64 : 32;          // of fc_o in one piece
  static constexpr bool kTogether = kWarpgroup && D <= 32;       // q, k, v of a head by one product
};

// Parameters that are vectors, as floats in shared memory: basis (3, h); of each block fc_o's bias and the norms (5, h);
// of blocks 1 to 3 the biases of q, k, v (3, h).
struct VectorLayout {
  int h;
  SNE_HOST_DEVICE int out_bias(int block) const { return (3 + 5 * block) * h; }
  SNE_HOST_DEVICE int norm(int block) const { return out_bias(block) + h; }
  SNE_HOST_DEVICE int qkv_bias(int block) const { return (23 + 3 * (block - 1)) * h; }
  SNE_HOST_DEVICE int size() const { return 32 * h; }
};

template <class T>
SNE_DEVICE void load_vectors(float *to, int h, const T *basis, const T *b_o, const T *norm, const T *b_qkv) {
  const VectorLayout at{h};
  for (int i = thread_id(); i < at.size(); i += num_threads()) {
    const int row = i / h, column = i % h;
    float v = 0;
    if (row < 3) {
      v = to_real(basis[i]);
    } else if (row < 23) {
      const int block = (row - 3) / 5, part = (row - 3) % 5;
      if (part == 0)
        v = to_real(b_o[block * h + column]);
      else if (norm)
        v = to_real(norm[(block * 4 + part - 1) * h + column]);
    } else {
      v = to_real(b_qkv[(row - 23) * h + column]);
    }
    to[i] = v;
  }
}

// What the warps of a block of threads share, an array each with one part per warp. `matrices`: that warps exchange of a
// head (k and v; in the backward also q and the gradient); `scalars`: per row and head.
template <class Op, class Shape, int matrices = 2, int scalars = 1>
struct WarpMemory {
  static constexpr int kMatrices = matrices;
  static constexpr int kPlanes = sizeof(Rows16<Op>) / 16;
  static constexpr int kRowsBytes = 32 * int(sizeof(Rows16<Op>));  // 16 x 16 operands
  static constexpr int kExchanged = Shape::MT * Shape::DK * matrices * kRowsBytes;
  static constexpr int kSliceBytes = Shape::ROWS * 16 * 4;
  static constexpr int kExchange = kExchanged > kSliceBytes ? kExchanged : kSliceBytes;
  static constexpr int kHeadBytes = Shape::ROWS * Shape::HEADS * scalars * 4;
  static constexpr int kBytes = Shape::ROWS * int(sizeof(Slot)) + Shape::ROWS * 4 + kHeadBytes + 16 + kExchange;

  Slot *slots;          // (ROWS)
  float *values;        // (ROWS)
  float *head_values;   // (ROWS, HEADS, scalars)
  uint32_t *poison;     // 1 of 4: rows whose keys or values are not finite
  unsigned char *exchange;

  SNE_MEMBER WarpMemory(unsigned char *at, int warps, int warp) {
    slots = (Slot *)at + warp * Shape::ROWS;
    at += warps * Shape::ROWS * int(sizeof(Slot));
    values = (float *)at + warp * Shape::ROWS;
    at += warps * Shape::ROWS * 4;
    head_values = (float *)at + warp * Shape::ROWS * Shape::HEADS * scalars;
    at += warps * kHeadBytes;
    poison = (uint32_t *)at + warp * 4;
    at += warps * 16;
    exchange = at + warp * kExchange;
  }
};

// The warps that hold one block of slots.
struct SetOfWarps {
  int warps, part, barrier;
  bool shared;  // several chunks in a block
  SNE_MEMBER void sync() const {
    if (warps == 1)
      sync_warp();
    else
      sync_named(barrier, 32 * warps);
  }
};

template <class Shape>
SNE_DEVICE SetOfWarps set_of_warps(const SlotClass &cls) {
  SetOfWarps set;
  set.warps = cls.slots / Shape::ROWS;
  set.part = warp_id() % set.warps;
  set.barrier = 1 + warp_id() / set.warps;
  set.shared = cls.shared;
  return set;
}

enum Exchanged { kKeys, kValues, kQueries, kGrads };

struct alignas(16) Quad {
  uint32_t v[4];
};

template <class Op>
SNE_DEVICE void put_rows(unsigned char *at, const Rows16<Op> &rows) {
  SNE_UNROLL
  for (int plane = 0; plane < int(sizeof(rows) / 16); ++plane) {
    Quad quad;
    memcpy(&quad, (const unsigned char *)&rows + 16 * plane, 16);
    ((Quad *)at)[32 * plane + lane_id()] = quad;
  }
}
template <class Op>
SNE_DEVICE Rows16<Op> get_rows(const unsigned char *at) {
  Rows16<Op> rows;
  SNE_UNROLL
  for (int plane = 0; plane < int(sizeof(rows) / 16); ++plane) {
    const Quad quad = ((const Quad *)at)[32 * plane + lane_id()];
    memcpy((unsigned char *)&rows + 16 * plane, &quad, 16);
  }
  return rows;
}

// -------------------------------------------------------------------------------------------------- norms, products

// Moves the first N tiles of every row behind the others. Registers have no run-time index: a loop that is not unrolled
// works on the first (or last) tiles and turns the row, until all have been there. Code stays small and compiles fast.
template <int N, int MT, int NT>
SNE_DEVICE void turn(Tile (&o)[MT][NT]) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    Tile front[N];
    SNE_UNROLL
    for (int j = 0; j < N; ++j) front[j] = o[i][j];
    SNE_UNROLL
    for (int j = 0; j < NT - N; ++j) o[i][j] = o[i][j + N];
    SNE_UNROLL
    for (int j = 0; j < N; ++j) o[i][NT - N + j] = front[j];
  }
}

template <int MT, int NT>
SNE_DEVICE void row_means(float (&mean)[MT][2], const Tile (&o)[MT][NT]) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i)
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
      SNE_UNROLL
      for (int j = 0; j < NT; ++j) sum += o[i][j].c[2 * r] + o[i][j].c[2 * r + 1];
      mean[i][r] = sum_over_quad(sum) * (1.0f / (8 * NT));
    }
}

// o -> (o - mean) / spread; returns 1 / spread.
template <int MT, int NT>
SNE_DEVICE void to_units(Tile (&o)[MT][NT], float (&rstd)[MT][2]) {
  float mean[MT][2];
  row_means(mean, o);
  SNE_UNROLL
  for (int i = 0; i < MT; ++i)
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
      SNE_UNROLL
      for (int j = 0; j < NT; ++j)
        SNE_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          o[i][j].c[e] -= mean[i][r];
          sum += o[i][j].c[e] * o[i][j].c[e];
        }
      rstd[i][r] = rsqrt_fast(sum_over_quad(sum) * (1.0f / (8 * NT)) + 1e-5f);
      SNE_UNROLL
      for (int j = 0; j < NT; ++j) o[i][j].c[2 * r] *= rstd[i][r], o[i][j].c[2 * r + 1] *= rstd[i][r];
    }
}

// o -> o w + b, both (h,) in shared memory.
template <int MT, int NT>
SNE_DEVICE void scale_and_shift(Tile (&o)[MT][NT], const float *w, const float *b) {
  const int t = lane_id() % 4;
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) {
    const float w0 = w[8 * j + 2 * t], w1 = w[8 * j + 2 * t + 1], b0 = b[8 * j + 2 * t], b1 = b[8 * j + 2 * t + 1];
    SNE_UNROLL
    for (int i = 0; i < MT; ++i)
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        o[i][j].c[2 * r] = o[i][j].c[2 * r] * w0 + b0;
        o[i][j].c[2 * r + 1] = o[i][j].c[2 * r + 1] * w1 + b1;
      }
  }
}

template <class Op, int MT, int NT>
SNE_DEVICE void to_operands(Rows16<Op> (&x)[MT][NT / 2], const Tile (&o)[MT][NT]) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i)
    SNE_UNROLL
    for (int k = 0; k < NT / 2; ++k) x[i][k] = rows16<Op>(o[i][2 * k], o[i][2 * k + 1]);
}

// Every row of c becomes the vector v from its column 0 on.
template <int MT, int N>
SNE_DEVICE void fill_rows(Tile (&c)[MT][N], const float *v) {
  const int t = lane_id() % 4;
  SNE_UNROLL
  for (int n = 0; n < N; ++n)
    SNE_UNROLL
    for (int i = 0; i < MT; ++i)
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) c[i][n].c[e] = v[8 * n + 2 * t + e % 2];
}

SNE_DEVICE float relu(float z) { return z <= 0 ? 0.0f : z; }  // a NaN stays one

// o -> ln1(o' + relu(fc_o(o'))) with o' = ln0(o) (SPEC 2).
template <class Op, class Shape>
SNE_DEVICE void feed_forward(Tile (&o)[Shape::MT][Shape::NT], const WeightSource<Op> &weights, int64_t offset,
                             const float *out_bias, bool layer_norm) {
  constexpr int MT = Shape::MT, W = Shape::W, N = Shape::kOutRows / 8;
  const float *norm = out_bias + W;
  float rstd[MT][2];
  if (layer_norm) {
    to_units(o, rstd);
    scale_and_shift(o, norm, norm + W);
  }
  Rows16<Op> x[MT][Shape::KT];
  to_operands<Op>(x, o);
  SNE_LOOP
  for (int first = 0; first < W; first += 8 * N) {
    Tile z[MT][N];
    fill_rows(z, out_bias + first);
    multiply<Shape::kWarpgroup>(z, x, weights.piece(offset + first * W, 8 * N * W));
    SNE_UNROLL
    for (int i = 0; i < MT; ++i)
      SNE_UNROLL
      for (int n = 0; n < N; ++n)
        SNE_UNROLL
        for (int e = 0; e < 4; ++e) o[i][n].c[e] += relu(z[i][n].c[e]);
    turn<N>(o);
  }
  if (layer_norm) {
    to_units(o, rstd);
    scale_and_shift(o, norm + 2 * W, norm + 3 * W);
  }
}

// ------------------------------------------------------------------------------------------------ scalar attention

// Block 0 (SPEC 4.1): means (ROWS, HEADS) of what each row attends to, softmax_j((a x_i + c) x_j) x_j, from the values
// of its block of slots. The largest logit is at one end of the range of the values, so one pass does.
template <class Shape, class Memory, class T>
SNE_DEVICE void scalar_means(const Memory &memory, const SetOfWarps &set, const T *logit, int heads) {
  constexpr int kPerRow = 32 / Shape::ROWS;  // lanes that share a row, each with some heads
  const int row = lane_id() % Shape::ROWS, first = lane_id() / Shape::ROWS;
  const Slot slot = memory.slots[row];
  const float *values = memory.values - set.part * Shape::ROWS;
  const float own = memory.values[row];
  float low = values[slot.key_begin], high = low;
  for (int j = slot.key_begin + 1; j < slot.key_end; ++j) low = min_of(low, values[j]), high = max_of(high, values[j]);
  for (int head = first; head < heads; head += kPerRow) {
    const float slope = to_real(logit[head]) * own + to_real(logit[heads + head]);
    const float top = max_of(slope * low, slope * high);
    float total = 0, sum = 0;
    for (int j = slot.key_begin; j < slot.key_end; ++j) {
      const float p = exp2_fast((slope * values[j] - top) * kLog2e);
      total += p;
      sum += p * values[j];
    }
    memory.head_values[row * heads + head] = sum / total;
  }
  sync_warp();
}

// Block 0 up to its residual: x_i basis_0 + mean basis_1 + basis_2.
template <class Shape, class Memory>
SNE_DEVICE void scalar_rows(Tile (&o)[Shape::MT][Shape::NT], const Memory &memory, const float *basis, int heads) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j)
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * j + 2 * t + e;
      const float by_value = basis[column], by_mean = basis[Shape::W + column], constant = basis[2 * Shape::W + column];
      SNE_UNROLL
      for (int i = 0; i < Shape::MT; ++i)
        SNE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = 16 * i + 8 * r + g;
          o[i][j].c[2 * r + e] = memory.values[row] * by_value +
                                 memory.head_values[row * heads + 8 * j * heads / Shape::W] * by_mean + constant;
        }
    }
}

// ------------------------------------------------------------------------------------------------------- attention

template <int MT>
struct KeyRanges {  // of a lane's rows: slots from begin to end, two to a register
  uint32_t range[MT][2];
  SNE_MEMBER int begin(int i, int r) const { return range[i][r] & 0xffff; }
  SNE_MEMBER int end(int i, int r) const { return range[i][r] >> 16; }
};
template <class Shape>
SNE_DEVICE KeyRanges<Shape::MT> key_ranges(const Slot *slots) {
  KeyRanges<Shape::MT> out;
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i)
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Slot slot = slots[16 * i + 8 * r + lane_id() / 4];
      out.range[i][r] = uint32_t(slot.key_begin) | uint32_t(slot.key_end) << 16;
    }
  return out;
}

// Largest magnitude that is finite as an operand.
template <class Op>
constexpr float kLimit = std::is_same_v<Op, OpHalf> ? 65519.0f : 3.38e38f;

// Bits of the rows of k and v (or whatever else meets zeros in products) that are not finite.
template <class Op, int MT, int DT>
SNE_DEVICE uint32_t bad_rows(const Tile (&k)[MT][DT], const Tile (&v)[MT][DT]) {
  uint32_t rows = 0;
  SNE_UNROLL
  for (int i = 0; i < MT; ++i)
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      bool bad = false;
      SNE_UNROLL
      for (int n = 0; n < DT; ++n)
        SNE_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e)
          bad |= !(__builtin_fabsf(k[i][n].c[e]) < kLimit<Op>) | !(__builtin_fabsf(v[i][n].c[e]) < kLimit<Op>);
      const uint32_t lanes = ballot(bad);
      if (lanes)
        for (int g = 0; g < 8; ++g)
          if (lanes >> 4 * g & 15) rows |= 1u << (16 * i + 8 * r + g);
    }
  return rows;
}
template <int MT, int DT>
SNE_DEVICE void clear_rows(Tile (&k)[MT][DT], uint32_t rows) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i)
    SNE_UNROLL
    for (int e = 0; e < 4; ++e)
      if (rows >> (16 * i + 8 * (e / 2) + lane_id() / 4) & 1)
        SNE_UNROLL
        for (int n = 0; n < DT; ++n) k[i][n].c[e] = 0;
}

// Whether a key of the range, of the `rows` that stand from slot `first` on, is among the bits of `bad`.
SNE_DEVICE bool touches(uint32_t bad, int begin, int end, int first, int rows) {
  begin = begin > first ? begin - first : 0;
  end = end < first + rows ? end - first : rows;
  return begin < end && (bad >> begin & (end - begin < 32 ? (1u << (end - begin)) - 1 : ~0u)) != 0;
}

// Operands of a head: 16 x 16 pieces, the last one filled with zeros where d = 8.
template <class Op, class Shape>
SNE_DEVICE void head_operands(Rows16<Op> (&out)[Shape::MT][Shape::DK], const Tile (&c)[Shape::MT][Shape::DT]) {
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i)
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k)
      out[i][k] = rows16<Op>(c[i][2 * k], Shape::D == 8 ? Tile{} : c[i][2 * k + (Shape::D > 8)]);
}

// c += a b over the width of a head.
template <class Shape, class Op>
SNE_DEVICE void head_product(Tile &c, const Rows16<Op> &a, const Cols8<Op> &b) {
  if constexpr (Shape::D == 8)
    product_left(c, a, b);
  else
    product(c, a, b);
}

// Where a warp's 16 x 16 piece (i, k) of one of the exchanged matrices lies.
template <class Shape, class Memory>
SNE_DEVICE unsigned char *exchanged(const Memory &memory, int warp, int which, int i, int k) {
  const int piece = (which * Shape::MT + i) * Shape::DK + k;
  return memory.exchange + warp * Memory::kExchange + piece * Memory::kRowsBytes;
}
template <class Shape, class Op, class Memory>
SNE_DEVICE void offer(const Memory &memory, int which, const Rows16<Op> (&rows)[Shape::MT][Shape::DK]) {
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i)
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k) put_rows(exchanged<Shape>(memory, 0, which, i, k), rows[i][k]);
}

// Logits of 16 own rows (a) with the 16 MT rows of warp `warp` of an exchanged matrix.
template <class Shape, class Op, class Memory>
SNE_DEVICE void products_with(Tile (&s)[2 * Shape::MT], const Rows16<Op> (&a)[Shape::DK], const Memory &memory,
                              int warp, int which) {
  SNE_UNROLL
  for (int m = 0; m < Shape::MT; ++m) {
    s[2 * m] = s[2 * m + 1] = Tile{};
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k) {
      const Rows16<Op> rows = get_rows<Op>(exchanged<Shape>(memory, warp, which, m, k));
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) head_product<Shape>(s[2 * m + half], a[k], cols8(rows, half));
    }
  }
}

// c += p times the 16 MT rows of warp `warp` of an exchanged matrix; p (16, 16 MT).
template <class Op, class Shape, class Memory>
SNE_DEVICE void add_weighted(Tile (&c)[Shape::DT], const Tile (&p)[2 * Shape::MT], const Memory &memory, int warp,
                             int which) {
  SNE_UNROLL
  for (int m = 0; m < Shape::MT; ++m) {
    const Rows16<Op> weights = rows16<Op>(p[2 * m], p[2 * m + 1]);
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k) {
      const Rows16<Op> rows = get_rows<Op>(exchanged<Shape>(memory, warp, which, m, k));
      SNE_UNROLL
      for (int half = 0; half < (Shape::D == 8 ? 1 : 2); ++half)
        product(c[2 * k + half], weights, cols8_transposed(rows, half));
    }
  }
}

// q, k or v of a head before its bias: rows `which` d.. of the head's piece.
template <class Op, class Shape>
SNE_DEVICE void project(Tile (&c)[Shape::MT][Shape::DT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                        const WeightSource<Op> &weights, int64_t head_offset, int which, const float *bias) {
  fill_rows(c, bias);
  multiply<Shape::kWarpgroup>(c, x, weights.piece(head_offset + which * Shape::D * Shape::W, Shape::D * Shape::W));
}

// All three of a head at once: wide products keep Hopper's matrix units busy.
template <class Op, class Shape>
SNE_DEVICE void project_together(Tile (&q)[Shape::MT][Shape::DT], Tile (&k)[Shape::MT][Shape::DT],
                                 Tile (&v)[Shape::MT][Shape::DT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                                 const WeightSource<Op> &weights, int64_t head_offset, const float *bias) {
  constexpr int DT = Shape::DT;
  fill_rows(q, bias);
  fill_rows(k, bias + Shape::W);
  fill_rows(v, bias + 2 * Shape::W);
  Tile c[Shape::MT][3 * DT];
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i)
    SNE_UNROLL
    for (int n = 0; n < DT; ++n) c[i][n] = q[i][n], c[i][DT + n] = k[i][n], c[i][2 * DT + n] = v[i][n];
  multiply<Shape::kWarpgroup>(c, x, weights.piece(head_offset, 3 * Shape::D * Shape::W));
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i)
    SNE_UNROLL
    for (int n = 0; n < DT; ++n) q[i][n] = c[i][n], k[i][n] = c[i][DT + n], v[i][n] = c[i][2 * DT + n];
}

// o = q + attention(q, k, v) of every head, from the rows' operands x.
template <class Op, class Shape, class Memory>
SNE_DEVICE void attention_block(Tile (&o)[Shape::MT][Shape::NT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                                const WeightSource<Op> &weights, int block, const float *bias, const Memory &memory,
                                const SetOfWarps &set) {
  constexpr int MT = Shape::MT, DT = Shape::DT, D = Shape::D, W = Shape::W, ROWS = Shape::ROWS;
  const WeightLayout layout(W, D);
  const KeyRanges<MT> keys = key_ranges<Shape>(memory.slots);
  const float scale = kLog2e / __builtin_sqrtf(float(W));
  SNE_LOOP
  for (int head = 0; head < Shape::HEADS; ++head) {
    const int64_t offset = layout.qkv(block, head);
    Rows16<Op> q_rows[MT][Shape::DK];
    Tile q[MT][DT];
    {
      Tile k[MT][DT], v[MT][DT];
      if constexpr (Shape::kTogether) {
        project_together<Op, Shape>(q, k, v, x, weights, offset, bias + head * D);
      } else {
        project<Op, Shape>(k, x, weights, offset, 1, bias + W + head * D);
        project<Op, Shape>(v, x, weights, offset, 2, bias + 2 * W + head * D);
      }
      if (set.shared) {  // p v adds zero times other chunks' rows: those must be finite
        const uint32_t bad = bad_rows<Op>(k, v);
        if (lane_id() == 0) *memory.poison = bad;
        clear_rows(k, bad);
        clear_rows(v, bad);
      }
      Rows16<Op> rows[MT][Shape::DK];
      head_operands<Op, Shape>(rows, k);
      offer<Shape>(memory, kKeys, rows);
      head_operands<Op, Shape>(rows, v);
      offer<Shape>(memory, kValues, rows);
    }
    if constexpr (!Shape::kTogether) project<Op, Shape>(q, x, weights, offset, 0, bias + head * D);
    head_operands<Op, Shape>(q_rows, q);
    set.sync();
    // One piece of 16 rows after the other: registers for two would spill.
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) {
      Tile attended[DT] = {};
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
      for (int part = 0; part < set.warps; ++part) {
        const int warp = part - set.part, first = part * ROWS;
        Tile s[2 * MT];
        products_with<Shape>(s, q_rows[i], memory, warp, kKeys);
        const uint32_t bad = set.shared ? memory.poison[4 * warp] : 0;
        SNE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int begin = keys.begin(i, r), end = keys.end(i, r);
          float highest = top[r];
          SNE_UNROLL
          for (int n = 0; n < 2 * MT; ++n)
            SNE_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int key = first + 8 * n + 2 * (lane_id() % 4) + e;
              float &logit = s[n].c[2 * r + e];
              logit = key >= begin && key < end ? logit * scale : -INFINITY;
              highest = max_of(highest, logit);
            }
          highest = max_over_quad(highest);
          const float shift = highest == -INFINITY ? 0.0f : highest, decay = exp2_fast(top[r] - shift);
          float sum = 0;
          SNE_UNROLL
          for (int n = 0; n < 2 * MT; ++n)
            SNE_UNROLL
            for (int e = 0; e < 2; ++e) {
              float &p = s[n].c[2 * r + e];
              p = exp2_fast(p - shift);
              sum += p;
            }
          total[r] = total[r] * decay + sum_over_quad(sum);
          if (bad && touches(bad, begin, end, first, ROWS)) total[r] = NAN;
          top[r] = highest;
          SNE_UNROLL
          for (int n = 0; n < DT; ++n) attended[n].c[2 * r] *= decay, attended[n].c[2 * r + 1] *= decay;
        }
        add_weighted<Op, Shape>(attended, s, memory, warp, kValues);
      }
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float inverse = 1.0f / total[r];
        SNE_UNROLL
        for (int n = 0; n < DT; ++n)
          SNE_UNROLL
          for (int e = 2 * r; e < 2 * r + 2; ++e)
            o[i][n].c[e] = q[i][n].c[e] + attended[n].c[e] * inverse;
      }
    }
    turn<DT>(o);
    set.sync();
  }
}

}  // namespace sne
