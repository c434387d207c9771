// The exported functions: choice of instruction set, checks of sizes, and nothing that depends on either.
#include <string.h>

#include <atomic>
#include <exception>
#include <initializer_list>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/gather_chunks.h"
#include "cpu/kernels.h"
#include "sne_fast/cpu_abi.h"

namespace {

using sne::Kernels;
using sne::TilePlan;

// Whether the compiler could compile the kernels for bfloat16 products.
#if !defined(SNE_BF16_KERNELS)
#define SNE_BF16_KERNELS 0
#endif

#if defined(__x86_64__)
#define SNE_X86 1
#else
#define SNE_X86 0
#endif

#if SNE_X86 && SNE_BF16_KERNELS

// Returns whether the processor has tiles of bfloat16, and asks the system to let this process use them.
bool has_amx() {
#if defined(SNE_EMULATED_AMX)
  return true;
#elif defined(__linux__)
  static const bool usable = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7, register edx
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTiles)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, and of the extended state
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return usable;
#else
  return false;
#endif
}

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
#if SNE_BF16_KERNELS
  if (strcmp(name, "avx512_bf16") == 0 && find("avx512") && __builtin_cpu_supports("avx512bf16"))
    return &sne::avx512_bf16::kernels;
  if (strcmp(name, "amx_bf16") == 0 && find("avx512_bf16") && has_amx()) return &sne::amx_bf16::kernels;
#endif
#endif
  return nullptr;
}

// Tiles of AMX are taken by name only, as no processor with them has run the tests.
const Kernels *best() {
  for (const char *name : {"avx512_bf16", "avx512", "avx2"})
    if (const Kernels *k = find(name)) return k;
  return find("portable");
}

std::atomic<const Kernels *> selected{nullptr};

const Kernels &kernels() {
  const Kernels *k = selected.load(std::memory_order_acquire);
  if (!k) selected.store(k = best(), std::memory_order_release);
  return *k;
}

// Returns the kernels for a dtype, null where there are none.
const Kernels *kernels_of(int dtype) {
  const Kernels &k = kernels();
  if (dtype == SNE_FAST_BF16) return k.real ? &k : nullptr;
  if (dtype != SNE_FAST_F32 && dtype != SNE_FAST_F64) return nullptr;
  return k.real ? k.real : &k;
}

bool real(int dtype) { return dtype == SNE_FAST_F32 || dtype == SNE_FAST_F64; }

bool width(int64_t h, int64_t H) {
  return (h == 32 || h == 64 || h == 128 || h == 256) && H >= 1 && h % H == 0 && h / H >= 8 && h / H <= 64 &&
         (H & (H - 1)) == 0;
}

// Threads that a call may ask for: beyond this the system might not be able to start them.
constexpr int64_t kMaxThreads = 1024;

// Runs body(args) with a number of threads that the system can start, while the interpreter's lock is free.
template <class Args, class Body>
int call(const Args &args, Body body) {
  Args a = args;
  a.num_threads = a.num_threads < 1 ? 1 : a.num_threads > kMaxThreads ? kMaxThreads : a.num_threads;
  sne::Interrupt interrupt;
  try {
    return body(a, interrupt);
  } catch (const std::exception &) {
    return SNE_FAST_NO_MEMORY;
  }
}

// Makes the tile plan, then runs body(kernels, args, plan, interrupt).
template <class Body>
int with_plan(int dtype, const sne_fast_chunk_encode_args *args, Body body) {
  const Kernels *found = kernels_of(dtype);
  if (!found) return SNE_FAST_BAD_DTYPE;
  if (!width(args->hidden, args->heads) || args->element_rows < 0) return SNE_FAST_BAD_ARGUMENT;
  return call(*args, [&](const sne_fast_chunk_encode_args &a, sne::Interrupt &interrupt) {
    const Kernels &k = *found;
    const int which = dtype == SNE_FAST_F64;
    TilePlan plan;
    int status = sne::make_tile_plan(a, k.lanes[which], k.panel[which], &plan);
    if (status == SNE_FAST_OK) status = body(k, a, plan, interrupt);
    sne::free_tile_plan(&plan);
    return status;
  });
}

