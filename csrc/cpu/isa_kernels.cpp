// The kernel table of one instruction set, and the product alone, to measure the throughput of the machine.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/product_bf16.h"
#include "sne_fast/scratch.h"

namespace sne::SNE_ISA {
namespace {

thread_local ThreadBuffer buffer;

#if defined(SNE_BF16)

int rate(long rows, long inner, long columns, long repeats, int threads) {
  constexpr long P = kWidePanel;
  if (inner % 32 || columns % 32) return SNE_FAST_BAD_ARGUMENT;
  const long panels = (rows + P - 1) / P, words = inner / 2;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    const TileRegisters registers;
    Scratch size;
    size.take<float>(columns * inner + (words + columns) * P + columns * words);
    float *w = (float *)buffer.reserve(size.size());
    if (w) {
      float *out = w + columns * inner;
      Pair *packed = (Pair *)(out + columns * P), *in = packed + columns * words;
      for (long i = 0; i < columns * inner; ++i) w[i] = float(i % 13) - 6;
      for (long i = 0; i < words * P; ++i) in[i] = pair_of(float(i % 7) - 3, float(i % 5) - 2);
      pack_pairs(columns, inner, w, inner, 1, packed);
#pragma omp for schedule(static)
      for (long i = 0; i < panels * repeats; ++i) packed_product(columns, packed, in, words, {out, nullptr, nullptr});
    } else {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed ? SNE_FAST_NO_MEMORY : SNE_FAST_OK;
}

#else

template <class T>
int rate(long rows, long inner, long columns, long repeats, int threads) {
  constexpr long P = kPanel<T>;
  const long panels = (rows + P - 1) / P;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    Scratch size;
    size.take<T>(2 * columns * inner + (inner + columns) * P);
    T *w = (T *)buffer.reserve(size.size());
    if (w) {
      T *packed = w + columns * inner, *in = packed + columns * inner, *out = in + inner * P;
      for (long i = 0; i < columns * inner; ++i) w[i] = T(i % 13) - 6;
      for (long i = 0; i < inner * P; ++i) in[i] = T(i % 7) - 3;
      pack(columns, inner, w, inner, 1, packed);
#pragma omp for schedule(static)
      for (long i = 0; i < panels * repeats; ++i) packed_product<T>(columns, packed, in, inner, out);
    } else {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed ? SNE_FAST_NO_MEMORY : SNE_FAST_OK;
}

#endif

}  // namespace

int product_rate(int dtype, long rows, long inner, long columns, long repeats, int threads) {
#if defined(SNE_BF16)
  return dtype == SNE_FAST_BF16 ? rate(rows, inner, columns, repeats, threads) : SNE_FAST_BAD_DTYPE;
#else
  return dtype == SNE_FAST_F64 ? rate<double>(rows, inner, columns, repeats, threads)
                               : rate<float>(rows, inner, columns, repeats, threads);
#endif
}

#define SNE_TEXT_(x) #x
#define SNE_TEXT(x) SNE_TEXT_(x)

extern const Kernels kernels = {
    SNE_TEXT(SNE_ISA),
    {kLanes<float>, kLanes<double>},
    {kPanel<float>, kPanel<double>},
    chunk_encode_forward,
    chunk_encode_backward,
#if defined(SNE_AMX)  // no products of whole panels, for which tiles are
    avx512_bf16::set_attention_forward,
    avx512_bf16::set_attention_backward,
    avx512_bf16::segment_pool_forward,
    avx512_bf16::segment_pool_backward,
#else
    set_attention_forward,
    set_attention_backward,
    segment_pool_forward,
    segment_pool_backward,
#endif
    set_block_forward,
    set_block_backward,
#if defined(SNE_BF16)
    nullptr,
    product_rate,
    &avx512::kernels,
#else
    tensor_statistics,
    product_rate,
    nullptr,
#endif
};

}  // namespace sne::SNE_ISA
