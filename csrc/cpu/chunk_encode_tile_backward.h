// Backward of chunk_encode on one tile, whose activations the forward has kept.
#pragma once

#include "cpu/chunk_encode_tile.h"

namespace sne::SNE_ISA {

// Parameter gradients of one slice. Those named *_lanes keep a vector of lanes per entry, which is added up at the end.
template <class T>
struct SliceSums {
  T *w_qkv, *w_o, *table, *pool_query, *element_code;                   // (3,3h,h) (3,h,h) (H+2,h) (H,h) (longest,h)
  T *b_qkv_lanes, *b_o_lanes, *norm_lanes, *basis_lanes, *logit_lanes;  // (9h) (4h) (16h) (3h) (2H), W lanes each
  T *begin;
  long count;

  void place(T *base, long h, long H, long longest) {
    constexpr long W = kLanes<T>;
    begin = base;
    auto next = [&](long n) {
      T *p = base;
      base += n;
      return p;
    };
    w_qkv = next(9 * h * h);
    w_o = next(3 * h * h);
    table = next((H + 2) * h);
    pool_query = next(H * h);
    element_code = next(longest * h);
    b_qkv_lanes = next(9 * h * W);
    b_o_lanes = next(4 * h * W);
    norm_lanes = next(16 * h * W);
    basis_lanes = next(3 * h * W);
    logit_lanes = next((2 * H * W + W - 1) / W * W);
    count = base - begin;
  }
};

// Buffers of the backward.
template <class T>
struct BackWork {
  T *g;                 // (h, R) gradient of the current activations
  T *gr;                // (h, R) that of fc_o's output
  T *gqkv;              // (3h, R)
  T *z;                 // (R, R)
  T *et, *zt;           // (R, 2 vectors)
  T *dl;                // (H, R) gradient of pooling logits, then of the means m of block 0
  T *dx, *a_of, *b_of;  // (R)
  void take(Scratch &s, long R, long h, long H) {
    take_shared(s, R, h, H);
    z = s.take<T>(R * R);
    et = s.take<T>(R * 2 * kLanes<T>);
    zt = s.take<T>(R * 2 * kLanes<T>);
  }
  // Takes what does not depend on the products' operands.
  void take_shared(Scratch &s, long R, long h, long H) {
    g = s.take<T>(h * R);
    gr = s.take<T>(h * R);
    gqkv = s.take<T>(3 * h * R);
    dl = s.take<T>(H * R);
    dx = s.take<T>(R);
    a_of = s.take<T>(R);
    b_of = s.take<T>(R);
  }
};

// dw (M, h) += sum over rows of g (M, R) x rows (R, h).
template <class T>
void weight_gradient(const Tile<T> &tile, long M, long h, const T *g, const T *rows, T *dw) {
  constexpr int P = int(kPanel<T>);
  for (long p = 0; p < tile.panels; ++p)
    product_wide<T, P, 1>(M, g + p * M * P, 0, 0, rows + p * P * h, h, P, dw, h, h, nullptr, kAccumulate);
}

// db_lanes (M vectors) += sum over rows of g (M, R).
template <class T>
void bias_gradient(const Tile<T> &tile, long M, const T *g, T *db_lanes) {
  constexpr int W = kLanes<T>, NV = SNE_VECTORS_PER_PANEL, P = int(kPanel<T>);
  for (long p = 0; p < tile.panels; ++p)
    for (long f = 0; f < M; ++f) {
      Vec<T> sum = load(db_lanes + f * W);
      for (int v = 0; v < NV; ++v) sum += load(g + (p * M + f) * P + v * W);
      store(db_lanes + f * W, sum);
    }
}

// Adds the gradient of W_o generators^T from back.gr; that of W_o itself follows once, at the end.
template <class T>
void table_gradient(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums) {
  rows_of<T>(back.gr, enc.h, work.tile.panels, work.rows);
  weight_gradient<T>(work.tile, enc.H + 2, enc.h, work.coefficients, work.rows, sums.table);
}

// Backward of the pooling: writes back.g, the gradient of the final rows, and adds to that of pool_query.
template <class T>
void pool_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums,
                   const T *grad) {
  constexpr int W = kLanes<T>, P = int(kPanel<T>);
  const Tile<T> &tile = work.tile;
  const long h = enc.h, H = enc.H, R = tile.slots, slots = tile.panels * P;
  // dl first holds dweight[a, i] = <grad[chunk, a], x_i>. A vector of rows may belong to several chunks: each of them
  // computes the whole vector and keeps its own lanes.
  T part[64 * W];
  for (long s = 0; s < slots; s += W) {
    for (long a = 0; a < H; ++a) store(back.dl + a * R + s, zero<T>());
    if (s >= tile.used) continue;
    const Mask<T> own = load_int<T>(tile.chunk_of + s);
    const int last = int(tile.chunk_of[min_of(s + W, tile.used) - 1]);
    for (int c = int(tile.chunk_of[s]); c <= last; ++c) {
      product<T, 1, 0, 1>(H, grad + tile.chunks[c].id * H * h, h, 0, at(work.final_x, h, s), P, h, part, W);
      for (long a = 0; a < H; ++a) {
        T *to = back.dl + a * R + s;
        store(to, own == Int<T>(c) ? load(part + a * W) : load(to));
      }
    }
  }
  for (int c = 0; c < tile.num_chunks; ++c) {
    const TileChunk &chunk = tile.chunks[c];
    for (long a = 0; a < H; ++a) {
      T *dl = back.dl + a * R + chunk.slot;
      const T *w = work.weight + a * R + chunk.slot;
      T dot = 0;
      for (int i = 0; i < chunk.n; ++i) dot += w[i] * dl[i];
      for (int i = 0; i < chunk.n; ++i) dl[i] = w[i] * (dl[i] - dot);
    }
  }
  product_wide<T, 0, 1>(H, back.dl, R, 1, work.rows, h, slots, sums.pool_query, h, h, nullptr, kAccumulate);
  for (long p = 0; p < tile.panels; ++p)
    product<T, SNE_VECTORS_PER_PANEL, 0, 0>(h, enc.pool_query, 1, h, back.dl + p * P, R, H, back.g + p * h * P, P);
  // g += weight x grad of the chunk, again by the lanes of each chunk.
  for (long s = 0; s < tile.used; s += W) {
    const Mask<T> own = load_int<T>(tile.chunk_of + s);
    const int last = int(tile.chunk_of[min_of(s + W, tile.used) - 1]);
    for (int c = int(tile.chunk_of[s]); c <= last; ++c) {
      for (long a = 0; a < H; ++a) store(part + a * W, keep<T>(own == Int<T>(c), load(work.weight + a * R + s)));
      product<T, 1, 1, 0>(h, grad + tile.chunks[c].id * H * h, 0, h, part, W, H, at(back.g, h, s), P, nullptr,
                          kAccumulate);
    }
  }
}

