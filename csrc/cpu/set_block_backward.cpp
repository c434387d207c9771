// set_block, backward: projections and attention are computed again, then walked back, in one team of threads.
//
// Parameter gradients are summed per slice, a fixed run of panels, and slices are added in order, so that the bits do
// not depend on the number of threads.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/set_attention_tile_backward.h"
#include "cpu/set_block.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer shared_buffer, slice_buffer, buffer;

// Sums of one slice for some matrices (h, in) and vectors (h), the latter with a vector of lanes per entry.
template <class T>
struct BlockSums {
  T *w[2], *lanes[6];  // of queries: w_q, w_o, b_q, b_o, norm (4); of keys: w_k, w_v, b_k, b_v
  T *begin;
  long count;
  void place(T *base, long h, long first, long second, int vectors) {
    begin = base;
    w[0] = base;
    w[1] = w[0] + h * first;
    base = w[1] + h * second;
    for (int i = 0; i < vectors; ++i) {
      lanes[i] = base;
      base += h * kLanes<T>;
    }
    count = base - begin;
  }
};

template <class Rows>
struct BackBlockWork {
  using T = typename Rows::Real;
  using Entry = typename Rows::Entry;
  BlockWork<Rows> forward;
  AttentionBackWork<Rows> attention;
  T *hat[2], *rstd[2], *relu, *g, *g_relu;  // (h, P), (P), (h, P) three times
  Entry *features, *slots, *pairs;          // (h, P) a gradient in two layouts, (P, widest row) rows in pairs
  void take(Scratch &scratch, long widest, long h, long H) {
    constexpr long P = kPanel<T>;
    forward.take(scratch, widest, h, H);
    attention.take(scratch, h, H);
    for (int i = 0; i < 2; ++i) {
      hat[i] = scratch.take<T>(h * P);
      rstd[i] = scratch.take<T>(P);
    }
    relu = scratch.take<T>(h * P);
    g = scratch.take<T>(h * P);
    g_relu = scratch.take<T>(h * P);
    const bool rounds = Rows::kNumbers > 1;
    features = scratch.take<Entry>(rounds ? h * P / 2 : 0);
    slots = scratch.take<Entry>(rounds ? h * P / 2 : 0);
    pairs = scratch.take<Entry>(rounds ? widest * P / 2 : 0);
  }
};

// What all threads of a call share besides the block.
template <class Rows>
struct Gradients {
  using T = typename Rows::Real;
  using Entry = typename Rows::Entry;
  const sne_fast_set_block_grads &to;
  T *sum, *query, *key, *value;  // (rows, h): of queries plus attended rows, of the results of the projections
  Entry *sum_rows;               // the first as an operand
  AttentionPointers<Rows> attention;
  RowItem *k_items = nullptr;
  long num_k_items = 0;
  explicit Gradients(const sne_fast_set_block_grads &grads) : to(grads) {}
  ~Gradients() { free(k_items); }
  Gradients(const Gradients &) = delete;
  Gradients &operator=(const Gradients &) = delete;
  void take(Scratch &scratch, const SetBlock<Rows> &b) {
    sum = scratch.take<T>(b.a.rows_q * b.h);
    if constexpr (Rows::kNumbers == 1)
      sum_rows = sum;
    else
      sum_rows = scratch.take<Entry>(b.a.rows_q * b.h / 2);
    query = scratch.take<T>(b.a.rows_q * b.h);
    key = scratch.take<T>(b.a.rows_k * b.h);
    value = scratch.take<T>(b.a.rows_k * b.h);
    T *top = scratch.take<T>(b.a.rows_q * b.H), *log_sum = scratch.take<T>(b.a.rows_q * b.H);
    T *dot = scratch.take<T>(b.a.rows_q * b.H);
    attention = {b.query_rows, b.key_rows, b.value_rows, sum_rows, b.attended, b.lse,
                 query,        key,        value,        top,      log_sum,    dot};
  }
};

// dw (h, in) += sum over rows of g (h, P) x rows (count, in), and lanes of db likewise. Lanes without a row hold zeros.
// Returns g as an operand of products over features.
template <class Rows, class T = typename Rows::Real>
const typename Rows::Entry *add_parameters(long h, const T *g, const T *rows, long in, long count,
                                           BackBlockWork<Rows> &w, T *dw, T *db_lanes) {
  constexpr int W = kLanes<T>, NV = SNE_VECTORS_PER_PANEL, P = int(kPanel<T>);
  for (long f = 0; f < h; ++f) {
    Vec<T> sum = load(db_lanes + f * W);
    for (int v = 0; v < NV; ++v) sum += load(g + f * P + v * W);
    store(db_lanes + f * W, sum);
  }
  if constexpr (Rows::kNumbers == 1) {
    product_wide<T, P, 1>(h, g, 0, 0, rows, in, count, dw, in, in, nullptr, kAccumulate);
    return g;
  } else {
    pair_rows(rows, count, in, w.pairs);
    round_panel(h, g, w.features, w.slots);
    add_slot_products(h, in, w.slots, w.pairs, dw);
    return w.features;
  }
}

