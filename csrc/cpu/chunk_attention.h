// Attention among the rows of each chunk of a tile: scalar (block 0, docs/method.md 4.1) and full (blocks 1 to 3).
#pragma once

#include "cpu/chunk_tile.h"

namespace sne::SNE_ISA {

// Results of block 0 per head and row, all (H, R). The backward rebuilds the softmax from s, ext and inv.
template <class T>
struct ScalarAttention {
  T *m;    // sum_j softmax_j(s x_j) x_j
  T *off;  // m - ext, before it was rounded to m
  T *var;  // the variance of x under that softmax: dm/ds
  T *s;    // a x + c, times log2 e
  T *ext;  // the value with the largest logit: an extreme of the chunk
  T *inv;  // 1 / sum of exponentials
  void take(Scratch &scratch, long H, long R) {
    m = scratch.take<T>(H * R);
    off = scratch.take<T>(H * R);
    var = scratch.take<T>(H * R);
    s = scratch.take<T>(H * R);
    ext = scratch.take<T>(H * R);
    inv = scratch.take<T>(H * R);
  }
};

// x, low, high (R): the values, and the smallest and largest value of the chunk that each row is in.
template <class T, bool TRAIN>
void scalar_attention(const Tile<T> &tile, long H, const T *logit, const T *x, const T *low, const T *high,
                      const ScalarAttention<T> &out) {
  constexpr int W = kLanes<T>;
  const long R = tile.slots;
  for (long a = 0; a < H; ++a)
    for (int i = 0; i < tile.num_groups; ++i) {
      const RowGroup &group = tile.groups[i];
      for (int v = 0; v < group.vectors; ++v) {
        const long slot = group.slot + v * W;
        const Vec<T> xi = load(x + slot);
        const Vec<T> s = (xi * logit[a] + logit[H + a]) * kLog2e<T>;
        const Vec<T> ext = s >= T(0) ? load(high + slot) : load(low + slot);
        const Mask<T> own = load_int<T>(tile.chunk_of + slot);
        Vec<T> sum = zero<T>(), first = zero<T>(), second = zero<T>();
        // Everything is relative to ext, whose weight is the largest: then no exponent is positive, however it is
        // rounded, and among n values the variance is at least 1/n of the squared mean subtracted from it.
        auto add = [&](long j, auto masked) {
          const Vec<T> d = x[j] - ext;
          Vec<T> e = vexp2(s * d);
          if constexpr (decltype(masked)::value) e = keep<T>(own == tile.chunk_of[j], e);
          const Vec<T> ed = e * d;
          sum += e;
          first += ed;
          if constexpr (TRAIN) second += ed * d;
        };
        if (group.masked)
          for (long j = group.lo; j < group.hi; ++j) add(j, Constant<1>{});
        else
          for (long j = group.lo; j < group.hi; ++j) add(j, Constant<0>{});
        const Vec<T> inv = sum > T(0) ? T(1) / sum : zero<T>();
        const Vec<T> off = first * inv;
        const long at = a * R + slot;
        store(out.m + at, ext + off);
        if constexpr (TRAIN) {
          store(out.var + at, second * inv - off * off);
          store(out.off + at, off);
          store(out.s + at, s);
          store(out.ext + at, ext);
          store(out.inv + at, inv);
        }
      }
    }
}

// From dm (H, R), adds the gradient through queries and keys to dx (R), and the gradients of the logits' parameters to
// dlogit, (2, H) vectors of lanes. With p the softmax: dm/ds_i = var_i, and dm_i/dx_j = p_ij (1 + s_i (x_j - m_i)).
// There x_j and m_i are taken relative to ext_i, as s_i m_i may be so large that its rounding error is as large as
// the 1.
template <class T>
void scalar_attention_backward(const Tile<T> &tile, long H, const T *logit, const T *x, const ScalarAttention<T> &f,
                               const T *dm, T *dx, T *dlogit, T *a_of, T *b_of) {
  constexpr int W = kLanes<T>;
  const long R = tile.slots, rows = tile.panels * kPanel<T>;
  for (long a = 0; a < H; ++a) {
    Vec<T> da = load(dlogit + a * W), dc = load(dlogit + (H + a) * W);
    for (long slot = 0; slot < rows; slot += W) {
      const long at = a * R + slot;
      const Vec<T> d = load(dm + at), xi = load(x + slot), ds = d * load(f.var + at);
      const Vec<T> s = load(f.s + at) * (T(1) / kLog2e<T>), scaled = d * load(f.inv + at);
      da += ds * xi;
      dc += ds;
      store(dx + slot, load(dx + slot) + ds * logit[a]);
      store(a_of + slot, scaled * (T(1) - s * load(f.off + at)));
      store(b_of + slot, scaled * s);
    }
    store(dlogit + a * W, da);
    store(dlogit + (H + a) * W, dc);
    for (int k = 0; k < tile.num_groups; ++k) {
      const RowGroup &group = tile.groups[k];
      for (int v = 0; v < group.vectors; ++v) {
        const long slot = group.slot + v * W;
        const Vec<T> xj = load(x + slot);
        const Mask<T> own = load_int<T>(tile.chunk_of + slot);
        Vec<T> sum = zero<T>();
        for (long i = group.lo; i < group.hi; ++i) {
          const Vec<T> from_ext = xj - f.ext[a * R + i];
          Vec<T> e = vexp2(from_ext * f.s[a * R + i]);
          if (group.masked)
            e = keep<T>(own == tile.chunk_of[i], e);  // drops other chunks, even where the exponential overflowed
          sum += e * (from_ext * b_of[i] + a_of[i]);
        }
        store(dx + slot, load(dx + slot) + sum);
      }
    }
  }
}

// One head of the full attention: from qkv (3h, R), writes q + softmax(q k^T / sqrt(h)) v to o (h, R).
// e (R, lde): row j, lane of query i, holds exp(logit_ij - largest); inv (R): 1 / its sums. With keep_all, e has a
// column per slot (lde = R), else only the columns of the current group.
template <class T>
void attention_head(const Tile<T> &tile, long h, long d, long head, const T *qkv, T *o, T *e, T *inv, bool keep_all) {
  constexpr int W = kLanes<T>;
  constexpr int P = int(kPanel<T>);
  const T scale = kLog2e<T> / T(__builtin_sqrt(double(h)));
  for (int i = 0; i < tile.num_groups; ++i) {
    const RowGroup &group = tile.groups[i];
    const long lde = keep_all ? tile.slots : 2 * W;
    T *eb = keep_all ? e + group.slot : e;
    const T *q = at(qkv, 3 * h, group.slot) + head * d * P;
    T *ob = at(o, h, group.slot) + head * d * P;
    auto run = [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      for_each_panel<T>(group.lo, group.hi, [&](long j0, long j1) {
        product<T, NV, 1, P>(j1 - j0, at(qkv, 3 * h, j0) + (h + head * d) * P, 0, 0, q, P, d, eb + j0 * lde, lde);
      });
      Vec<T> top[NV], sum[NV];
      Mask<T> own[NV];
      for (int v = 0; v < NV; ++v) {
        top[v] = splat(kLowest<T>);
        sum[v] = zero<T>();
        own[v] = load_int<T>(tile.chunk_of + group.slot + v * W);
      }
      // The largest logit is subtracted before scaling: a rounded `top * scale` would differ from the `s * scale` of a
      // fused multiply-add by more than 1 where logits are large.
      if (group.masked) {
        for (long j = group.lo; j < group.hi; ++j)
          for (int v = 0; v < NV; ++v) {
            const Vec<T> s = load(eb + j * lde + v * W);
            top[v] = vmax(top[v], own[v] == tile.chunk_of[j] ? s : splat(kLowest<T>));
          }
        for (long j = group.lo; j < group.hi; ++j)
          for (int v = 0; v < NV; ++v) {
            const Mask<T> mine = own[v] == tile.chunk_of[j];
            const Vec<T> ev = keep<T>(mine, vexp2((load(eb + j * lde + v * W) - top[v]) * scale));
            sum[v] += ev;
            store(eb + j * lde + v * W, ev);
          }
      } else {
        for (long j = group.lo; j < group.hi; ++j)
          for (int v = 0; v < NV; ++v) top[v] = vmax(top[v], load(eb + j * lde + v * W));
        for (long j = group.lo; j < group.hi; ++j)
          for (int v = 0; v < NV; ++v) {
            const Vec<T> ev = vexp2((load(eb + j * lde + v * W) - top[v]) * scale);
            sum[v] += ev;
            store(eb + j * lde + v * W, ev);
          }
      }
      if (keep_all)  // the backward reads whole vectors of keys
        for (int v = 0; v < NV; ++v) {
          for (long j = group.lo / W * W; j < group.lo; ++j) store(eb + j * lde + v * W, zero<T>());
          for (long j = group.hi; j < (group.hi + W - 1) / W * W; ++j) store(eb + j * lde + v * W, zero<T>());
        }
      unsigned flags = kStore;
      for_each_panel<T>(group.lo, group.hi, [&](long j0, long j1) {
        product<T, NV, P, 1>(d, at(qkv, 3 * h, j0) + (2 * h + head * d) * P, 0, 0, eb + j0 * lde, lde, j1 - j0, ob, P,
                             nullptr, flags);
        flags = kAccumulate;
      });
      const bool alone = flags == kStore;  // padding: nothing to attend to
      for (int v = 0; v < NV; ++v) {
        sum[v] = keep<T>(own[v] >= 0, T(1) / sum[v]);
        store(inv + group.slot + v * W, sum[v]);
        for (long f = 0; f < d; ++f) {
          const Vec<T> qv = load(q + f * P + v * W);
          store(ob + f * P + v * W, alone ? qv : load(ob + f * P + v * W) * sum[v] + qv);
        }
      }
    };
    if (group.vectors == 2)
      run(Constant<2>{});
    else
      run(Constant<1>{});
  }
}

// Backward of one head: from g (h, R), the gradient of o, to gqkv (3h, R), that of qkv. e and inv are those of
// attention_head with keep_all; e becomes the softmax itself. z (R, R), et and zt (R, 2 vectors) are scratch.
template <class T>
void attention_head_backward(const Tile<T> &tile, long h, long d, long head, const T *qkv, T *e, const T *inv,
                             const T *g, T *gqkv, T *z, T *et, T *zt) {
  constexpr int W = kLanes<T>;
  constexpr int P = int(kPanel<T>);
  const long R = tile.slots;
  const T scale = T(1) / T(__builtin_sqrt(double(h)));
  // With queries on lanes: the softmax, the gradients of logits, and dq.
  for (int i = 0; i < tile.num_groups; ++i) {
    const RowGroup &group = tile.groups[i];
    auto run = [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      const T *gb = at(g, h, group.slot) + head * d * P;
      T *gq = at(gqkv, 3 * h, group.slot) + head * d * P;
      T *eb = e + group.slot, *zb = z + group.slot;
      for_each_panel<T>(group.lo, group.hi, [&](long j0, long j1) {
        product<T, NV, 1, P>(j1 - j0, at(qkv, 3 * h, j0) + (2 * h + head * d) * P, 0, 0, gb, P, d, zb + j0 * R, R);
      });
      Vec<T> dot[NV], iv[NV];
      for (int v = 0; v < NV; ++v) {
        dot[v] = zero<T>();
        iv[v] = load(inv + group.slot + v * W);
      }
      for (long j = group.lo; j < group.hi; ++j)
        for (int v = 0; v < NV; ++v) {
          const Vec<T> p = load(eb + j * R + v * W) * iv[v];
          store(eb + j * R + v * W, p);
          dot[v] += p * load(zb + j * R + v * W);
        }
      for (long j = group.lo; j < group.hi; ++j)
        for (int v = 0; v < NV; ++v)
          store(zb + j * R + v * W, load(eb + j * R + v * W) * (load(zb + j * R + v * W) - dot[v]) * scale);
      for (int v = 0; v < NV; ++v) {
        for (long j = group.lo / W * W; j < group.lo; ++j) store(zb + j * R + v * W, zero<T>());
        for (long j = group.hi; j < (group.hi + W - 1) / W * W; ++j) store(zb + j * R + v * W, zero<T>());
        for (long f = 0; f < d; ++f) store(gq + f * P + v * W, load(gb + f * P + v * W));
      }
      for_each_panel<T>(group.lo, group.hi, [&](long j0, long j1) {
        product<T, NV, P, 1>(d, at(qkv, 3 * h, j0) + (h + head * d) * P, 0, 0, zb + j0 * R, R, j1 - j0, gq, P, nullptr,
                             kAccumulate);
      });
    };
    if (group.vectors == 2)
      run(Constant<2>{});
    else
      run(Constant<1>{});
  }
  // With keys on lanes: dk and dv. The queries that see a vector of keys are the slots that its own group names.
  for (int i = 0; i < tile.num_groups; ++i) {
    const RowGroup &group = tile.groups[i];
    auto run = [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      constexpr long ld = NV * W;
      T *gk = at(gqkv, 3 * h, group.slot) + (h + head * d) * P;
      T *gv = at(gqkv, 3 * h, group.slot) + (2 * h + head * d) * P;
      const long from = group.lo / W * W;
      for (long q = from; q < group.hi; q += W)
        for (int v = 0; v < NV; ++v) {
          transpose_square(e + (group.slot + v * W) * R + q, R, et + (q - from) * ld + v * W, ld);
          transpose_square(z + (group.slot + v * W) * R + q, R, zt + (q - from) * ld + v * W, ld);
        }
      unsigned flags = kStore;
      for_each_panel<T>(group.lo, group.hi, [&](long i0, long i1) {
        product<T, NV, P, 1>(d, at(qkv, 3 * h, i0) + head * d * P, 0, 0, zt + (i0 - from) * ld, ld, i1 - i0, gk, P,
                             nullptr, flags);
        product<T, NV, P, 1>(d, at(g, h, i0) + head * d * P, 0, 0, et + (i0 - from) * ld, ld, i1 - i0, gv, P, nullptr,
                             flags);
        flags = kAccumulate;
      });
      if (flags == kStore) {  // padding
        zero_features<T, NV>(gk, d);
        zero_features<T, NV>(gv, d);
      }
    };
    if (group.vectors == 2)
      run(Constant<2>{});
    else
      run(Constant<1>{});
  }
}

}  // namespace sne::SNE_ISA
