// Forward of chunk_encode on one tile. Inference and backward run the same code: in the backward every block has
// buffers of its own, in inference all blocks share one set.
#pragma once

#include "cpu/chunk_attention.h"
#include "cpu/chunk_norm.h"

namespace sne::SNE_ISA {

template <class T>
struct TileWork;

// Sizes, named parameters and the weights packed for the products, shared read-only by all threads of a call.
template <class T>
struct ChunkEncoder {
  using Real = T;
  using Work = TileWork<T>;
  long h, H, d;
  bool norms;
  const int64_t *chunk_ptr;
  const T *values, *row_code, *element_code, *logit, *basis, *b_qkv, *b_o, *norm, *pool_query;
  const T *w_qkv, *w_o;          // as given
  T *qkv[4], *out[4];            // packed for the forward; index = block, 0 unused
  T *qkv_back[4], *out_back[4];  // packed transposed, backward only
  // After ln0 the rows of block 0 are sums of H + 2 fixed vectors, so fc_o is applied to those once per call
  // (docs/method.md 4.1).
  T *generators;          // (H+2, h): the centred basis times ln0's weight
  T *table, *table_bias;  // packed W_o generators^T (h, H+2); W_o ln0.bias + b_o (h)

  explicit ChunkEncoder(const sne_fast_chunk_encode_args &a)
      : h(a.hidden), H(a.heads), d(a.hidden / a.heads), norms(a.layer_norm != 0), chunk_ptr(a.chunk_ptr),
        values((const T *)a.values), row_code((const T *)a.row_code), element_code((const T *)a.element_code),
        logit((const T *)a.logit), basis((const T *)a.basis), b_qkv((const T *)a.b_qkv), b_o((const T *)a.b_o),
        norm((const T *)a.norm), pool_query((const T *)a.pool_query), w_qkv((const T *)a.w_qkv), w_o((const T *)a.w_o) {
  }

  const T *norm_of(int block, int which) const { return norm + (block * 4 + which) * h; }
  const T *bias_qkv(int block) const { return b_qkv + (block - 1) * 3 * h; }

  void take_table(Scratch &scratch) {
    generators = scratch.take<T>((H + 2) * h);
    table = scratch.take<T>((H + 2) * h);
    table_bias = scratch.take<T>(h);
  }
  void take(Scratch &scratch, bool backward) {
    take_table(scratch);
    for (int b = 0; b < 4; ++b) {
      out[b] = b ? scratch.take<T>(h * h) : nullptr;
      qkv[b] = b ? scratch.take<T>(3 * h * h) : nullptr;
      out_back[b] = backward ? scratch.take<T>(h * h) : nullptr;
      qkv_back[b] = backward && b ? scratch.take<T>(3 * h * h) : nullptr;
    }
  }
  void pack_weights(bool backward) {
    for (int b = 0; b < 4; ++b) {
      const T *wo = w_o + b * h * h, *wq = b ? w_qkv + (b - 1) * 3 * h * h : nullptr;
      if (b) pack(h, h, wo, h, 1, out[b]);
      if (b) pack(3 * h, h, wq, h, 1, qkv[b]);
      if (!backward) continue;
      pack(h, h, wo, 1, h, out_back[b]);
      if (b) pack(h, 3 * h, wq, 1, h, qkv_back[b]);
    }
    make_table();
  }
  // The coefficients of the generators are x, the H means m, and 1, all divided by ln0's standard deviation.
  void make_table() {
    for (long k = 0; k < H + 2; ++k) {
      const T *from = basis + (k == 0 ? 0 : k <= H ? 1 : 2) * h;
      const long begin = k == 0 || k > H ? 0 : (k - 1) * d, end = k == 0 || k > H ? h : k * d;
      double mean = 0;
      for (long f = begin; f < end; ++f) mean += double(from[f]) / double(h);
      for (long f = 0; f < h; ++f) {
        const T v = f >= begin && f < end ? from[f] : T(0);
        generators[k * h + f] = norms ? T(double(v) - mean) * norm_of(0, 0)[f] : v;
      }
    }
    T *at = table;
    for (long m = 0; m < h;) {  // the layout of pack()
      const int rows = next_rows(h - m);
      for (long k = 0; k < H + 2; ++k)
        for (int i = 0; i < rows; ++i) *at++ = dot_row(m + i, generators + k * h);
      m += rows;
    }
    for (long f = 0; f < h; ++f) table_bias[f] = b_o[f] + (norms ? dot_row(f, norm_of(0, 1)) : T(0));
  }
  T dot_row(long row, const T *v) const {  // <row of block 0's W_o, v>
    Vec<T> sum = zero<T>();
    for (long f = 0; f < h; f += kLanes<T>) sum += load(w_o + row * h + f) * load(v + f);
    return horizontal_sum<T>(sum);
  }
};

// Activations of one block that its backward reads. (F, R) buffers are feature-major panels.
template <class T>
struct BlockActivations {
  T *in;            // (h, R) input of blocks 1..3, codes included
  T *qkv;           // (3h, R)
  T *e, *inv;       // attention_head: (H, R, R), (H, R)
  T *hat0, *rstd0;  // (h, R), (R): ln0's normalised rows (the rows themselves without norms)
  T *relu;          // (h, R)
  T *hat1, *rstd1;  // (h, R), (R)
};

template <class T>
struct TileWork {
  Tile<T> tile;
  T *x, *low, *high;  // (R) values, chunk extremes
  ScalarAttention<T> scalar;
  T *coefficients;  // (H+2, R) of the generators, feature-major
  BlockActivations<T> block[4];
  T *o;        // (h, R) the attention output, then its norm
  T *final_x;  // (h, R) output of block 3
  T *rows;     // (R, h) some (h, R) buffer with its rows in memory order
  T *weight;   // (H, R) pooling softmax
  bool backward;