int check(int dtype, const sne_fast_set_attention_args *a) {
  if (!kernels_of(dtype)) return SNE_FAST_BAD_DTYPE;
  if (!width(a->hidden, a->heads)) return SNE_FAST_BAD_ARGUMENT;
  if (!sne::pointers_fit(a->num_sets, a->q_ptr, a->rows_q) || !sne::pointers_fit(a->num_sets, a->k_ptr, a->rows_k))
    return SNE_FAST_BAD_ARGUMENT;
  return SNE_FAST_OK;
}

int check(int dtype, const sne_fast_segment_pool_args *a) {
  if (!kernels_of(dtype)) return SNE_FAST_BAD_DTYPE;
  const int64_t unit = dtype == SNE_FAST_BF16 ? 32 : 16;
  if (a->hidden < unit || a->hidden % unit || a->heads < 1) return SNE_FAST_BAD_ARGUMENT;
  return sne::pointers_fit(a->num_segments, a->ptr, a->rows) ? SNE_FAST_OK : SNE_FAST_BAD_ARGUMENT;
}

int check(int dtype, const sne_fast_set_block_args *a) {
  if (!kernels_of(dtype)) return SNE_FAST_BAD_DTYPE;
  auto row_fits = [](int64_t dim) { return dim >= 16 && dim % 16 == 0 && dim <= SNE_FAST_WIDEST_ROW; };
  if (!width(a->hidden, a->heads) || !row_fits(a->dim_q) || !row_fits(a->dim_k)) return SNE_FAST_BAD_ARGUMENT;
  if (!sne::pointers_fit(a->num_sets, a->q_ptr, a->rows_q) || !sne::pointers_fit(a->num_sets, a->k_ptr, a->rows_k))
    return SNE_FAST_BAD_ARGUMENT;
  return SNE_FAST_OK;
}

// Returns the dtype that set_block computes in: products of bfloat16 need rows of whole vectors of pairs, and for few
// rows rounding and packing take longer than they save.
int products_of(int dtype, const sne_fast_set_block_args &a) {
  constexpr int64_t kFewestRows = 256;
  const bool pays = a.dim_q % 32 == 0 && a.dim_k % 32 == 0 && a.rows_q + a.rows_k >= kFewestRows;
  return dtype == SNE_FAST_BF16 && !pays ? int(SNE_FAST_F32) : dtype;
}

// Whether a row of dims is that of a tensor of `size` values.
bool dims_fit(const int64_t *d, int64_t size) {
  if (size < 1 || d[0] < 1 || d[1] < 0 || d[2] < 1 || d[3] < 1 || d[4] < 1 || d[5] < 0 || d[5] > 1) return false;
  const int64_t in = d[1] < 1 ? 1 : d[1];
  if (d[1] < 1 && d[2] != 1) return false;
  return size % d[0] == 0 && size / d[0] % in == 0 && size / d[0] / in == d[2];
}

int check(int dtype, const sne_fast_tensor_statistics_args *a) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  if (!sne::pointers_fit(a->num_tensors, a->start, a->num_values)) return SNE_FAST_BAD_ARGUMENT;
  for (int64_t t = 0; t < a->num_tensors; ++t)
    if (!dims_fit(a->dims + 6 * t, a->start[t + 1] - a->start[t])) return SNE_FAST_BAD_ARGUMENT;
  return SNE_FAST_OK;
}

int check(int dtype, const sne_fast_gather_chunks_args *a) {
  if (!real(dtype)) return SNE_FAST_BAD_DTYPE;
  return a->num_matrices < 0 || a->num_values < 0 ? SNE_FAST_BAD_ARGUMENT : SNE_FAST_OK;
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
    case SNE_FAST_INTERRUPTED: return "interrupted";
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
  return with_plan(dtype, args, [&](const Kernels &k, const auto &a, const TilePlan &plan, sne::Interrupt &i) {
    return k.chunk_encode(dtype, a, plan, out, i);
  });
}

