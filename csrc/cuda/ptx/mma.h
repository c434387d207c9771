// Operand types, and the matrix instructions mma.sync, ldmatrix and movmatrix, on a GPU and in the emulator.
#pragma once

#include <type_traits>

#include "cuda/ptx/simt.h"

namespace sne {

struct Tile {
  float c[4];
};

struct OpBfloat {
  using Storage = BFloat;
  static constexpr bool kPacked = true;
};
struct OpHalf {
  using Storage = Half;
  static constexpr bool kPacked = true;
};
struct OpTf32 {
  using Storage = float;
  static constexpr bool kPacked = false;
};
struct OpFloat {  // float32 products as three TF32 products, which also multiply the bits that TF32 drops
  using Storage = float;
  static constexpr bool kPacked = false;
};

#if defined(SNE_EMULATED)

namespace detail {
struct MatrixItem {
  float *c;
  const void *a, *b;
};
template <class T>
float operand(uint32_t pair, int half) {
  const uint16_t bits = uint16_t(half ? pair >> 16 : pair);
  T value;
  memcpy(&value, &bits, 2);
  return to_real(value);
}
// steps: groups of 8 of the contraction.
template <class T, int steps>
void multiply_packed(void **all) {
  float a[16][8 * steps], b[8 * steps][8];
  for (int l = 0; l < kWarp; ++l) {
    const MatrixItem &item = *(MatrixItem *)all[l];
    const uint32_t *ra = (const uint32_t *)item.a, *rb = (const uint32_t *)item.b;
    const int g = l / 4, t = l % 4;
    for (int s = 0; s < steps; ++s)
      for (int i = 0; i < 2; ++i) {
        a[g][8 * s + 2 * t + i] = operand<T>(ra[2 * s], i);
        a[g + 8][8 * s + 2 * t + i] = operand<T>(ra[2 * s + 1], i);
        b[8 * s + 2 * t + i][g] = operand<T>(rb[s], i);
      }
  }
  for (int l = 0; l < kWarp; ++l) {
    float *c = ((MatrixItem *)all[l])->c;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8 * steps; ++k) c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
  }
}
SNE_DEVICE float truncated(float v) { return float_of_bits(bits_of_float(v) & 0xffffe000); }
inline void multiply_tf32(void **all) {
  float a[16][8], b[8][8];
  for (int l = 0; l < kWarp; ++l) {
    const MatrixItem &item = *(MatrixItem *)all[l];
    const float *ra = (const float *)item.a, *rb = (const float *)item.b;
    const int g = l / 4, t = l % 4;
    a[g][t] = truncated(ra[0]), a[g + 8][t] = truncated(ra[1]);
    a[g][t + 4] = truncated(ra[2]), a[g + 8][t + 4] = truncated(ra[3]);
    b[t][g] = truncated(rb[0]), b[t + 4][g] = truncated(rb[1]);
  }
  for (int l = 0; l < kWarp; ++l) {
    float *c = ((MatrixItem *)all[l])->c;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k) c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
  }
}
struct LoadItem {
  const unsigned char *row;
  uint32_t *r;
};
template <int count, bool transpose>
void load_matrices(void **all) {
  for (int l = 0; l < kWarp; ++l) {
    LoadItem &item = *(LoadItem *)all[l];
    for (int m = 0; m < count; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = transpose ? l % 4 * 2 + i : l / 4, column = transpose ? l / 4 : l % 4 * 2 + i;
        memcpy(&pair[i], ((LoadItem *)all[8 * m + row])->row + 2 * column, 2);
      }
      item.r[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
    }
  }
}
}  // namespace detail

