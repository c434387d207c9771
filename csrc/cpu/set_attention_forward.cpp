// set_attention, forward: all tiles of queries.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/set_attention_tile.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer;

template <class Rows>
int forward(const sne_fast_set_attention_args &a, Interrupt &interrupt) {
  constexpr long P = kPanel<typename Rows::Real>;
  long count = 0;
  RowItem *items = cut_rows(a.num_sets, a.q_ptr, P, &count);
  if (!items) return SNE_FAST_NO_MEMORY;
  int failed = 0;
  const int threads = int(max_of(1, min_of(a.num_threads, count))), grab = items_per_grab(count, threads);
#pragma omp parallel num_threads(threads)
  {
    AttentionWork<Rows> work;
    char *base = buffer.lay_out(work, a.hidden, a.heads);
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, grab)
    for (long i = 0; i < count; ++i) {
      if (!base || interrupt.stop()) continue;
      attend_rows(a, items[i], work);
    }
  }
  free(items);
  return interrupt.status(failed);
}

}  // namespace

int set_attention_forward(int dtype, const sne_fast_set_attention_args &a, Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? forward<RoundedRows>(a, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? forward<RealRows<double> >(a, interrupt) : forward<RealRows<float> >(a, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
