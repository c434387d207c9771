// Layer norm of one panel, forward and backward: features along memory, rows on lanes.
#pragma once

#include "cpu/product.h"

namespace sne::SNE_ISA {

// out = (y - mean) rstd w + b with y = in (+ add). Writes hat, the normalised rows, and rstd where they are not null.
template <class T>
__attribute__((noinline)) void norm_panel(long h, const T *in, const T *add, const T *w, const T *b, T *out, T *hat,
                                          T *rstd_out) {
  constexpr int W = kLanes<T>, NV = SNE_VECTORS_PER_PANEL;
  constexpr long P = kPanel<T>;
  Vec<T> mean[NV], rstd[NV];
  for (int v = 0; v < NV; ++v) mean[v] = rstd[v] = zero<T>();
  for (long f = 0; f < h; ++f)
    for (int v = 0; v < NV; ++v) {
      Vec<T> y = load(in + f * P + v * W);
      if (add) {
        y += load(add + f * P + v * W);
        store(out + f * P + v * W, y);
      }
      mean[v] += y;
    }
  const T *y_at = add ? out : in;
  for (int v = 0; v < NV; ++v) mean[v] *= T(1) / T(h);
  for (long f = 0; f < h; ++f)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> y = load(y_at + f * P + v * W) - mean[v];
      rstd[v] += y * y;
    }
  for (int v = 0; v < NV; ++v) {
    const Vec<T> var = rstd[v] * (T(1) / T(h)) + T(1e-5);
    rstd[v] = T(1) / vsqrt<T>(var) + (var - var);  // NaN where the variance overflowed: 0 would look like a result
  }
  for (long f = 0; f < h; ++f)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> y = (load(y_at + f * P + v * W) - mean[v]) * rstd[v];
      if (hat) store(hat + f * P + v * W, y);
      store(out + f * P + v * W, y * w[f] + b[f]);
    }
  if (rstd_out)
    for (int v = 0; v < NV; ++v) store(rstd_out + v * W, rstd[v]);
}

// Turns g from the gradient of the output into that of the input, and adds to dw and db (h vectors of lanes).
template <class T>
__attribute__((noinline)) void norm_panel_backward(long h, T *g, const T *hat, const T *rstd_in, const T *w, T *dw,
                                                   T *db) {
  constexpr int W = kLanes<T>, NV = SNE_VECTORS_PER_PANEL;
  constexpr long P = kPanel<T>;
  Vec<T> sum[NV], dot[NV];
  for (int v = 0; v < NV; ++v) sum[v] = dot[v] = zero<T>();
  for (long f = 0; f < h; ++f) {
    Vec<T> dwf = load(dw + f * W), dbf = load(db + f * W);
    for (int v = 0; v < NV; ++v) {
      const Vec<T> gv = load(g + f * P + v * W), hv = load(hat + f * P + v * W), gh = gv * hv;
      dwf += gh;
      dbf += gv;
      sum[v] += gv * w[f];
      dot[v] += gh * w[f];
    }
    store(dw + f * W, dwf);
    store(db + f * W, dbf);
  }
  for (int v = 0; v < NV; ++v) {
    sum[v] *= T(1) / T(h);
    dot[v] *= T(1) / T(h);
  }
  for (long f = 0; f < h; ++f)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> gv = load(g + f * P + v * W) * w[f], hv = load(hat + f * P + v * W);
      store(g + f * P + v * W, load(rstd_in + v * W) * (gv - sum[v] - hv * dot[v]));
    }
}

}  // namespace sne::SNE_ISA
