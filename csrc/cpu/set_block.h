// set_block: rows in panels for its products and norms, which know no sets, and in tiles of sets for its attention.
#pragma once

#include "cpu/chunk_norm.h"
#include "cpu/interrupt.h"
#include "cpu/set_attention_tile.h"

namespace sne::SNE_ISA {

// Where a matrix serves so many panels, it is packed once.
constexpr long kPanelsWorthPacking = 16;

// A linear layer on panels: x (in, P), y (out, P), both operands of its products.
template <class Rows>
struct LinearLayer {
  using T = typename Rows::Real;
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

// A panel (F, P) as an operand of products over its features: itself, or rounded to `space` (F/2, P).
template <class T>
SNE_INLINE const T *panel_operand(RealRows<T>, long, const T *panel, T *) {
  return panel;
}

#if defined(SNE_BF16)

template <>
struct LinearLayer<PairRows> {
  const float *w, *b;
  long out, in;
  Pair *packed = nullptr, *packed_back = nullptr;

  LinearLayer(const void *weight, const void *bias, long rows, long columns)
      : w((const float *)weight), b((const float *)bias), out(rows), in(columns) {}
  void take(Scratch &scratch, long, bool backward) {
    packed = scratch.take<Pair>(out * in / 2);
    if (backward) packed_back = scratch.take<Pair>(out * in / 2);
  }
  void pack_weights() {
    pack_pairs(out, in, w, in, 1, packed);
    if (packed_back) pack_pairs(in, out, w, 1, in, packed_back);
  }
  void apply(const Pair *x, float *y, unsigned flags = kStore) const {
    packed_product(out, packed, x, in / 2, {y, nullptr, nullptr}, b, flags);
  }
  // Writes y rounded, (out/2, P).
  void apply_rounded(const Pair *x, Pair *y) const { packed_product(out, packed, x, in / 2, {nullptr, y, nullptr}, b); }
  void apply_back(const Pair *y, float *x, unsigned flags = kStore) const {
    packed_product(in, packed_back, y, out / 2, {x, nullptr, nullptr}, nullptr, flags);
  }
};

SNE_INLINE const Pair *panel_operand(PairRows, long F, const float *panel, Pair *space) {
  round_panel(F, panel, space, nullptr);
  return space;
}

#endif

// A thread's buffers of the forward.
template <class Rows>
struct BlockWork {
  using T = typename Rows::Real;
  using Entry = typename Rows::Entry;
  T *in, *o, *t, *rows;  // (widest row, P), (h, P), (h, P), (P, widest row)
  Entry *words, *panel;  // (P, widest row), (widest row, P)
  AttentionWork<Rows> attention;
  void take(Scratch &scratch, long widest, long h, long H) {
    constexpr long P = kPanel<T>;
    in = scratch.take<T>(widest * P);
    o = scratch.take<T>(h * P);
    t = scratch.take<T>(h * P);
    rows = scratch.take<T>(widest * P);
    const long space = Rows::kNumbers == 1 ? 0 : widest * P / Rows::kNumbers;
    words = scratch.take<Entry>(space);
    panel = scratch.take<Entry>(space);
    attention.take(scratch, h, H);
  }
};

// Sizes, weights, and what all threads of a call share.
template <class RowsOf>
struct SetBlock {
  using Rows = RowsOf;
  using T = typename Rows::Real;
  using Entry = typename Rows::Entry;
  const sne_fast_set_block_args &a;
  long h, H, q_panels, k_panels, widest;
  bool norms;
  LinearLayer<Rows> q, k, v, o;
  T *query, *attended, *lse;                  // (rows_q, h) twice, (rows_q, H)
  Entry *query_rows, *key_rows, *value_rows;  // (rows, h) results of the projections, as operands
  RowItem *items = nullptr;                   // of the queries
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
    const long width = h / Rows::kNumbers;
    query = scratch.take<T>(a.rows_q * h);
    key_rows = scratch.take<Entry>(a.rows_k * width);
    value_rows = scratch.take<Entry>(a.rows_k * width);
    if constexpr (Rows::kNumbers == 1)
      query_rows = query;
    else
      query_rows = scratch.take<Entry>(a.rows_q * width);
    attended = scratch.take<T>(a.rows_q * h);
    lse = scratch.take<T>(a.rows_q * H);
  }
  // Packs weights and cuts the sets of queries into items, once memory is taken. Returns false if there is none.
  bool prepare() {
    LinearLayer<Rows> *const layers[] = {&q, &k, &v, &o};
    for (LinearLayer<Rows> *layer : layers) layer->pack_weights();
    items = cut_rows(a.num_sets, a.q_ptr, kPanel<T>, &num_items);
    attention = {a.num_sets, a.rows_q, a.rows_k,   h,        H,  a.num_threads, a.q_ptr, a.k_ptr,
                 query_rows, key_rows, value_rows, attended, lse};
    return items != nullptr;
  }
  // Threads worth waking: two panels of rows or more for each.
  int threads() const { return int(max_of(1, min_of(a.num_threads, (q_panels + k_panels) / 2))); }
  const T *norm_of(int which) const { return (const T *)a.norm + which * h; }