  void take(Scratch &scratch, long R, long h, long H, bool for_backward) {
    take_shared(scratch, R, h, H, for_backward);
    for (int b = 0; b < 4; ++b) {
      BlockActivations<T> &k = block[b];
      if (!for_backward && b > 1) {
        k = block[1];
        continue;
      }
      k.in = b ? scratch.take<T>(h * R) : nullptr;
      k.qkv = b ? scratch.take<T>(3 * h * R) : nullptr;
      k.e = b ? scratch.take<T>(for_backward ? H * R * R : 2 * kLanes<T> * R) : nullptr;
      take_rest(scratch, R, h, H, b);
    }
  }
  // Takes what does not depend on the products' operands: of all blocks, and of one.
  void take_shared(Scratch &scratch, long R, long h, long H, bool for_backward) {
    backward = for_backward;
    tile.take(scratch, R);
    x = scratch.take<T>(R);
    low = scratch.take<T>(R);
    high = scratch.take<T>(R);
    scalar.take(scratch, H, R);
    coefficients = scratch.take<T>((H + 2) * R);
    o = scratch.take<T>(h * R);
    final_x = scratch.take<T>(h * R);
    rows = scratch.take<T>(h * R);
    weight = scratch.take<T>(H * R);
  }
  void take_rest(Scratch &scratch, long R, long h, long H, int b) {
    BlockActivations<T> &k = block[b];
    k.inv = b ? scratch.take<T>(H * R) : nullptr;
    k.relu = scratch.take<T>(h * R);
    k.hat0 = backward ? scratch.take<T>(h * R) : nullptr;
    k.rstd0 = backward || b == 0 ? scratch.take<T>(R) : nullptr;
    k.hat1 = backward ? scratch.take<T>(h * R) : nullptr;
    k.rstd1 = backward ? scratch.take<T>(R) : nullptr;
  }
};

// Writes block 0's coefficients of panel p, and returns them.
template <class T>
T *coefficients_of(const ChunkEncoder<T> &enc, TileWork<T> &work, long p) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long H = enc.H, R = work.tile.slots;
  T *c = work.coefficients + p * (H + 2) * P;
  for (long l = 0; l < P; l += W) {
    const Vec<T> rstd = enc.norms ? load(work.block[0].rstd0 + p * P + l) : splat(T(1));
    store(c + l, load(work.x + p * P + l) * rstd);
    for (long a = 0; a < H; ++a) store(c + (1 + a) * P + l, load(work.scalar.m + a * R + p * P + l) * rstd);
    store(c + (H + 1) * P + l, rstd);
  }
  return c;
}

// relu(fc_o(o)) of one of the blocks 1 to 3, for panel p.
template <class T>
void output_product(const ChunkEncoder<T> &enc, TileWork<T> &work, int b, long p) {
  const long at = p * enc.h * kPanel<T>;
  packed_product<T>(enc.h, enc.out[b], work.o + at, enc.h, work.block[b].relu + at, enc.b_o + b * enc.h, kRelu);
}