// Walks panel i back from the gradient of the output to that of the sum of queries and attended rows.
template <class Rows, class T = typename Rows::Real>
void feed_backward(const SetBlock<Rows> &block, const Gradients<Rows> &grads, long i, BackBlockWork<Rows> &w,
                   const BlockSums<T> &sums) {
  constexpr long P = kPanel<T>;
  constexpr int W = kLanes<T>;
  const long h = block.h, first = i * P, count = min_of(P, block.a.rows_q - first);
  T *o = w.forward.o, *g = w.g;
  block.feed(i, o, w.relu, w.forward, w.hat[0], w.rstd[0]);
  to_lanes((const T *)grads.to.grad + first * h, h, count, h, g, P);
  if (block.norms) {
    norm_panel<T>(h, o, w.relu, block.norm_of(2), block.norm_of(3), w.forward.t, w.hat[1], w.rstd[1]);
    norm_panel_backward<T>(h, g, w.hat[1], w.rstd[1], block.norm_of(2), sums.lanes[4], sums.lanes[5]);
  }
  for (long f = 0; f < h * P; f += W) store(w.g_relu + f, keep<T>(~(load(w.relu + f) <= T(0)), load(g + f)));
  from_lanes(o, P, count, h, w.forward.rows, h);
  const auto *back = add_parameters<Rows>(h, w.g_relu, w.forward.rows, h, count, w, sums.w[1], sums.lanes[1]);
  block.o.apply_back(back, g, kAccumulate);
  if (block.norms) norm_panel_backward<T>(h, g, w.hat[0], w.rstd[0], block.norm_of(0), sums.lanes[2], sums.lanes[3]);
  from_lanes(g, P, count, h, grads.sum + first * h, h);
  if constexpr (Rows::kNumbers > 1) round_rows(grads.sum + first * h, count * h, grads.sum_rows + first * h / 2);
}

// Writes the gradient of the query rows of panel i, from those of the queries by themselves and by attention.
template <class Rows, class T = typename Rows::Real>
void query_backward(const SetBlock<Rows> &block, const Gradients<Rows> &grads, long i, BackBlockWork<Rows> &w,
                    const BlockSums<T> &sums) {
  constexpr long P = kPanel<T>;
  const long h = block.h, dim = block.a.dim_q, first = i * P, count = min_of(P, block.a.rows_q - first);
  block.rows_to_lanes(grads.query + first * h, grads.sum + first * h, count, w.forward, w.g);
  const T *rows = (const T *)block.a.q + first * dim;
  const auto *back = add_parameters<Rows>(h, w.g, rows, dim, count, w, sums.w[0], sums.lanes[0]);
  block.q.apply_back(back, w.forward.in);
  from_lanes(w.forward.in, P, count, dim, (T *)grads.to.q + first * dim, dim);
}

// Writes the gradient of the key rows of panel i, from those of keys and values.
template <class Rows, class T = typename Rows::Real>
void key_backward(const SetBlock<Rows> &block, const Gradients<Rows> &grads, long i, BackBlockWork<Rows> &w,
                  const BlockSums<T> &sums) {
  constexpr long P = kPanel<T>;
  const long h = block.h, dim = block.a.dim_k, first = i * P, count = min_of(P, block.a.rows_k - first);
  const T *rows = (const T *)block.a.k + first * dim;
  to_lanes(grads.key + first * h, h, count, h, w.g, P);
  block.k.apply_back(add_parameters<Rows>(h, w.g, rows, dim, count, w, sums.w[0], sums.lanes[0]), w.forward.in);
  to_lanes(grads.value + first * h, h, count, h, w.g, P);
  block.v.apply_back(add_parameters<Rows>(h, w.g, rows, dim, count, w, sums.w[1], sums.lanes[1]), w.forward.in,
                     kAccumulate);
  from_lanes(w.forward.in, P, count, dim, (T *)grads.to.k + first * dim, dim);
}

// Returns the number of slices of so many panels: two or more each, as clearing and adding them takes time.
long slices_of(long panels) { return max_of(1, min_of(64, (panels + 1) / 2)); }

// Adds the numbers from..to-1 of all slices to those of the first, in order.
template <class T>
void add_slices(T *base, long slices, long count, long from, long to) {
  for (long s = 1; s < slices; ++s)
    for (long i = from; i < to; ++i) base[i] += base[s * count + i];
}

template <class T>
void write_lanes(const T *lanes, long n, void *to) {
  for (long i = 0; i < n; ++i) ((T *)to)[i] = horizontal_sum<T>(load(lanes + i * kLanes<T>));
}