// Adds to back.g, the gradient of relu(fc_o(o)), what it makes the gradient of o, and adds to those of fc_o.
template <class T>
void output_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums, int b) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long h = enc.h;
  const Tile<T> &tile = work.tile;
  const BlockActivations<T> &k = work.block[b];
  for (long p = 0; p < tile.panels; ++p) {
    T *g = back.g + p * h * P, *gr = back.gr + p * h * P;
    const T *relu = k.relu + p * h * P;
    for (long i = 0; i < h * P; i += W) store(gr + i, keep<T>(load(relu + i) > T(0), load(g + i)));
    packed_product<T>(h, enc.out_back[b], gr, h, g, nullptr, kAccumulate);
  }
  if (b == 0) {
    table_gradient<T>(enc, work, back, sums);
    bias_gradient<T>(tile, h, back.gr, sums.b_o_lanes);
  } else {
    rows_of<T>(k.hat0, h, tile.panels, work.rows, enc.norms ? enc.norm_of(b, 0) : nullptr,
               enc.norms ? enc.norm_of(b, 1) : nullptr);
    weight_gradient<T>(tile, h, h, back.gr, work.rows, sums.w_o + (b - 1) * h * h);
    bias_gradient<T>(tile, h, back.gr, sums.b_o_lanes + b * h * W);
  }
}

// Turns back.g from the gradient of a block's output into that of its attention output o.
template <class Encoder, class Work, class Back, class T = typename Encoder::Real>
void finish_block_backward(const Encoder &enc, Work &work, Back &back, SliceSums<T> &sums, int b) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long h = enc.h;
  const BlockActivations<T> &k = work.block[b];
  T *norm = sums.norm_lanes + b * 4 * h * W;
  auto norm_backward = [&](int which, const T *hat, const T *rstd) {
    for (long p = 0; p < work.tile.panels; ++p)
      norm_panel_backward<T>(h, back.g + p * h * P, hat + p * h * P, rstd + p * P, enc.norm_of(b, which),
                             norm + which * h * W, norm + (which + 1) * h * W);
  };
  if (enc.norms) norm_backward(2, k.hat1, k.rstd1);
  output_backward(enc, work, back, sums, b);
  if (enc.norms) norm_backward(0, k.hat0, k.rstd0);
}

