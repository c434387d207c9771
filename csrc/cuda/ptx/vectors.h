// Loads and stores of 16 bytes, as values of any type.
#pragma once

#include "cuda/ptx/simt.h"

namespace sne {

struct alignas(16) Words {
  uint32_t w[4];
};

template <class T>
constexpr int kVector = int(16 / sizeof(T));  // values of 16 bytes

// `at` must be aligned to 16 bytes.
SNE_DEVICE Words load_words(const void *at) {
#if defined(SNE_EMULATED)
  if (uintptr_t(at) % 16) __builtin_trap();
  Words out;
  memcpy(&out, at, 16);
  return out;
#else
  const uint4 v = *(const uint4 *)at;
  return {{v.x, v.y, v.z, v.w}};
#endif
}
SNE_DEVICE void store_words(void *at, const Words &words) {
#if defined(SNE_EMULATED)
  if (uintptr_t(at) % 16) __builtin_trap();
  memcpy(at, &words, 16);
#else
  *(uint4 *)at = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
#endif
}
// Loads 8 bytes; `at` must be aligned to 8 bytes. The other words are 0.
SNE_DEVICE Words load_half_words(const void *at) {
  Words out{};
#if defined(SNE_EMULATED)
  if (uintptr_t(at) % 8) __builtin_trap();
  memcpy(&out, at, 8);
#else
  const uint2 v = *(const uint2 *)at;
  out.w[0] = v.x, out.w[1] = v.y;
#endif
  return out;
}

// Returns value i of 16 bytes; i must be a compile-time constant.
template <class T>
SNE_DEVICE T value_of(const Words &words, int i) {
  if constexpr (sizeof(T) == 2) {
    return T{uint16_t(words.w[i / 2] >> 16 * (i % 2))};
  } else if constexpr (sizeof(T) == 4) {
    return float_of_bits(words.w[i]);
  } else {
#if defined(__CUDA_ARCH__)
    return __hiloint2double(int(words.w[2 * i + 1]), int(words.w[2 * i]));
#else
    double value;
    memcpy(&value, &words.w[2 * i], sizeof value);
    return value;
#endif
  }
}
template <class T>
SNE_DEVICE void set_value(Words &words, int i, T value) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = value.bits;
    words.w[i / 2] = i % 2 ? words.w[i / 2] | bits << 16 : bits;  // in order, from 0
  } else if constexpr (sizeof(T) == 4) {
    words.w[i] = bits_of_float(value);
  } else {
#if defined(__CUDA_ARCH__)
    words.w[2 * i] = uint32_t(__double2loint(value)), words.w[2 * i + 1] = uint32_t(__double2hiint(value));
#else
    memcpy(&words.w[2 * i], &value, sizeof value);
#endif
  }
}

template <class T>
SNE_DEVICE void unpack(float (&out)[kVector<T>], const Words &words) {
  SNE_UNROLL
  for (int i = 0; i < kVector<T>; ++i) out[i] = to_real(value_of<T>(words, i));
}
template <class T>
SNE_DEVICE Words pack(const float (&values)[kVector<T>]) {
  Words out;
  SNE_UNROLL
  for (int i = 0; i < kVector<T>; ++i) set_value<T>(out, i, from_float<T>(values[i]));
  return out;
}

SNE_DEVICE double divide_exactly(double a, double b) { return a / b; }

}  // namespace sne
