// A number of bfloat16 that converts from and to double, for arrays of them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "sne_fast/cpu_abi.h"

struct Bfloat16 {
  uint16_t bits = 0;
  Bfloat16() = default;
  Bfloat16(double value) {
    const float single = float(value);
    uint32_t word;
    memcpy(&word, &single, sizeof word);
    bits = (word & 0x7fffffff) > 0x7f800000 ? 0x7fff : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator double() const {
    const uint32_t word = uint32_t(bits) << 16;
    float single;
    memcpy(&single, &word, sizeof single);
    return double(single);
  }
};

// The type of sums of numbers of T, and the dtype of T.
template <class T>
struct SumOf {
  using type = T;
};
template <>
struct SumOf<Bfloat16> {
  using type = float;
};
template <class T>
constexpr int dtype_of() {
  return sizeof(T) == 8 ? SNE_FAST_F64 : sizeof(T) == 4 ? SNE_FAST_F32 : SNE_FAST_BF16;
}