// o -> ln0 -> fc_o -> relu -> residual -> ln1 -> to.
template <class Encoder, class Work>
void finish_block(const Encoder &enc, Work &work, int b, typename Encoder::Real *to) {
  using T = typename Encoder::Real;
  constexpr long P = kPanel<T>;
  const long h = enc.h;
  BlockActivations<T> &k = work.block[b];
  for (long p = 0; p < work.tile.panels; ++p) {
    const long f = p * h * P;
    T *o = work.o + f, *hat0 = k.hat0 ? k.hat0 + f : nullptr, *hat1 = k.hat1 ? k.hat1 + f : nullptr;
    if (enc.norms)
      norm_panel<T>(h, o, nullptr, enc.norm_of(b, 0), enc.norm_of(b, 1), o, hat0, k.rstd0 ? k.rstd0 + p * P : nullptr);
    else if (hat0)
      memcpy(hat0, o, size_t(h * P) * sizeof(T));
    if (b == 0)
      packed_product<T>(h, enc.table, coefficients_of(enc, work, p), enc.H + 2, k.relu + f, enc.table_bias, kRelu);
    else
      output_product(enc, work, b, p);
    if (enc.norms) {
      norm_panel<T>(h, o, k.relu + f, enc.norm_of(b, 2), enc.norm_of(b, 3), to + f, hat1,
                    k.rstd1 ? k.rstd1 + p * P : nullptr);
    } else {
      for (long i = 0; i < h * P; i += kLanes<T>) store(to + f + i, load(o + i) + load(k.relu + f + i));
    }
  }
}

template <class T>
void load_values(const ChunkEncoder<T> &enc, TileWork<T> &work) {
  Tile<T> &tile = work.tile;
  for (int c = 0; c < tile.num_chunks; ++c) {
    const TileChunk &chunk = tile.chunks[c];
    const T *from = enc.values + enc.chunk_ptr[chunk.id];
    T low = from[0], high = from[0];
    for (int i = 0; i < chunk.n; ++i) {
      const T v = from[i];
      work.x[chunk.slot + i] = v;
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    for (int i = 0; i < chunk.n; ++i) {
      work.low[chunk.slot + i] = low;
      work.high[chunk.slot + i] = high;
    }
  }
  for (long s = tile.used; s < tile.panels * kPanel<T>; ++s) work.x[s] = work.low[s] = work.high[s] = 0;
}

// Block 0 (docs/method.md 4.1): o = x basis0 + m basis1 + basis2.
template <class Encoder, class Work>
void scalar_block(const Encoder &enc, Work &work, typename Encoder::Real *to) {
  using T = typename Encoder::Real;
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long h = enc.h, R = work.tile.slots;
  if (work.backward)
    scalar_attention<T, true>(work.tile, enc.H, enc.logit, work.x, work.low, work.high, work.scalar);
  else
    scalar_attention<T, false>(work.tile, enc.H, enc.logit, work.x, work.low, work.high, work.scalar);
  for (long p = 0; p < work.tile.panels; ++p)
    for (long f = 0; f < h; ++f) {
      const T *m = work.scalar.m + f / enc.d * R + p * P;
      for (long l = 0; l < P; l += W)
        store(work.o + p * h * P + f * P + l,
              load(work.x + p * P + l) * enc.basis[f] + (load(m + l) * enc.basis[h + f] + enc.basis[2 * h + f]));
    }
  finish_block(enc, work, 0, to);
}

// Adds the codes in work.rows to x.
template <class T>
void add_codes(const ChunkEncoder<T> &enc, TileWork<T> &work, T *x) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long h = enc.h, panels = work.tile.panels;
  // work.rows is transposed onto x, one square of vectors at a time.
  for (long p = 0; p < panels; ++p)
    for (long l = 0; l < P; l += W)
      for (long f = 0; f < h; f += W) {
        Vec<T> r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = load(work.rows + (p * P + l + i) * h + f);
        transpose_registers<T>(r);
        T *to = x + p * h * P + f * P + l;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + i * P, load(to + i * P) + r[i]);
      }
}

