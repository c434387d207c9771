// set_block, forward: projections by panels, attention by tiles of sets, feed-forward by panels, in one team of
// threads.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/set_block.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer shared_buffer, buffer;

template <class Rows>
void finish(const SetBlock<Rows> &block, long i, BlockWork<Rows> &w) {
  using T = typename Rows::Real;
  constexpr long P = kPanel<T>;
  const long h = block.h, first = i * P, count = min_of(P, block.a.rows_q - first);
  block.feed(i, w.o, w.in, w, nullptr, nullptr);
  if (block.norms) {
    norm_panel<T>(h, w.o, w.in, block.norm_of(2), block.norm_of(3), w.t, nullptr, nullptr);
  } else {
    for (long f = 0; f < h * P; f += kLanes<T>) store(w.t + f, load(w.o + f) + load(w.in + f));
  }
  from_lanes(w.t, P, count, h, (T *)block.a.out + first * h, h);
}

template <class Rows>
int forward(const sne_fast_set_block_args &args, Interrupt &interrupt) {
  SetBlock<Rows> block(args);
  if (!shared_buffer.lay_out(block, false) || !block.prepare()) return SNE_FAST_NO_MEMORY;
  int failed = 0;
  const int threads = block.threads(), grab = items_per_grab(block.num_items, threads);
#pragma omp parallel num_threads(threads)
  {
    const TileRegisters registers;
    BlockWork<Rows> w;
    char *base = buffer.lay_out(w, block.widest, block.h, block.H);
    if (!base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < block.k_panels + block.q_panels; ++i)
      if (base && !interrupt.stop()) block.project(i, w);
#pragma omp for schedule(dynamic, grab)
    for (long i = 0; i < block.num_items; ++i)
      if (base && !interrupt.stop()) attend_rows(block.attention, block.items[i], w.attention);
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < block.q_panels; ++i)
      if (base && !interrupt.stop()) finish(block, i, w);
  }
  shared_buffer.trim();
  return interrupt.status(failed);
}

}  // namespace

int set_block_forward(int dtype, const sne_fast_set_block_args &a, Interrupt &interrupt) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? forward<PairRows>(a, interrupt) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? forward<RealRows<double> >(a, interrupt) : forward<RealRows<float> >(a, interrupt);
#endif
}

}  // namespace sne::SNE_ISA
