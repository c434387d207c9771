// Building blocks of kernels: threads, barriers, shuffles, shared memory, asynchronous copies and launches.
//
// nvcc compiles them to the instructions of that name. With SNE_EMULATED a host compiler turns the same kernels into
// ordinary code: every CUDA thread is a fiber that runs until it meets the others of its warp or thread block
// (emulator/emulator.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "sne_fast/half.h"

#if defined(SNE_EMULATED)
#include "cuda/emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace sne {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#if defined(SNE_EMULATED)

#define SNE_KERNEL static void
#define SNE_DEVICE static inline
#define SNE_MEMBER inline
#define SNE_BOUNDS(threads, blocks)
#define SNE_UNROLL
#define SNE_LOOP
#define SNE_UNROLL_BY(n)

using Stream = void *;
SNE_DEVICE int thread_id() { return emulator::thread(); }
SNE_DEVICE int num_threads() { return emulator::threads(); }
SNE_DEVICE int64_t block_id(int axis = 0) { return emulator::block(axis); }
SNE_DEVICE int64_t num_blocks(int axis = 0) { return emulator::blocks(axis); }
SNE_DEVICE void *shared_memory() { return emulator::shared(); }

SNE_DEVICE void sync_block() { emulator::meet_block("sync_block"); }
SNE_DEVICE void sync_warp() {
  emulator::meet_warp("sync_warp", nullptr, [](void **) {});
}
// Waits for `threads` threads (a multiple of 32) at barrier 1..15 of the thread block.
SNE_DEVICE void sync_named(int barrier, int threads) { emulator::meet_named(barrier, threads); }

template <class T>
SNE_DEVICE T shuffle(T value, int lane) {
  struct Item {
    T in, out;
    int lane;
  } item{value, value, lane & 31};
  emulator::meet_warp("shuffle", &item, [](void **all) {
    for (int i = 0; i < kWarp; ++i) ((Item *)all[i])->out = ((Item *)all[((Item *)all[i])->lane])->in;
  });
  return item.out;
}
template <class T>
SNE_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, (thread_id() & 31) ^ mask);
}
SNE_DEVICE uint32_t ballot(bool value) {
  struct Item {
    bool in;
    uint32_t out;
  } item{value, 0};
  emulator::meet_warp("ballot", &item, [](void **all) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= uint32_t(((Item *)all[i])->in) << i;
    for (int i = 0; i < kWarp; ++i) ((Item *)all[i])->out = bits;
  });
  return item.out;
}

SNE_DEVICE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

SNE_DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }
SNE_DEVICE float log2_fast(float x) { return __builtin_log2f(x); }
SNE_DEVICE float rsqrt_fast(float x) { return 1.0f / __builtin_sqrtf(x); }
SNE_DEVICE float divide_exactly(float a, float b) { return a / b; }
SNE_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }  // rounded once
SNE_DEVICE float max_of(float a, float b) { return __builtin_fmaxf(a, b); }
SNE_DEVICE float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
SNE_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
SNE_DEVICE float min_of(float a, float b) { return __builtin_fminf(a, b); }

// Copies 16 bytes from global to shared memory, both aligned. They have arrived after copies_done() and a barrier.
SNE_DEVICE void copy_async(void *shared, const void *global) { emulator::copy_async(shared, global); }
SNE_DEVICE void copies_done() { emulator::copies_done(); }

template <class... P, class... A>
int launch(Stream, int64_t x, int64_t y, int threads, size_t shared, void (*kernel)(P...), A... args) {
  if (!x || !y) return 0;
  return emulator::run(x, y, threads, shared, [&] { kernel(P(args)...); });
}

#else

#define SNE_KERNEL static __global__ void
#define SNE_DEVICE static __device__ __forceinline__
#define SNE_MEMBER __device__ __forceinline__
#define SNE_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define SNE_UNROLL _Pragma("unroll")
#define SNE_LOOP _Pragma("unroll 1")  // never unrolled
#define SNE_PRAGMA(text) _Pragma(#text)
#define SNE_UNROLL_BY(n) SNE_PRAGMA(unroll n)

using Stream = cudaStream_t;
SNE_DEVICE int thread_id() { return threadIdx.x; }
SNE_DEVICE int num_threads() { return blockDim.x; }
SNE_DEVICE int64_t block_id() { return blockIdx.x; }
SNE_DEVICE int64_t block_id(int axis) { return axis == 0 ? blockIdx.x : blockIdx.y; }
SNE_DEVICE int64_t num_blocks() { return gridDim.x; }
SNE_DEVICE int64_t num_blocks(int axis) { return axis == 0 ? gridDim.x : gridDim.y; }
SNE_DEVICE void *shared_memory() {
  extern __shared__ __align__(1024) unsigned char sne_shared[];
  return sne_shared;
}

SNE_DEVICE void sync_block() { __syncthreads(); }
SNE_DEVICE void sync_warp() { __syncwarp(); }
SNE_DEVICE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <class T>
SNE_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
SNE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
SNE_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
SNE_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

SNE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SNE_DEVICE float log2_fast(float x) { return __log2f(x); }
SNE_DEVICE float rsqrt_fast(float x) {  // x must not be subnormal
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SNE_DEVICE float divide_exactly(float a, float b) { return __fdiv_rn(a, b); }
SNE_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SNE_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
SNE_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
SNE_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SNE_DEVICE float min_of(float a, float b) { return fminf(a, b); }

SNE_DEVICE uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }
SNE_DEVICE void copy_async(void *shared, const void *global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
SNE_DEVICE void copies_done() {
  asm volatile("cp.async.wait_all;" ::: "memory");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::
                   : "memory");  // wgmma reads shared memory through the asynchronous proxy
#endif
}

template <class... P, class... A>
int launch(Stream stream, int64_t x, int64_t y, int threads, size_t shared, void (*kernel)(P...), A... args) {
  if (!x || !y) return 0;
  if (shared > 48 << 10) {
    // Allow all there is, as another host thread may launch the same kernel with more.
    int device = 0, max_shared = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const cudaError_t error =
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which the next launch would report otherwise
      return int(error);
    }
  }
  // clang-format off
  kernel<<<dim3(unsigned(x), unsigned(y)), threads, shared, stream>>>(P(args)...);
  // clang-format on
  return int(cudaGetLastError());
}

#endif

SNE_DEVICE int lane_id() { return thread_id() & 31; }
SNE_DEVICE int warp_id() { return thread_id() >> 5; }
SNE_DEVICE int num_warps() { return num_threads() >> 5; }

}  // namespace sne