  // Projects panel i: those of the keys come first, then those of the queries.
  void project(long i, BlockWork<Rows> &w) const {
    constexpr long P = kPanel<T>;
    const bool is_key = i < k_panels;
    const long first = (is_key ? i : i - k_panels) * P, dim = is_key ? a.dim_k : a.dim_q;
    const long count = min_of(P, (is_key ? a.rows_k : a.rows_q) - first);
    const T *from = (const T *)(is_key ? a.k : a.q) + first * dim;
    if constexpr (Rows::kNumbers == 1) {
      to_lanes(from, dim, count, dim, w.in, P);
      auto layer = [&](const LinearLayer<Rows> &linear, T *to) {
        linear.apply(w.in, w.o);
        from_lanes(w.o, P, count, h, to + first * h, h);
      };
      if (is_key) {
        layer(k, key_rows);
        layer(v, value_rows);
      } else {
        layer(q, query);
      }
    } else {
      round_rows(from, count * dim, w.words);
      Rows::onto_lanes(w.words, dim / 2, count, w.panel, P);
      auto layer = [&](const LinearLayer<Rows> &linear, Entry *to) {
        linear.apply_rounded(w.panel, w.words);
        from_lanes((const float *)w.words, P, count, h / 2, (float *)to + first * h / 2, h / 2);
      };
      if (is_key) {
        layer(k, key_rows);
        layer(v, value_rows);
      } else {
        q.apply(w.panel, w.o);
        from_lanes(w.o, P, count, h, query + first * h, h);
        round_rows(query + first * h, count * h, query_rows + first * h / 2);
      }
    }
  }

  // Writes to `sum` that of queries and attended rows of panel i, normalised, and to `relu` its product. hat and rstd
  // may be null.
  void feed(long i, T *sum, T *relu, BlockWork<Rows> &w, T *hat, T *rstd) const {
    constexpr long P = kPanel<T>;
    const long first = i * P, count = min_of(P, a.rows_q - first);
    rows_to_lanes(query + first * h, attended + first * h, count, w, sum);
    if (norms) norm_panel<T>(h, sum, nullptr, norm_of(0), norm_of(1), sum, hat, rstd);
    o.apply(panel_operand(Rows{}, h, sum, w.panel), relu, kRelu);
  }
  // Writes the sums of `count` rows of width h to panel `to`.
  void rows_to_lanes(const T *one, const T *two, long count, BlockWork<Rows> &w, T *to) const {
    for (long j = 0; j < count * h; j += kLanes<T>) store(w.rows + j, load(one + j) + load(two + j));
    to_lanes(w.rows, h, count, h, to, kPanel<T>);
  }
};

}  // namespace sne::SNE_ISA
