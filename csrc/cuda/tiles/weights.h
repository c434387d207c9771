// Weights as right operands: how a thread block reads them in shared memory, and products with them.
#pragma once

#include "cuda/ptx/wgmma_sm90.h"
#include "cuda/tiles/fragments.h"

namespace sne {

// Gives pieces of the prepared weights in shared memory. With `resident` all weights of a kernel have been copied there
// before its first bin. Otherwise each piece is copied when asked for, by all threads of the block together.
template <class Op>
struct WeightSource {
  using T = typename Op::Storage;
  const T *global;
  unsigned char *shared;
  bool resident;
  int64_t first;  // offset of the resident weights

  // Returns elements `offset` .. `offset + count` of the prepared weights. The previous piece may be overwritten.
  SNE_MEMBER const unsigned char *piece(int64_t offset, int64_t count) const {
    if (resident) return shared + (offset - first) * sizeof(T);
    sync_block();
    copy(offset, count);
    return shared;
  }
  SNE_MEMBER void copy(int64_t offset, int64_t count) const {
    const unsigned char *from = (const unsigned char *)(global + offset);
    const int bytes = int(count * sizeof(T));
    for (int at = thread_id() * 16; at < bytes; at += num_threads() * 16) copy_async(shared + at, from + at);
    copies_done();
    sync_block();
  }
};

// Moves the first N tiles of every row behind the others. Registers cannot be indexed at run time, so a loop that is
// not unrolled works on the first (or last) tiles and turns the row, until all have had their turn. This keeps code
// small.
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

// Returns how many of N tiles a product with 16 KT columns takes per turn. Fully unrolled, wide products would compile
// for minutes.
template <class Op, int KT, int N>
SNE_HOST_DEVICE constexpr int tiles_per_turn() {
  int tiles = N;
  while (tiles % 2 == 0 && tiles * KT > (Op::kPacked ? 64 : 16)) tiles /= 2;
  return tiles;
}

template <class Op, int MT, int KT, int N>
SNE_DEVICE void multiply_by_warp(Tile (&c)[MT][N], const Rows16<Op> (&a)[MT][KT], const unsigned char *piece) {
  constexpr int kTiles = tiles_per_turn<Op, KT, N>();
  SNE_LOOP
  for (int first = 0; first < N; first += kTiles) {
    SNE_UNROLL
    for (int k = 0; k < KT; k += 2) {
      SNE_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        Cols8<Op> b[2];
        load_cols8_pair<Op>(b, piece, first + n, k / 2, 16 * KT);
        SNE_UNROLL
        for (int i = 0; i < MT; ++i) {
          product(c[i][n], a[i][k], b[0]);
          product(c[i][n], a[i][k + 1], b[1]);
        }
      }
    }
    if constexpr (kTiles < N) turn<kTiles>(c);
  }
}

// Adds a (16 x 16 K) times the first 16 K rows of a piece of the weights, which has W columns, to c.
template <class Op, int W, int K>
SNE_DEVICE void multiply_by_rows(Tile (&c)[W / 8], const Rows16<Op> (&a)[K], const unsigned char *piece) {
  const int lane = lane_id();
  if constexpr (Op::kPacked) {
    const unsigned char *at = piece + ((lane >> 3 & 1) * (W / 8) + (lane >> 4)) * 128 + lane % 8 * 16;
    SNE_UNROLL
    for (int k = 0; k < K; ++k) {
      SNE_UNROLL
      for (int n = 0; n < W / 8; n += 2) {
        uint32_t r[4];
        load_matrices_transposed<4>(r, at + (2 * k * (W / 8) + n) * 128);
        product(c[n], a[k], Cols8<Op>{{r[0], r[1]}});
        product(c[n + 1], a[k], Cols8<Op>{{r[2], r[3]}});
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    const float *at = (const float *)piece + g % 2 * 32 + 8 * t + g / 2;  // core_index(2 t, g)
    SNE_UNROLL
    for (int k = 0; k < K; ++k) {
      SNE_UNROLL
      for (int n = 0; n < W / 8; ++n) {
        Cols8<Op> b;
        SNE_UNROLL
        for (int i = 0; i < 4; ++i) b.r[i] = at[((2 * k + i / 2) * (W / 4) + 2 * n) * 32 + i % 2 * 4];
        product(c[n], a[k], b);
      }
    }
  }
}

#if defined(SNE_HAS_WGMMA)
template <int MT, int N>
SNE_DEVICE void settle_all(Tile (&c)[MT][N]) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int n = 0; n < N; ++n) {
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) settle(c[i][n].c[e]);
    }
  }
}

// Adds a[i] (64 rows of the warpgroup, 16 KT columns) times a piece of the weights of 8 N rows to c[i].
template <class Op, int MT, int KT, int N>
SNE_DEVICE void multiply_by_warpgroup(Tile (&c)[MT][N], const Rows16<Op> (&a)[MT][KT], const unsigned char *piece) {
  const MatrixDescriptor matrix = describe(piece, 128, KT * 256);
  settle_all(c);
  wgmma_begin();
  SNE_UNROLL
  for (int k = 0; k < KT; ++k) {
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) wgmma<Op, N>(c[i], a[i][k].r, advance(matrix, k * 256));
  }
  wgmma_end();
  settle_all(c);
}
#endif

// Adds a[i] (16 x 16 KT) times rows 8 n.. of a piece of the weights, which has 16 KT columns, to c[i][n], n < N.
template <bool by_warpgroup, class Op, int MT, int KT, int N>
SNE_DEVICE void multiply(Tile (&c)[MT][N], const Rows16<Op> (&a)[MT][KT], const unsigned char *piece) {
#if defined(SNE_HAS_WGMMA)
  if constexpr (by_warpgroup)
    multiply_by_warpgroup(c, a, piece);
  else
#endif
    multiply_by_warp(c, a, piece);
}

}  // namespace sne