template <class T>
void code_rows(const ChunkEncoder<T> &enc, TileWork<T> &work, const int64_t *tensor_of) {
  constexpr int W = kLanes<T>;
  const long h = enc.h;
  const Tile<T> &tile = work.tile;
  for (int c = 0; c < tile.num_chunks; ++c) {
    const TileChunk &chunk = tile.chunks[c];
    const T *row = enc.row_code + tensor_of[chunk.id] * h;
    for (int i = 0; i < chunk.n; ++i)
      for (long f = 0; f < h; f += W)
        store(work.rows + (chunk.slot + i) * h + f, load(row + f) + load(enc.element_code + i * h + f));
  }
  memset(work.rows + tile.used * h, 0, size_t((tile.panels * kPanel<T> - tile.used) * h) * sizeof(T));
}

// One of the blocks 1 to 3, from its input k.in.
template <class T>
void attention_block(const ChunkEncoder<T> &enc, TileWork<T> &work, int b, T *to) {
  constexpr long P = kPanel<T>;
  const long h = enc.h, R = work.tile.slots;
  BlockActivations<T> &k = work.block[b];
  for (long p = 0; p < work.tile.panels; ++p)
    packed_product<T>(3 * h, enc.qkv[b], k.in + p * h * P, h, k.qkv + p * 3 * h * P, enc.bias_qkv(b));
  for (long a = 0; a < enc.H; ++a)
    attention_head<T>(work.tile, h, enc.d, a, k.qkv, work.o, work.backward ? k.e + a * R * R : k.e, k.inv + a * R,
                      work.backward);
  finish_block(enc, work, b, to);
}

// Writes to work.weight the softmax of x pool_query^T over the rows of each chunk, zero in unused slots.
template <class T>
void pool_weights(const ChunkEncoder<T> &enc, TileWork<T> &work) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const Tile<T> &tile = work.tile;
  const long h = enc.h, R = tile.slots;
  for (long p = 0; p < tile.panels; ++p)
    product<T, SNE_VECTORS_PER_PANEL, 0, 1>(enc.H, enc.pool_query, h, 0, work.final_x + p * h * P, P, h,
                                            work.weight + p * P, R);
  for (long a = 0; a < enc.H; ++a) {
    T *row = work.weight + a * R;
    for (int c = 0; c < tile.num_chunks; ++c) {
      T *w = row + tile.chunks[c].slot;
      const int n = tile.chunks[c].n;
      T top = w[0];
      for (int i = 1; i < n; ++i) top = w[i] > top ? w[i] : top;
      T sum = 0, part[W];
      for (int i = 0; i < n; i += W) {
        const int count = int(min_of(W, n - i));
        for (int l = 0; l < W; ++l) part[l] = l < count ? w[i + l] : top;
        store(part, vexp2((load(part) - top) * kLog2e<T>));
        for (int l = 0; l < count; ++l) sum += w[i + l] = part[l];
      }
      for (int i = 0; i < n; ++i) w[i] /= sum;
    }
    for (long s = tile.used; s < tile.panels * P; ++s) row[s] = 0;
  }
}

// Returns whether all numbers are finite. n must be a multiple of kLanes.
template <class T>
bool all_finite(const T *x, long n) {
  Vec<T> sum = zero<T>();
  for (long i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(x + i);
    sum += v - v;  // 0, or NaN
  }
  return horizontal_sum<T>(sum) == 0;
}

// Returns whether the chunks of the tile have kept apart: masks are products with zero, and zero times infinity would
// carry a NaN from one network into another. What is not finite in a block stays so up to the final rows.
template <class T>
bool stayed_apart(const ChunkEncoder<T> &enc, const TileWork<T> &work) {
  return work.tile.num_chunks == 1 || all_finite(work.final_x, enc.h * work.tile.panels * kPanel<T>);
}

// Runs all blocks on the tile in work.tile, up to work.weight and work.rows (the final rows).
template <class Encoder, class Work>
void encode_tile(const Encoder &enc, Work &work, const int64_t *tensor_of) {
  using T = typename Encoder::Real;
  load_values(enc, work);
  scalar_block(enc, work, work.block[1].in);
  attention_block(enc, work, 1, work.block[2].in);
  code_rows(enc, work, tensor_of);
  add_codes(enc, work, work.block[2].in);
  attention_block(enc, work, 2, work.block[3].in);
  attention_block(enc, work, 3, work.final_x);
  pool_weights(enc, work);
  rows_of<T>(work.final_x, enc.h, work.tile.panels, work.rows);
}

}  // namespace sne::SNE_ISA
