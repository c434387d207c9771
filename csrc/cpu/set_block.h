// set_block: rows in panels for its products and norms, which know no sets, and in tiles of sets for its attention.
#pragma once

#include "cpu/chunk_norm.h"
#include "cpu/interrupt.h"
#include "cpu/set_attention_tile.h"

namespace sne::SNE_ISA {

// Where a matrix serves so many panels, it is packed once.
constexpr long kPanelsWorthPacking = 16;

// A linear layer on panels: x (in, P), y (out, P).
template <class T>
struct LinearLayer {
  const T *w, *b;
  long out, in;
  T *packed = nullptr, *packed_back = nullptr;

  LinearLayer(const void *weight, const void *bias, long rows, long columns)
      : w((const T *)weight), b((const T *)bias), out(rows), in(columns) {}
  void take(Scratch &scratch, long panels, bool backward) {
    if (panels < kPanelsWorthPacking) return;
    packed = scratch.take<T>(out * in);
    if (backward) packed_back = scratch.take<T>(out * in);
  }
  void pack_weights() {
    if (packed) pack(out, in, w, in, 1, packed);
    if (packed_back) pack(in, out, w, 1, in, packed_back);
  }
  // y = w x + b.
  void apply(const T *x, T *y, unsigned flags = kStore) const {
    constexpr long P = kPanel<T>;
    if (packed)
      packed_product<T>(out, packed, x, in, y, b, flags);
    else
      product<T, SNE_VECTORS_PER_PANEL, 0, 1>(out, w, in, 0, x, P, in, y, P, b, flags);
  }
  // x = w^T y, or is added to.
  void apply_back(const T *y, T *x, unsigned flags = kStore) const {
    constexpr long P = kPanel<T>;
    if (packed_back)
      packed_product<T>(in, packed_back, y, out, x, nullptr, flags);
    else
      product<T, SNE_VECTORS_PER_PANEL, 1, 0>(in, w, 0, in, y, P, out, x, P, nullptr, flags);
  }
};

// Panels of P rows.
template <class T>
long panels_of(long rows) {
  return (rows + kPanel<T> - 1) / kPanel<T>;
}

// A thread's buffers of the forward.
template <class T>
struct BlockWork {
  T *in, *o, *t;  // (widest row, P), (h, P), (h, P)
  AttentionWork<T> attention;
  void take(Scratch &scratch, long widest, long h, long H) {
    in = scratch.take<T>(widest * kPanel<T>);
    o = scratch.take<T>(h * kPanel<T>);
    t = scratch.take<T>(h * kPanel<T>);
    attention.take(scratch, h, H);
  }
};

// Sizes, weights, and what all threads of a call share.
template <class T>
struct SetBlock {
  const sne_fast_set_block_args &a;
  long h, H, q_panels, k_panels, widest;
  bool norms;
  LinearLayer<T> q, k, v, o;
  T *query, *key, *value, *attended, *lse;  // (rows, h), (rows_q, H)
  RowItem *items = nullptr;                 // of the queries
  long num_items = 0;
  sne_fast_set_attention_args attention;

  explicit SetBlock(const sne_fast_set_block_args &args)
      : a(args), h(a.hidden), H(a.heads), q_panels(panels_of<T>(a.rows_q)), k_panels(panels_of<T>(a.rows_k)),
        widest(max_of(h, max_of(a.dim_q, a.dim_k))), norms(a.layer_norm != 0), q(a.w_q, a.b_q, h, a.dim_q),
        k(a.w_k, a.b_k, h, a.dim_k), v(a.w_v, a.b_v, h, a.dim_k), o(a.w_o, a.b_o, h, h) {}
  ~SetBlock() { free(items); }
  SetBlock(const SetBlock &) = delete;
  SetBlock &operator=(const SetBlock &) = delete;

  void take(Scratch &scratch, bool backward) {
    q.take(scratch, q_panels, backward);
    k.take(scratch, k_panels, backward);
    v.take(scratch, k_panels, backward);
    o.take(scratch, q_panels, backward);
    query = scratch.take<T>(a.rows_q * h);
    key = scratch.take<T>(a.rows_k * h);
    value = scratch.take<T>(a.rows_k * h);
    attended = scratch.take<T>(a.rows_q * h);
    lse = scratch.take<T>(a.rows_q * H);
  }
  // Packs weights and cuts the sets of queries into items, once memory is taken. Returns false if there is none.
  bool prepare() {
    LinearLayer<T> *const layers[] = {&q, &k, &v, &o};
    for (LinearLayer<T> *layer : layers) layer->pack_weights();
    items = cut_rows(a.num_sets, a.q_ptr, kPanel<T>, &num_items);
    attention = {a.num_sets, a.rows_q, a.rows_k, h,        H,  a.num_threads, a.q_ptr, a.k_ptr,
                 query,      key,      value,    attended, lse};
    return items != nullptr;
  }
  // Threads worth waking: two panels of rows or more for each.
  int threads() const { return int(max_of(1, min_of(a.num_threads, (q_panels + k_panels) / 2))); }
  const T *norm_of(int which) const { return (const T *)a.norm + which * h; }

  // Projects panel i: those of the keys come first, then those of the queries.
  void project(long i, BlockWork<T> &w) const {
    constexpr long P = kPanel<T>;
    const bool is_key = i < k_panels;
    const long first = (is_key ? i : i - k_panels) * P, dim = is_key ? a.dim_k : a.dim_q;
    const long count = min_of(P, (is_key ? a.rows_k : a.rows_q) - first);
    to_lanes((const T *)(is_key ? a.k : a.q) + first * dim, dim, count, dim, w.in, P);
    auto layer = [&](const LinearLayer<T> &linear, T *to) {
      linear.apply(w.in, w.o);
      from_lanes(w.o, P, count, h, to + first * h, h);
    };
    if (is_key) {
      layer(k, key);
      layer(v, value);
    } else {
      layer(q, query);
    }
  }

  // Writes to.o the sum of queries and attended rows of panel i, normalised, and to.relu its product. hat and rstd may
  // be null.
  void feed(long i, T *sum, T *other, T *relu, T *hat, T *rstd) const {
    constexpr long P = kPanel<T>;
    const long first = i * P, count = min_of(P, a.rows_q - first);
    to_lanes(query + first * h, h, count, h, sum, P);
    to_lanes(attended + first * h, h, count, h, other, P);
    for (long f = 0; f < h * P; f += kLanes<T>) store(sum + f, load(sum + f) + load(other + f));
    if (norms) norm_panel<T>(h, sum, nullptr, norm_of(0), norm_of(1), sum, hat, rstd);
    o.apply(sum, relu, kRelu);
  }
};

}  // namespace sne::SNE_ISA