template <class Op>
SNE_DEVICE void mma_k16(Tile &c, const uint32_t *a, const uint32_t *b) {
  detail::MatrixItem item{c.c, a, b};
  emulator::meet_warp("mma_k16", &item, detail::multiply_packed<typename Op::Storage, 2>);
}
template <class Op>
SNE_DEVICE void mma_k8(Tile &c, const uint32_t *a, const uint32_t *b) {
  detail::MatrixItem item{c.c, a, b};
  emulator::meet_warp("mma_k8", &item, detail::multiply_packed<typename Op::Storage, 1>);
}
SNE_DEVICE void mma_tf32(Tile &c, const float *a, const float *b) {
  detail::MatrixItem item{c.c, a, b};
  emulator::meet_warp("mma_tf32", &item, detail::multiply_tf32);
}
// Loads 8 x 8 matrices of 16-bit numbers in rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8.
template <int count>
SNE_DEVICE void load_matrices(uint32_t *r, const void *row) {
  detail::LoadItem item{(const unsigned char *)row, r};
  emulator::meet_warp("ldmatrix", &item, detail::load_matrices<count, false>);
}
template <int count>
SNE_DEVICE void load_matrices_transposed(uint32_t *r, const void *row) {
  detail::LoadItem item{(const unsigned char *)row, r};
  emulator::meet_warp("ldmatrix.trans", &item, detail::load_matrices<count, true>);
}
SNE_DEVICE uint32_t transpose8(uint32_t pair) {
  struct Item {
    uint32_t in, out;
  } item{pair, 0};
  emulator::meet_warp("movmatrix", &item, [](void **all) {
    for (int l = 0; l < kWarp; ++l) {
      uint32_t out = 0;
      for (int i = 0; i < 2; ++i) {
        const uint32_t from = ((Item *)all[(l % 4 * 2 + i) * 4 + l / 4 / 2])->in;
        out |= (l / 4 % 2 ? from >> 16 : from & 0xffff) << 16 * i;
      }
      ((Item *)all[l])->out = out;
    }
  });
  return item.out;
}
// Stores four 8 x 8 matrices as pieces of 128 bytes that load_matrices reads.
SNE_DEVICE void store_matrices(void *to, const uint32_t *r) {
  for (int m = 0; m < 4; ++m) memcpy((unsigned char *)to + 128 * m + 4 * lane_id(), r + m, 4);
}
SNE_DEVICE float round_to_tf32(float v) {
  const uint32_t bits = bits_of_float(v);
  return (bits & 0x7f800000) == 0x7f800000 ? v : float_of_bits((bits + 0x1000) & 0xffffe000);
}
template <class T>
SNE_DEVICE uint32_t pack2(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
SNE_DEVICE uint32_t pack2_relu(float low, float high) {
  return pack2<T>(low <= 0 ? 0.0f : low, high <= 0 ? 0.0f : high);
}
// a b + c of two numbers at a time, rounded once.
template <class T>
SNE_DEVICE uint32_t multiply_add2(uint32_t a, uint32_t b, uint32_t c) {
  float sum[2];
  for (int i = 0; i < 2; ++i)
    sum[i] = float(double(detail::operand<T>(a, i)) * detail::operand<T>(b, i) + detail::operand<T>(c, i));
  return pack2<T>(sum[0], sum[1]);
}

#else

template <class Op>
SNE_DEVICE void mma_k16(Tile &c, const uint32_t *a, const uint32_t *b);
template <class Op>
SNE_DEVICE void mma_k8(Tile &c, const uint32_t *a, const uint32_t *b);

// Sums that are zero before need no register as input: inputs and outputs are operands of their own.
#define SNE_MMA_PACKED(Op, type)                                                                               \
  template <>                                                                                                  \
  __device__ __forceinline__ void mma_k16<Op>(Tile & c, const uint32_t *a, const uint32_t *b) {                \
    Tile d;                                                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                        \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                              \
                 : "=f"(d.c[0]), "=f"(d.c[1]), "=f"(d.c[2]), "=f"(d.c[3])                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c.c[0]), "f"(c.c[1]), \
                   "f"(c.c[2]), "f"(c.c[3]));                                                                  \
    c = d;                                                                                                     \
  }                                                                                                            \
  template <>                                                                                                  \
  __device__ __forceinline__ void mma_k8<Op>(Tile & c, const uint32_t *a, const uint32_t *b) {                 \
    Tile d;                                                                                                    \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                                         \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                                          \
                 : "=f"(d.c[0]), "=f"(d.c[1]), "=f"(d.c[2]), "=f"(d.c[3])                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c.c[0]), "f"(c.c[1]), "f"(c.c[2]), "f"(c.c[3]));       \
    c = d;                                                                                                     \
  }
SNE_MMA_PACKED(OpBfloat, "bf16")
SNE_MMA_PACKED(OpHalf, "f16")
#undef SNE_MMA_PACKED

SNE_DEVICE void mma_tf32(Tile &c, const float *a, const float *b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.c[0]), "+f"(c.c[1]), "+f"(c.c[2]), "+f"(c.c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
template <int count>
SNE_DEVICE void load_matrices(uint32_t *r, const void *row) {
  const uint32_t at = shared_address(row);
  if constexpr (count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
}
template <int count>
SNE_DEVICE void load_matrices_transposed(uint32_t *r, const void *row) {
  const uint32_t at = shared_address(row);
  if constexpr (count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
}
// Stores four 8 x 8 matrices as pieces of 128 bytes that load_matrices reads.
SNE_DEVICE void store_matrices(void *to, const uint32_t *r) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(to) + 16 * lane_id()),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#else
  SNE_UNROLL
  for (int m = 0; m < 4; ++m) ((uint32_t *)to)[32 * m + lane_id()] = r[m];
#endif
}
SNE_DEVICE uint32_t transpose8(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}
SNE_DEVICE float round_to_tf32(float v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return __uint_as_float(out);
}
template <class T>
SNE_DEVICE uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<BFloat>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ uint32_t pack2<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <class T>
SNE_DEVICE uint32_t pack2_relu(float low, float high);
template <class T>
SNE_DEVICE uint32_t multiply_add2(uint32_t a, uint32_t b, uint32_t c);
#define SNE_PAIRS(T, type)                                                                   \
  template <>                                                                                \
  __device__ __forceinline__ uint32_t pack2_relu<T>(float low, float high) {                 \
    uint32_t out;                                                                            \
    asm("cvt.rn.relu." type ".f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));           \
    return out;                                                                              \
  }                                                                                          \
  template <>                                                                                \
  __device__ __forceinline__ uint32_t multiply_add2<T>(uint32_t a, uint32_t b, uint32_t c) { \
    uint32_t out;                                                                            \
    asm("fma.rn." type " %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));             \
    return out;                                                                              \
  }
SNE_PAIRS(BFloat, "bf16x2")
SNE_PAIRS(Half, "f16x2")
#undef SNE_PAIRS

#endif

// Ones in each half of a pair of numbers of 16 bits that is not 0; none may be negative.
SNE_DEVICE uint32_t where_not_zero(uint32_t pair) {
  const uint32_t signs = pair + 0x7fff7fff;
#if defined(SNE_EMULATED)
  return (signs >> 31 ? 0xffff0000 : 0) | (signs >> 15 & 1 ? 0xffff : 0);
#else
  uint32_t out;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(out) : "r"(signs));  // the signs of both halves in all of their bits
  return out;
#endif
}

template <class T>
SNE_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
  return multiply_add2<T>(a, pack2<T>(1.0f, 1.0f), b);
}

}  // namespace sne
