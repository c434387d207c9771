// The exported functions: choice of instruction set, checks of sizes, and nothing that depends on either.
#include <string.h>

#include <atomic>
#include <exception>
#include <initializer_list>

#include "cpu/gather_chunks.h"
#include "cpu/kernels.h"
#include "sne_fast/cpu_abi.h"

namespace {

using sne::Kernels;
using sne::TilePlan;

#if defined(__x86_64__)
#define SNE_X86 1
#else
#define SNE_X86 0
#endif

const Kernels *find(const char *name) {
  if (strcmp(name, "portable") == 0) return &sne::portable::kernels;
#if SNE_X86
  __builtin_cpu_init();
  if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &sne::avx2::kernels;
  if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return &sne::avx512::kernels;
#endif
  return nullptr;
}

const Kernels *best() {
  for (const char *name : {"avx512", "avx2"})
    if (const Kernels *k = find(name)) return k;
  return find("portable");
}

std::atomic<const Kernels *> selected{nullptr};

const Kernels &kernels() {
  const Kernels *k = selected.load(std::memory_order_acquire);
  if (!k) selected.store(k = best(), std::memory_order_release);
  return *k;
}

bool real(int dtype) { return dtype == SNE_FAST_F32 || dtype == SNE_FAST_F64; }

bool width(int64_t h, int64_t H) {
  return (h == 32 || h == 64 || h == 128 || h == 256) && H >= 1 && h % H == 0 && h / H >= 8 && h / H <= 64 &&
         (H & (H - 1)) == 0;
}

bool pointers(int64_t n, const int64_t *ptr, int64_t rows) {
  if (ptr[0] != 0 || ptr[n] != rows) return false;
  for (int64_t i = 0; i < n; ++i)
    if (ptr[i + 1] < ptr[i]) return false;
  return true;
}

// Makes the tile plan, then runs body(kernels, plan).
template <class Body>
int with_plan(int dtype, const sne_fast_chunk_encode_args *a, Body body) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  if (!width(a->hidden, a->heads) || a->num_chunks < 0 || a->element_rows < 0) return SNE_FAST_BAD_ARGUMENT;
  const Kernels &k = kernels();
  const int which = dtype == SNE_FAST_F64;
  TilePlan plan;
  int status = sne::make_tile_plan(dtype, *a, k.lanes[which], k.panel[which], &plan);
  if (status == SNE_FAST_OK) status = body(k, plan);
  sne::free_tile_plan(&plan);
  return status;
}

int check(int dtype, const sne_fast_set_attention_args *a) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  if (!width(a->hidden, a->heads) || a->num_sets < 0) return SNE_FAST_BAD_ARGUMENT;
  if (!pointers(a->num_sets, a->q_ptr, a->rows_q) || !pointers(a->num_sets, a->k_ptr, a->rows_k))
    return SNE_FAST_BAD_ARGUMENT;
  return SNE_FAST_OK;
}

int check(int dtype, const sne_fast_segment_pool_args *a) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  if (a->hidden < 16 || a->hidden % 16 || a->heads < 1 || a->num_segments < 0) return SNE_FAST_BAD_ARGUMENT;
  return pointers(a->num_segments, a->ptr, a->rows) ? SNE_FAST_OK : SNE_FAST_BAD_ARGUMENT;
}

}  // namespace

extern "C" {

int sne_fast_cpu_abi(void) { return SNE_FAST_CPU_ABI; }

const char *sne_fast_cpu_status(int status) {
  switch (status) {
    case SNE_FAST_OK: return "ok";
    case SNE_FAST_BAD_ARGUMENT: return "sizes or pointers do not fit together";
    case SNE_FAST_NO_MEMORY: return "out of memory";
    case SNE_FAST_BAD_DTYPE: return "unsupported dtype";
    case SNE_FAST_BAD_ISA: return "instruction set unknown, not built in, or not supported by this processor";
    default: return "unknown status";
  }
}

const char *sne_fast_cpu_isa(void) { return kernels().name; }

int sne_fast_cpu_has_isa(const char *name) { return find(name) != nullptr; }

int sne_fast_cpu_select_isa(const char *name) {
  const Kernels *k = name && *name ? find(name) : best();
  if (!k) return SNE_FAST_BAD_ISA;
  selected.store(k, std::memory_order_release);
  return SNE_FAST_OK;
}

int sne_fast_cpu_chunk_encode(int dtype, const sne_fast_chunk_encode_args *args, void *out) {
  return with_plan(dtype, args,
                   [&](const Kernels &k, const TilePlan &plan) { return k.chunk_encode(dtype, *args, plan, out); });
}

int sne_fast_cpu_chunk_encode_backward(int dtype, const sne_fast_chunk_encode_args *args,
                                       const sne_fast_chunk_encode_grads *grads) {
  return with_plan(dtype, args, [&](const Kernels &k, const TilePlan &plan) {
    return k.chunk_encode_backward(dtype, *args, plan, *grads);
  });
}

int sne_fast_cpu_set_attention(int dtype, const sne_fast_set_attention_args *args) {
  const int status = check(dtype, args);
  return status ? status : kernels().set_attention(dtype, *args);
}

int sne_fast_cpu_set_attention_backward(int dtype, const sne_fast_set_attention_args *args,
                                        const sne_fast_set_attention_grads *grads) {
  const int status = check(dtype, args);
  return status ? status : kernels().set_attention_backward(dtype, *args, *grads);
}

int sne_fast_cpu_segment_pool(int dtype, const sne_fast_segment_pool_args *args) {
  const int status = check(dtype, args);
  return status ? status : kernels().segment_pool(dtype, *args);
}

int sne_fast_cpu_segment_pool_backward(int dtype, const sne_fast_segment_pool_args *args,
                                       const sne_fast_segment_pool_grads *grads) {
  const int status = check(dtype, args);
  return status ? status : kernels().segment_pool_backward(dtype, *args, *grads);
}

int sne_fast_cpu_gather_chunks(int dtype, const sne_fast_gather_chunks_args *args) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  try {
    return sne::gather_chunks(dtype, *args);
  } catch (const std::exception &) {
    return SNE_FAST_NO_MEMORY;
  }
}

int sne_fast_cpu_gather_chunks_backward(int dtype, const sne_fast_gather_chunks_args *args) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  try {
    return sne::gather_chunks_backward(dtype, *args);
  } catch (const std::exception &) {
    return SNE_FAST_NO_MEMORY;
  }
}

int sne_fast_cpu_product_rate(int dtype, int64_t rows, int64_t inner, int64_t columns, int64_t repeats,
                              int64_t num_threads) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  if (rows < 1 || inner < 1 || columns < 1 || repeats < 1 || num_threads < 1) return SNE_FAST_BAD_ARGUMENT;
  return kernels().product_rate(dtype, rows, inner, columns, repeats, int(num_threads));
}

}  // extern "C"
