// chunk_encode, backward: every tile is computed again with its activations kept in cache, then walked back.
//
// Every tile owns the gradients of its values and its sums per chunk. Parameter gradients are summed per slice, a fixed
// run of tiles, and slices are added in order, so that the bits do not depend on the number of threads.
#include <omp.h>

#include "cpu/chunk_encode_tile.h"
#include "cpu/kernels.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer shared_buffer, slice_buffer, tile_buffer;

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
    g = s.take<T>(h * R);
    gr = s.take<T>(h * R);
    gqkv = s.take<T>(3 * h * R);
    z = s.take<T>(R * R);
    et = s.take<T>(R * 2 * kLanes<T>);
    zt = s.take<T>(R * 2 * kLanes<T>);
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

// Turns back.g from the gradient of a block's output into that of its attention output o.
template <class T>
void finish_block_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums,
                           int b) {
  constexpr int W = kLanes<T>;
  constexpr long P = kPanel<T>;
  const long h = enc.h;
  const Tile<T> &tile = work.tile;
  const BlockActivations<T> &k = work.block[b];
  T *norm = sums.norm_lanes + b * 4 * h * W;
  for (long p = 0; p < tile.panels; ++p) {
    T *g = back.g + p * h * P, *gr = back.gr + p * h * P;
    if (enc.norms)
      norm_panel_backward<T>(h, g, k.hat1 + p * h * P, k.rstd1 + p * P, enc.norm_of(b, 2), norm + 2 * h * W,
                             norm + 3 * h * W);
    const T *relu = k.relu + p * h * P;
    for (long i = 0; i < h * P; i += W) store(gr + i, keep<T>(load(relu + i) > T(0), load(g + i)));
    packed_product<T>(h, enc.out_back[b], gr, h, g, nullptr, kAccumulate);
  }
  if (b == 0) {  // the gradient of W_o generators^T; that of W_o itself follows once, at the end
    rows_of<T>(back.gr, h, tile.panels, work.rows);
    weight_gradient<T>(tile, enc.H + 2, h, work.coefficients, work.rows, sums.table);
    bias_gradient<T>(tile, h, back.gr, sums.b_o_lanes);
  } else {
    rows_of<T>(k.hat0, h, tile.panels, work.rows, enc.norms ? enc.norm_of(b, 0) : nullptr,
               enc.norms ? enc.norm_of(b, 1) : nullptr);
    weight_gradient<T>(tile, h, h, back.gr, work.rows, sums.w_o + (b - 1) * h * h);
    bias_gradient<T>(tile, h, back.gr, sums.b_o_lanes + b * h * W);
  }
  if (enc.norms)
    for (long p = 0; p < tile.panels; ++p)
      norm_panel_backward<T>(h, back.g + p * h * P, k.hat0 + p * h * P, k.rstd0 + p * P, enc.norm_of(b, 0), norm,
                             norm + h * W);
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

template <class T>
void scalar_block_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums,
                           T *grad_values) {
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

// Walks back the chunks order[first] .. order[last - 1] of the plan as one tile, or one by one where they would disturb
// each other.
template <class T>
void tile_backward(const ChunkEncoder<T> &enc, TileWork<T> &work, BackWork<T> &back, SliceSums<T> &sums,
                   const TilePlan &plan, int64_t first, int64_t last, const T *grad, T *grad_values, T *chunk_sum) {
  work.tile.lay_out(plan, first, last, enc.chunk_ptr);
  encode_tile(enc, work, plan.tensor_of);
  bool apart = stayed_apart(enc, work);
  for (int64_t i = first; i < last && apart && last - first > 1; ++i)
    apart = all_finite(grad + plan.order[i] * enc.H * enc.h, enc.H * enc.h);
  if (!apart) {
    for (int64_t i = first; i < last; ++i)
      tile_backward(enc, work, back, sums, plan, i, i + 1, grad, grad_values, chunk_sum);
    return;
  }
  pool_backward(enc, work, back, sums, grad);
  attention_block_backward(enc, work, back, sums, 3);
  attention_block_backward(enc, work, back, sums, 2);
  codes_backward(enc, work, back, sums, chunk_sum);
  attention_block_backward(enc, work, back, sums, 1);
  scalar_block_backward(enc, work, back, sums, grad_values);
}

// Returns the number of slices: enough to keep many cores busy, few enough that their sums stay below about 64 MB, and
// of five tiles or more, as clearing and adding them would take noticeable time otherwise.
template <class T>
long number_of_slices(long tiles, long floats) {
  const long max_slices = max_of(8, min_of(64, (64L << 20) / (floats * long(sizeof(T)))));
  return max_of(1, min_of(max_slices, (tiles + 4) / 5));
}

template <class T>
int backward(const sne_fast_chunk_encode_args &args, const TilePlan &plan, const sne_fast_chunk_encode_grads &grads,
             Interrupt &interrupt) {
  constexpr long W = kLanes<T>;
  ChunkEncoder<T> enc(args);
  const long h = enc.h, H = enc.H, N = args.num_chunks;
  SliceSums<T> layout;
  layout.place(nullptr, h, H, plan.longest);
  const long slices = number_of_slices<T>(plan.num_tiles, layout.count), count = layout.count;
  Scratch size;
  enc.take(size, true);
  size.take<T>(N * h);
  char *shared = shared_buffer.reserve(size.size());
  char *sums_at = slice_buffer.reserve(size_t(slices * count) * sizeof(T));
  if (!shared || !sums_at) return SNE_FAST_NO_MEMORY;
  Scratch shared_scratch(shared);
  enc.take(shared_scratch, true);
  T *chunk_sum = shared_scratch.take<T>(N * h), *sums_base = (T *)sums_at;
  enc.pack_weights(true);
  for (int64_t t = 0; t < N; ++t)
    if (args.chunk_ptr[t + 1] == args.chunk_ptr[t]) memset(chunk_sum + t * h, 0, size_t(h) * sizeof(T));

  int failed = 0;
  const int threads = int(max_of(1, min_of(args.num_threads, slices)));
#pragma omp parallel num_threads(threads)
  {
    TileWork<T> work;
    BackWork<T> back;
    Scratch tile_size;
    work.take(tile_size, plan.slots, h, H, true);
    back.take(tile_size, plan.slots, h, H);
    char *base = tile_buffer.reserve(tile_size.size());
    if (base) {
      Scratch scratch(base);
      work.take(scratch, plan.slots, h, H, true);
      back.take(scratch, plan.slots, h, H);
    } else {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (long s = 0; s < slices; ++s) {
      if (!base || interrupt.stop()) continue;
      SliceSums<T> sums;
      sums.place(sums_base + s * count, h, H, plan.longest);
      memset(sums.begin, 0, size_t(count) * sizeof(T));
      const long end = plan.num_tiles * (s + 1) / slices;
      for (long i = plan.num_tiles * s / slices; i < end && !interrupt.stop(); ++i)
        tile_backward(enc, work, back, sums, plan, plan.first[i], plan.first[i + 1], (const T *)grads.grad,
                      (T *)grads.values, chunk_sum);
    }
    tile_buffer.trim();
    if (!failed && !interrupt.stopped()) {  // neither changes any more
      // Add all slices to slice 0, in order.
      const long step = 4096;
#pragma omp for schedule(static)
      for (long from = 0; from < count; from += step) {
        const long to = min_of(count, from + step);
        for (long s = 1; s < slices; ++s)
          for (long i = from; i < to; ++i) sums_base[i] += sums_base[s * count + i];
      }
      T *row_code = (T *)grads.row_code;
#pragma omp for schedule(static)
      for (long s = 0; s < args.num_tensors; ++s) {
        T *to = row_code + s * h;
        memset(to, 0, size_t(h) * sizeof(T));
        for (int64_t t = args.tensor_ptr[s]; t < args.tensor_ptr[s + 1]; ++t)
          for (long f = 0; f < h; f += W) store(to + f, load(to + f) + load(chunk_sum + t * h + f));
      }
    }
  }
  if (failed || interrupt.stopped()) return interrupt.status(failed);
  SliceSums<T> sums;
  sums.place(sums_base, h, H, plan.longest);
  memcpy(grads.w_qkv, sums.w_qkv, size_t(9 * h * h) * sizeof(T));
  memcpy((T *)grads.w_o + h * h, sums.w_o, size_t(3 * h * h) * sizeof(T));
  memcpy(grads.pool_query, sums.pool_query, size_t(H * h) * sizeof(T));
  memcpy(grads.element_code, sums.element_code, size_t(plan.longest * h) * sizeof(T));
  memset((T *)grads.element_code + plan.longest * h, 0, size_t((args.element_rows - plan.longest) * h) * sizeof(T));
  auto add_lanes = [](const T *lanes, long n, void *to) {
    for (long i = 0; i < n; ++i) ((T *)to)[i] = horizontal_sum<T>(load(lanes + i * W));
  };
  add_lanes(sums.b_qkv_lanes, 9 * h, grads.b_qkv);
  add_lanes(sums.b_o_lanes, 4 * h, grads.b_o);
  for (long row = 0; row < h; ++row)  // W_o of block 0 was applied to the generators and to ln0's bias
    for (long f = 0; f < h; f += W) {
      Vec<T> sum = enc.norms ? load(enc.norm_of(0, 1) + f) * ((const T *)grads.b_o)[row] : zero<T>();
      for (long k = 0; k < H + 2; ++k) sum += load(enc.generators + k * h + f) * sums.table[k * h + row];
      store((T *)grads.w_o + row * h + f, sum);
    }
  if (enc.norms) add_lanes(sums.norm_lanes, 16 * h, grads.norm);
  add_lanes(sums.basis_lanes, 3 * h, grads.basis);
  add_lanes(sums.logit_lanes, 2 * H, grads.logit);
  shared_buffer.trim();
  slice_buffer.trim();
  return SNE_FAST_OK;
}

}  // namespace

int chunk_encode_backward(int dtype, const sne_fast_chunk_encode_args &args, const TilePlan &plan,
                          const sne_fast_chunk_encode_grads &grads, Interrupt &interrupt) {
  return dtype == SNE_FAST_F64 ? backward<double>(args, plan, grads, interrupt)
                               : backward<float>(args, plan, grads, interrupt);
}

}  // namespace sne::SNE_ISA