template <class Rows>
int backward(const sne_fast_set_block_args &args, const sne_fast_set_block_grads &to, Interrupt &interrupt) {
  using T = typename Rows::Real;
  SetBlock<Rows> block(args);
  Gradients<Rows> grads(to);
  const long h = block.h, q_slices = slices_of(block.q_panels), k_slices = slices_of(block.k_panels);
  const int q_vectors = block.norms ? 6 : 2;
  BlockSums<T> q_sums, k_sums;
  q_sums.place(nullptr, h, args.dim_q, h, q_vectors);
  k_sums.place(nullptr, h, args.dim_k, args.dim_k, 2);
  const long q_count = q_sums.count, k_count = k_sums.count;
  Scratch size;
  block.take(size, true);
  grads.take(size, block);
  char *shared = shared_buffer.reserve(size.size());
  T *q_base = (T *)slice_buffer.reserve(size_t(q_slices * q_count + k_slices * k_count) * sizeof(T));
  if (!shared || !q_base) return SNE_FAST_NO_MEMORY;
  T *k_base = q_base + q_slices * q_count;
  Scratch scratch(shared);
  block.take(scratch, true);
  grads.take(scratch, block);
  grads.k_items = cut_rows(args.num_sets, args.k_ptr, kPanel<T>, &grads.num_k_items);
  if (!block.prepare() || !grads.k_items) return SNE_FAST_NO_MEMORY;
  int failed = 0;
  const int threads = block.threads();
  const int q_grab = items_per_grab(block.num_items, threads), k_grab = items_per_grab(grads.num_k_items, threads);
#pragma omp parallel num_threads(threads)
  {
    const TileRegisters registers;
    BackBlockWork<Rows> w;
    char *base = buffer.lay_out(w, block.widest, h, block.H);
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
    BlockSums<T> sums;
    auto goes_on = [&] { return base && !interrupt.stop(); };
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < block.k_panels + block.q_panels; ++i)
      if (goes_on()) block.project(i, w.forward);
#pragma omp for schedule(dynamic, q_grab)
    for (long i = 0; i < block.num_items; ++i)
      if (goes_on()) attend_rows(block.attention, block.items[i], w.forward.attention);
#pragma omp for schedule(dynamic, 1)
    for (long s = 0; s < q_slices; ++s) {
      sums.place(q_base + s * q_count, h, args.dim_q, h, q_vectors);
      memset(sums.begin, 0, size_t(q_count) * sizeof(T));
      for (long i = block.q_panels * s / q_slices; i < block.q_panels * (s + 1) / q_slices && goes_on(); ++i)
        feed_backward(block, grads, i, w, sums);
    }
#pragma omp for schedule(dynamic, q_grab)
    for (long i = 0; i < block.num_items; ++i)
      if (goes_on()) query_gradient_rows(block.attention, grads.attention, block.items[i], w.attention);
#pragma omp for schedule(dynamic, k_grab)
    for (long i = 0; i < grads.num_k_items; ++i)
      if (goes_on()) key_gradient_rows(block.attention, grads.attention, grads.k_items[i], w.attention);
#pragma omp for schedule(dynamic, 1)
    for (long s = 0; s < k_slices + q_slices; ++s) {
      if (s < k_slices) {
        sums.place(k_base + s * k_count, h, args.dim_k, args.dim_k, 2);
        memset(sums.begin, 0, size_t(k_count) * sizeof(T));
        for (long i = block.k_panels * s / k_slices; i < block.k_panels * (s + 1) / k_slices && goes_on(); ++i)
          key_backward(block, grads, i, w, sums);
        continue;
      }
      const long slice = s - k_slices;
      sums.place(q_base + slice * q_count, h, args.dim_q, h, q_vectors);
      for (long i = block.q_panels * slice / q_slices; i < block.q_panels * (slice + 1) / q_slices && goes_on(); ++i)
        query_backward(block, grads, i, w, sums);
    }
    constexpr long kStep = 4096;
#pragma omp for schedule(static) nowait
    for (long from = 0; from < q_count; from += kStep)
      add_slices(q_base, q_slices, q_count, from, min_of(q_count, from + kStep));
#pragma omp for schedule(static)
    for (long from = 0; from < k_count; from += kStep)
      add_slices(k_base, k_slices, k_count, from, min_of(k_count, from + kStep));
  }
  if (failed || interrupt.stopped()) return interrupt.status(failed);
  q_sums.place(q_base, h, args.dim_q, h, q_vectors);
  k_sums.place(k_base, h, args.dim_k, args.dim_k, 2);
  memcpy(to.w_q, q_sums.w[0], size_t(h * args.dim_q) * sizeof(T));
  memcpy(to.w_o, q_sums.w[1], size_t(h * h) * sizeof(T));
  memcpy(to.w_k, k_sums.w[0], size_t(h * args.dim_k) * sizeof(T));
  memcpy(to.w_v, k_sums.w[1], size_t(h * args.dim_k) * sizeof(T));
  write_lanes<T>(q_sums.lanes[0], h, to.b_q);
  write_lanes<T>(q_sums.lanes[1], h, to.b_o);
  write_lanes<T>(k_sums.lanes[0], h, to.b_k);
  write_lanes<T>(k_sums.lanes[1], h, to.b_v);
  if (block.norms) write_lanes<T>(q_sums.lanes[2], 4 * h, to.norm);
  shared_buffer.trim();
  slice_buffer.trim();
  return SNE_FAST_OK;
}

}  // namespace

int set_block_backward(int dtype, const sne_fast_set_block_args &a, const sne_fast_set_block_grads &g,
                       Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? backward<PairRows>(a, g, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? backward<RealRows<double> >(a, g, interrupt)
                               : backward<RealRows<float> >(a, g, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