// Turns back.g from the gradient of the output of one of the blocks 1 to 3 into that of its input.
template <class T>
void attention_block_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums,
                              int b) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long h = enc.h, R = work.tile.slots;
  BlockActivations<T> &k = work.block[b];
  finish_block_backward(enc, work, back, sums, b);
  for (long a = 0; a < enc.H; ++a)
    attention_head_backward<T>(work.tile, h, enc.d, a, k.qkv, k.e + a * R * R, k.inv + a * R, back.g, back.gqkv, back.z,
                               back.et, back.zt);
  rows_of<T>(k.in, h, work.tile.panels, work.rows);
  weight_gradient<T>(work.tile, 3 * h, h, back.gqkv, work.rows, sums.w_qkv + (b - 1) * 3 * h * h);
  bias_gradient<T>(work.tile, 3 * h, back.gqkv, sums.b_qkv_lanes + (b - 1) * 3 * h * W);
  for (long p = 0; p < work.tile.panels; ++p)
    packed_product<T>(h, enc.qkv_back[b], back.gqkv + p * 3 * h * P, 3 * h, back.g + p * h * P);
}

// Adds the gradients of the element codes to the slice, and writes those summed per chunk to chunk_sum (N, h).
template <class T>
void codes_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums,
                    T *chunk_sum) {
  constexpr int W = kLanes<T>;
  const long h = enc.h;
  rows_of<T>(back.g, h, work.tile.panels, work.rows);
  for (int c = 0; c < work.tile.num_chunks; ++c) {
    const TileChunk &chunk = work.tile.chunks[c];
    for (long f = 0; f < h; f += W) {
      Vec<T> sum = zero<T>();
      for (int i = 0; i < chunk.n; ++i) {
        const Vec<T> g = load(work.rows + (chunk.slot + i) * h + f);
        T *e = sums.element_code + i * h + f;
        store(e, load(e) + g);
        sum += g;
      }
      store(chunk_sum + chunk.id * h + f, sum);
    }
  }
}

template <class Encoder, class Work, class Back, class T = typename Encoder::Real>
void scalar_block_backward(const Encoder &enc, Work &work, Back &back, SliceSums<T> &sums, T *grad_values) {
  constexpr int W = kLanes<T>, NV = SNE_VECTORS_PER_PANEL;
  constexpr long P = kPanel<T>;
  const long h = enc.h, R = work.tile.slots;
  const Tile<T> &tile = work.tile;
  finish_block_backward(enc, work, back, sums, 0);
  for (long p = 0; p < tile.panels; ++p) {
    Vec<T> x[NV], dx[NV];
    for (int v = 0; v < NV; ++v) {
      x[v] = load(work.x + p * P + v * W);
      dx[v] = zero<T>();
    }
    for (long a = 0; a < enc.H; ++a) {
      Vec<T> m[NV], dm[NV];
      for (int v = 0; v < NV; ++v) {
        m[v] = load(work.scalar.m + a * R + p * P + v * W);
        dm[v] = zero<T>();
      }
      for (long f = a * enc.d; f < (a + 1) * enc.d; ++f) {
        T *db = sums.basis_lanes + f * W;
        Vec<T> d0 = load(db), d1 = load(db + h * W), d2 = load(db + 2 * h * W);
        for (int v = 0; v < NV; ++v) {
          const Vec<T> g = load(back.g + p * h * P + f * P + v * W);
          d0 += g * x[v];
          d1 += g * m[v];
          d2 += g;
          dx[v] += g * enc.basis[f];
          dm[v] += g * enc.basis[h + f];
        }
        store(db, d0);
        store(db + h * W, d1);
        store(db + 2 * h * W, d2);
      }
      for (int v = 0; v < NV; ++v) store(back.dl + a * R + p * P + v * W, dm[v]);
    }
    for (int v = 0; v < NV; ++v) store(back.dx + p * P + v * W, dx[v]);
  }
  scalar_attention_backward<T>(tile, enc.H, enc.logit, work.x, work.scalar, back.dl, back.dx, sums.logit_lanes,
                               back.a_of, back.b_of);
  for (int c = 0; c < tile.num_chunks; ++c) {
    const TileChunk &chunk = tile.chunks[c];
    memcpy(grad_values + enc.chunk_ptr[chunk.id], back.dx + chunk.slot, size_t(chunk.n) * sizeof(T));
  }
}

}  // namespace sne::SNE_ISA
