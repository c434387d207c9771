// Hopper's matrix instruction wgmma (sm_90a): 64 rows of a warpgroup of 4 warps, with the left operand in registers and
// the right operand in shared memory as core matrices (tiles/fragments.h). For its 16 of the 64 rows a warp has the
// same registers as with mma.sync, so the two instructions are interchangeable.
#pragma once

#include "cuda/ptx/mma.h"

#if defined(SNE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SNE_HAS_WGMMA 1
#endif

#if defined(SNE_HAS_WGMMA)
namespace sne {

#if defined(SNE_EMULATED)

struct MatrixDescriptor {
  const unsigned char *at;
  int along_k, along_n;
};
SNE_DEVICE MatrixDescriptor describe(const unsigned char *at, int along_k, int along_n) {
  return {at, along_k, along_n};
}
// The same matrix `bytes`, a multiple of 16, further on.
SNE_DEVICE MatrixDescriptor advance(const MatrixDescriptor &matrix, int bytes) {
  return {matrix.at + bytes, matrix.along_k, matrix.along_n};
}
SNE_DEVICE void wgmma_begin() {}
SNE_DEVICE void wgmma_end() {}
SNE_DEVICE void settle(float &) {}

namespace detail {
struct WarpgroupItem {
  Tile *c;
  const uint32_t *a;
  MatrixDescriptor b;
};
template <class T, int N>
void multiply_warpgroup(void **all) {
  float b[8 * N][16];
  const MatrixDescriptor at = ((WarpgroupItem *)all[0])->b;
  for (int n = 0; n < 8 * N; ++n)
    for (int k = 0; k < 16; ++k) {
      T value;
      memcpy(&value, at.at + n / 8 * at.along_n + k / 8 * at.along_k + n % 8 * 16 + k % 8 * 2, 2);
      b[n][k] = to_real(value);
    }
  for (int warp = 0; warp < 4; ++warp) {
    float a[16][16];
    for (int l = 0; l < kWarp; ++l)
      for (int part = 0; part < 4; ++part)
        for (int i = 0; i < 2; ++i)
          a[l / 4 + 8 * (part % 2)][8 * (part / 2) + l % 4 * 2 + i] =
              operand<T>(((WarpgroupItem *)all[32 * warp + l])->a[part], i);
    for (int l = 0; l < kWarp; ++l)
      for (int n = 0; n < N; ++n)
        for (int e = 0; e < 4; ++e)
          for (int k = 0; k < 16; ++k)
            ((WarpgroupItem *)all[32 * warp + l])->c[n].c[e] +=
                a[l / 4 + e / 2 * 8][k] * b[8 * n + l % 4 * 2 + e % 2][k];
  }
}
}  // namespace detail

template <class Op, int N>
SNE_DEVICE void wgmma(Tile (&c)[N], const uint32_t *a, MatrixDescriptor b) {
  detail::WarpgroupItem item{c, a, b};
  emulator::meet_warpgroup("wgmma", &item, detail::multiply_warpgroup<typename Op::Storage, N>);
}

#else

using MatrixDescriptor = uint64_t;
// No swizzle: leading offset between the two core matrices of 16 columns, stride offset between groups of 8 rows.
SNE_DEVICE MatrixDescriptor describe(const unsigned char *at, int along_k, int along_n) {
  return uint64_t((shared_address(at) & 0x3ffff) >> 4) | uint64_t(along_k >> 4) << 16 | uint64_t(along_n >> 4) << 32;
}
SNE_DEVICE MatrixDescriptor advance(MatrixDescriptor matrix, int bytes) { return matrix + (bytes >> 4); }
// Keeps the compiler from moving writes of a register across this point.
SNE_DEVICE void settle(float &v) { asm volatile("" : "+f"(v)::"memory"); }
SNE_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SNE_DEVICE void wgmma_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

template <class Op, int N>
SNE_DEVICE void wgmma(Tile (&c)[N], const uint32_t *a, MatrixDescriptor b);

#define SNE_F1(n) "+f"(c[n].c[0]), "+f"(c[n].c[1]), "+f"(c[n].c[2]), "+f"(c[n].c[3])
#define SNE_F2(n) SNE_F1(n), SNE_F1(n + 1)
#define SNE_F4(n) SNE_F2(n), SNE_F2(n + 2)
#define SNE_F8(n) SNE_F4(n), SNE_F4(n + 4)
// tiles: number of tiles of 8 columns; sums, left, right: numbers of the operands in the assembly; then the outputs.
#define SNE_WGMMA(Op, type, tiles, columns, sums, left, right, ...)                                                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void wgmma<Op, tiles>(Tile(&c)[tiles], const uint32_t *a, MatrixDescriptor b) {         \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type \
                 "." type " {" sums "}, {" left "}, " right ", p, 1, 1, 0;\n}"                                       \
                 : __VA_ARGS__                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
  }
#define SNE_WGMMA_BOTH(...)                \
  SNE_WGMMA(OpBfloat, "bf16", __VA_ARGS__) \
  SNE_WGMMA(OpHalf, "f16", __VA_ARGS__)
// clang-format off
SNE_WGMMA_BOTH(1, "8",
               "%0, %1, %2, %3",
               "%4, %5, %6, %7", "%8", SNE_F1(0))
SNE_WGMMA_BOTH(3, "24",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11",
               "%12, %13, %14, %15", "%16", SNE_F2(0), SNE_F1(2))
SNE_WGMMA_BOTH(6, "48",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23",
               "%24, %25, %26, %27", "%28", SNE_F4(0), SNE_F2(4))
SNE_WGMMA_BOTH(8, "64",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
               "%24, %25, %26, %27, %28, %29, %30, %31",
               "%32, %33, %34, %35", "%36", SNE_F8(0))
SNE_WGMMA_BOTH(12, "96",
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
               "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47",
               "%48, %49, %50, %51", "%52", SNE_F8(0), SNE_F4(8))
// clang-format on
#undef SNE_F1
#undef SNE_F2
#undef SNE_F4
#undef SNE_F8
#undef SNE_WGMMA
#undef SNE_WGMMA_BOTH

#endif

}  // namespace sne
#endif
