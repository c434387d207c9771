// The half types as two bytes, and their conversions: native instructions on a GPU, integer arithmetic on a host.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#if defined(__CUDACC__)
#define SNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SNE_HOST_DEVICE inline
#endif

namespace sne {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

SNE_HOST_DEVICE float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
#endif
}
SNE_HOST_DEVICE uint32_t bits_of_float(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
#endif
}

SNE_HOST_DEVICE double to_real(double v) { return v; }
SNE_HOST_DEVICE float to_real(float v) { return v; }
SNE_HOST_DEVICE float to_real(BFloat v) { return float_of_bits(uint32_t(v.bits) << 16); }
SNE_HOST_DEVICE float to_real(Half v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = (v.bits >> 10) & 31, mantissa = v.bits & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
  return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// Rounds to nearest, ties to even.
template <class T>
SNE_HOST_DEVICE T from_float(float v);
template <>
SNE_HOST_DEVICE double from_float<double>(float v) {
  return v;
}
template <>
SNE_HOST_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
SNE_HOST_DEVICE BFloat from_float<BFloat>(float v) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  uint32_t bits = bits_of_float(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}
template <>
SNE_HOST_DEVICE Half from_float<Half>(float v) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t bits = bits_of_float(v), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal: a multiple of 2^-24, which adding 0.5 rounds to
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_of_float(shifted) - bits_of_float(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
#endif
}

}  // namespace sne
