// Sums of tables of partial sums, row after row: the same order always.
#include "cuda/dispatch.h"

namespace sne {
namespace {

constexpr int kBlockColumns = 256;

struct Tables {
  sne_fast_cuda_table of[SNE_FAST_CUDA_TABLES];
};

// A thread block has so many columns of the table that block_id(1) counts.
template <class T>
SNE_KERNEL SNE_BOUNDS(kBlockColumns, 4) sum_tables(Tables tables) {
  const sne_fast_cuda_table table = tables.of[block_id(1)];
  const int64_t column = block_id() * kBlockColumns + thread_id();
  if (column >= table.size) return;
  float sum = 0;
  SNE_UNROLL_BY(8)
  for (int64_t row = 0; row < table.rows; ++row) sum += table.part[row * table.stride + column];
  ((T *)table.out)[column] = from_float<T>(sum);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_sum_tables(int precision, int64_t count, const sne_fast_cuda_table *tables, void *stream) {
  using namespace sne;
  if (count < 0 || count > SNE_FAST_CUDA_TABLES) return SNE_FAST_CUDA_BAD_ARGUMENT;
  Tables all{};
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) {
    all.of[i] = tables[i];
    if (tables[i].size > widest) widest = tables[i].size;
  }
  return with_storage(precision, [&](auto real) {
    return launch((Stream)stream, (widest + kBlockColumns - 1) / kBlockColumns, count, kBlockColumns, 0,
                  sum_tables<decltype(real)>, all);
  });
}