int sne_fast_cpu_chunk_encode_backward(int dtype, const sne_fast_chunk_encode_args *args,
                                       const sne_fast_chunk_encode_grads *grads) {
  return with_plan(dtype, args, [&](const Kernels &k, const auto &a, const TilePlan &plan, sne::Interrupt &i) {
    return k.chunk_encode_backward(dtype, a, plan, *grads, i);
  });
}

int sne_fast_cpu_set_attention(int dtype, const sne_fast_set_attention_args *args) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args, [&](const auto &a, sne::Interrupt &i) { return kernels_of(dtype)->set_attention(dtype, a, i); });
}

int sne_fast_cpu_set_attention_backward(int dtype, const sne_fast_set_attention_args *args,
                                        const sne_fast_set_attention_grads *grads) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args, [&](const auto &a, sne::Interrupt &i) {
    return kernels_of(dtype)->set_attention_backward(dtype, a, *grads, i);
  });
}

int sne_fast_cpu_segment_pool(int dtype, const sne_fast_segment_pool_args *args) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args, [&](const auto &a, sne::Interrupt &i) { return kernels_of(dtype)->segment_pool(dtype, a, i); });
}

int sne_fast_cpu_segment_pool_backward(int dtype, const sne_fast_segment_pool_args *args,
                                       const sne_fast_segment_pool_grads *grads) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args, [&](const auto &a, sne::Interrupt &i) {
    return kernels_of(dtype)->segment_pool_backward(dtype, a, *grads, i);
  });
}

int sne_fast_cpu_set_block(int dtype, const sne_fast_set_block_args *args) {
  const int status = check(dtype, args);
  if (status) return status;
  dtype = products_of(dtype, *args);
  return call(*args, [&](const auto &a, sne::Interrupt &i) { return kernels_of(dtype)->set_block(dtype, a, i); });
}

int sne_fast_cpu_set_block_backward(int dtype, const sne_fast_set_block_args *args,
                                    const sne_fast_set_block_grads *grads) {
  const int status = check(dtype, args);
  if (status) return status;
  dtype = products_of(dtype, *args);
  return call(*args, [&](const auto &a, sne::Interrupt &i) {
    return kernels_of(dtype)->set_block_backward(dtype, a, *grads, i);
  });
}

int sne_fast_cpu_gather_chunks(int dtype, const sne_fast_gather_chunks_args *args) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args, [&](const auto &a, sne::Interrupt &i) { return sne::gather_chunks(dtype, a, i); });
}

int sne_fast_cpu_gather_chunks_backward(int dtype, const sne_fast_gather_chunks_args *args) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args, [&](const auto &a, sne::Interrupt &i) { return sne::gather_chunks_backward(dtype, a, i); });
}

int sne_fast_cpu_tensor_statistics(int dtype, const sne_fast_tensor_statistics_args *args) {
  const int status = check(dtype, args);
  if (status) return status;
  return call(*args,
              [&](const auto &a, sne::Interrupt &i) { return kernels_of(dtype)->tensor_statistics(dtype, a, i); });
}

int sne_fast_cpu_product_rate(int dtype, int64_t rows, int64_t inner, int64_t columns, int64_t repeats,
                              int64_t num_threads) {
  const Kernels *k = kernels_of(dtype);
  if (!k) return SNE_FAST_BAD_DTYPE;
  if (rows < 1 || inner < 1 || columns < 1 || repeats < 1 || num_threads < 1) return SNE_FAST_BAD_ARGUMENT;
  sne::Interrupt interrupt;  // gives the interpreter's lock back
  return k->product_rate(dtype, rows, inner, columns, repeats, int(num_threads));
}

}  // extern "C"
