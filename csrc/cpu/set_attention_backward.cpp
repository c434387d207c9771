// set_attention, backward: all tiles of queries, then all tiles of keys.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/set_attention_tile_backward.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer, shared_buffer;

template <class Rows>
int backward(const sne_fast_set_attention_args &a, const sne_fast_set_attention_grads &g, Interrupt &interrupt) {
  using T = typename Rows::Real;
  using Entry = typename Rows::Entry;
  using Result = typename Rows::Result;
  constexpr long P = kPanel<T>;
  const long h = a.hidden, H = a.heads, sums = a.rows_q * H;
  long queries = 0, keys = 0;
  RowItem *q_items = cut_rows(a.num_sets, a.q_ptr, P, &queries);
  RowItem *k_items = cut_rows(a.num_sets, a.k_ptr, P, &keys);
  T *shared = (T *)shared_buffer.reserve(size_t(3 * sums + 1) * sizeof(T));
  if (!q_items || !k_items || !shared) {
    free(q_items);
    free(k_items);
    return SNE_FAST_NO_MEMORY;
  }
  AttentionPointers<Rows> at = {
      (const Entry *)a.q, (const Entry *)a.k, (const Entry *)a.v, (const Entry *)g.grad, nullptr,
      (const T *)a.lse,   (Result *)g.q,      (Result *)g.k,      (Result *)g.v,         shared,
      shared + sums,      shared + 2 * sums};
  if constexpr (Rows::kNumbers == 1) at.out = (const T *)a.out;  // a rounded one would spoil <grad, out>
  int failed = 0;
  const int threads = int(max_of(1, min_of(a.num_threads, queries > keys ? queries : keys)));
  const int q_grab = items_per_grab(queries, threads), k_grab = items_per_grab(keys, threads);
#pragma omp parallel num_threads(threads)
  {
    AttentionBackWork<Rows> w;
    char *base = buffer.lay_out(w, h, H);
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, q_grab)
    for (long i = 0; i < queries; ++i) {
      if (!base || interrupt.stop()) continue;
      query_gradient_rows(a, at, q_items[i], w);
    }
#pragma omp for schedule(dynamic, k_grab)
    for (long i = 0; i < keys; ++i) {
      if (!base || interrupt.stop()) continue;
      key_gradient_rows(a, at, k_items[i], w);
    }
  }
  free(q_items);
  free(k_items);
  shared_buffer.trim();
  return interrupt.status(failed);
}

}  // namespace

int set_attention_backward(int dtype, const sne_fast_set_attention_args &a, const sne_fast_set_attention_grads &g,
                           Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? backward<RoundedRows>(a, g, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? backward<RealRows<double> >(a, g, interrupt)
                               : backward<RealRows<float> >(a, g, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
