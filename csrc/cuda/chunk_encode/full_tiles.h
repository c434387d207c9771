// What the forward of full bins (full_bins.h) reads and exchanges: vectors as registers of tiles, pieces of operands.
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
// the same for all keys) and v; behind those slope and offset of block 0's logits in powers of 2, (heads, 2), and the
// norms' gains and biases as pairs of 16-bit numbers, for 16 columns 16 words: gain and bias of a lane's two pairs.
struct TileVectors {
  int h;
  SNE_HOST_DEVICE int out_bias(int block) const { return 2 * h * block; }
  SNE_HOST_DEVICE int qkv_bias(int block, int which) const { return 2 * h * (4 + 3 * (block - 1) + which); }
  SNE_HOST_DEVICE int slopes() const { return 2 * h * 13; }
  SNE_HOST_DEVICE int norm(int block, int which) const { return slopes() + 16 + (2 * block + which) * h; }
  SNE_HOST_DEVICE int size() const { return norm(4, 0); }
};

// Returns how many floats of vectors a forward kernel keeps in shared memory.
template <class Op, class Shape>
SNE_HOST_DEVICE constexpr int forward_vectors() {
  return 32 * Shape::W + (kHasFullBins<Op, Shape> ? TileVectors{Shape::W}.size() : 0);
}

template <class T>
SNE_DEVICE void load_tile_vectors(float *to, int h, int heads, const T *logit, const T *b_o, const T *b_qkv,
                                  const T *norm) {
  const TileVectors at{h};
  for (int i = thread_id(); i < at.norm(0, 0); i += num_threads()) {
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
  for (int i = thread_id(); norm && i < 8 * h; i += num_threads()) {
    const int place = i % h, column = place / 16 * 16 + place / 2 % 2 * 8 + place / 4 % 4 * 2;
    const T *from = norm + (2 * (i / h) + place % 2) * h + column;
    ((uint32_t *)to)[at.norm(0, 0) + i] = uint32_t(from[0].bits) | uint32_t(from[1].bits) << 16;
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

// The barrier of a bin's two warps.
SNE_DEVICE void sync_pair(const SetOfWarps &set) { sync_named(set.barrier, 64); }

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

// Writes the rows of a warp as pieces of 256 numbers, 8 of each lane one behind the other.
template <class Op, int K>
SNE_DEVICE void store_pieces(typename Op::Storage *at, const Rows16<Op> (&rows)[K]) {
  SNE_UNROLL
  for (int k = 0; k < K; ++k)
    store_words(at + 256 * k + 8 * lane_id(), Words{{rows[k].r[0], rows[k].r[1], rows[k].r[2], rows[k].r[3]}});
}

}  // namespace sne
