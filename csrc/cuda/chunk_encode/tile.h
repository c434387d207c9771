// The rows of one warp in chunk_encode: memory shared with other warps, block 0.
//
// A warp holds 16 MT rows of width W as tiles o[i][j]: rows 16 i.., columns 8 j... A bin of slots (slots.h) is the rows
// of one warp or of several neighbours, which exchange keys and values through shared memory.
#pragma once

#include <math.h>

#include "cuda/chunk_encode/slots.h"
#include "cuda/chunk_encode/weights.h"
#include "cuda/tiles/feed_forward.h"

namespace sne {

// Pieces of 16 rows of a warp. For floats two where they fit into registers, so that every weight that is read serves
// both; for 16-bit operands one, so that more warps fit beside each other.
template <class Op, int width>
constexpr int kPieces = !Op::kPacked && width <= 32 ? 2 : 1;

// Warps of a thread block that the registers of a forward kernel allow: 16 with 128 a thread, 12 with 168, 8 with 255.
template <class Shape, bool packed>
constexpr int forward_warps() {
  if (!packed || Shape::W > 64 || Shape::D > 32) return 8;
  if (Shape::W == 64 && !Shape::kWarpgroup) return 8;
  if (Shape::D == 32) return Shape::W == 64 ? 12 : 8;
  return Shape::W == 64 && Shape::D == 8 ? 8 : 16;
}

template <class Op, int width, int dim, int pieces = kPieces<Op, width>, bool by_warpgroup = false>
struct ChunkShape {
  static constexpr bool kWarpgroup = by_warpgroup;  // products with weights by wgmma
  static constexpr int W = width, D = dim, HEADS = W / D, MT = pieces, ROWS = 16 * MT;
  static constexpr int NT = W / 8, KT = W / 16, DT = D / 8, DK = (D + 15) / 16;
  static constexpr int kOutRows = kWarpgroup ? 64 : 32;     // rows of fc_o in one piece of the weights
  static constexpr bool kTogether = kWarpgroup && D <= 32;  // one product for q, k and v of a head
};

// Parameters that are vectors, as floats in shared memory: the basis (3, h), of each block fc_o's bias and the norms
// (5, h), and of blocks 1 to 3 the biases of q, k and v (3, h).
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

// Memory that the warps of a thread block share: several arrays, each with one part per warp. `matrices`: matrices of a
// head that warps exchange (k and v; in the backward also q and the gradient); `scalars`: numbers per row and head.
template <class Op, class Shape, int matrices = 2, int scalars = 1>
struct WarpMemory {
  static constexpr int kMatrices = matrices;
  static constexpr int kPlanes = sizeof(Rows16<Op>) / 16;
  static constexpr int kRowsBytes = 32 * int(sizeof(Rows16<Op>));                                  // 16 x 16 operands
  static constexpr bool kFull = Op::kPacked && Shape::MT == 1 && Shape::W <= 64 && matrices == 2;  // full_bins.h
  static constexpr bool kTwoBuffers = kFull && Shape::D <= 16;  // for keys and values, by turns
  static constexpr int kExchanged = Shape::MT * Shape::DK * matrices * kRowsBytes * (kTwoBuffers ? 2 : 1);
  static constexpr int kSliceBytes = kFull ? Shape::KT * kRowsBytes + 256 : Shape::ROWS * 16 * 4;  // for the pool
  static constexpr int kExchange = kExchanged > kSliceBytes ? kExchanged : kSliceBytes;
  static constexpr int kHeadBytes = Shape::ROWS * Shape::HEADS * scalars * 4;
  static constexpr int kBytes = Shape::ROWS * int(sizeof(Slot)) + Shape::ROWS * 4 + kHeadBytes + 16 + 32 + kExchange;

  Slot *slots;         // (ROWS)
  float *values;       // (ROWS)
  float *head_values;  // (ROWS, HEADS, scalars)
  uint32_t *poison;    // 1 of 4 words: rows whose keys or values are not finite
  float *tops;         // (8): largest logits of the pool
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
    tops = (float *)at + warp * 8;
    at += warps * 32;
    exchange = at + warp * kExchange;
  }
};

// The warps that hold one bin.
struct SetOfWarps {
  int warps, part, barrier;
  bool multi_chunk;  // several chunks in a bin
  SNE_MEMBER void sync() const {
    if (warps == 1)
      sync_warp();
    else
      sync_named(barrier, 32 * warps);
  }
};

// Returns the set of this warp, which has `rows` rows.
SNE_DEVICE SetOfWarps set_of_warps(const BinClass &cls, int rows) {
  SetOfWarps set;
  set.warps = cls.slots / rows;
  set.part = warp_id() % set.warps;
  set.barrier = 1 + warp_id() / set.warps;
  set.multi_chunk = cls.multi_chunk;
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

// ------------------------------------------------------------------------------------------------ scalar attention

// Block 0 (docs/method.md 4.1): means (ROWS, HEADS) of what each row attends to, softmax_j((a x_i + c) x_j) x_j over
// the values of its bin. The largest logit belongs to the smallest or the largest value, so one pass is enough. For the
// backward, calls keep(head, row, slope of the logits, value of the largest one, sum of the exponentials, mean).
template <class Shape, class Memory, class T, class Keep>
SNE_DEVICE void scalar_means(const Memory &memory, const SetOfWarps &set, const T *logit, int heads, Keep keep) {
  constexpr int kPerRow = 32 / Shape::ROWS;  // lanes that share a row, each with some heads
  const int row = lane_id() % Shape::ROWS, first = lane_id() / Shape::ROWS;
  const Slot slot = memory.slots[row];
  const float *values = memory.values - set.part * Shape::ROWS;
  const float own = memory.values[row];
  float low = values[slot.key_begin], high = low;
  for (int j = slot.key_begin + 1; j < slot.key_end; ++j) low = min_of(low, values[j]), high = max_of(high, values[j]);
  for (int head = first; head < heads; head += kPerRow) {
    const float slope = to_real(logit[head]) * own + to_real(logit[heads + head]);
    const float extreme = slope >= 0 ? high : low;  // subtracted from values, not from logits: exact where equal
    float total = 0, sum = 0;
    for (int j = slot.key_begin; j < slot.key_end; ++j) {
      const float p = exp2_fast(slope * (values[j] - extreme) * kLog2e);
      total += p;
      sum += p * values[j];
    }
    const float mean = sum / total;
    memory.head_values[row * heads + head] = mean;
    keep(head, row, slope, extreme, total, mean);
  }
  sync_warp();
}
template <class Shape, class Memory, class T>
SNE_DEVICE void scalar_means(const Memory &memory, const SetOfWarps &set, const T *logit, int heads) {
  scalar_means<Shape>(memory, set, logit, heads, [](int, int, float, float, float, float) {});
}

// Computes the attention output of block 0: x_i basis_0 + mean basis_1 + basis_2.
template <class Shape, class Memory>
SNE_DEVICE void scalar_rows(Tile (&o)[Shape::MT][Shape::NT], const Memory &memory, const float *basis, int heads) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int j = 0; j < Shape::NT; ++j) {
    SNE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * j + 2 * t + e;
      const float by_value = basis[column], by_mean = basis[Shape::W + column], constant = basis[2 * Shape::W + column];
      SNE_UNROLL
      for (int i = 0; i < Shape::MT; ++i) {
        SNE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = 16 * i + 8 * r + g;
          o[i][j].c[2 * r + e] = memory.values[row] * by_value +
                                 memory.head_values[row * heads + 8 * j * heads / Shape::W] * by_mean + constant;
        }
      }
    }
  }
}

}  // namespace sne
