// Rows that are not finite, which must not be multiplied by the zeros of other sets.
#pragma once

#include "cuda/tiles/fragments.h"

namespace sne {

// Magnitudes below this are finite as operands.
template <class Op>
constexpr float kLimit = std::is_same_v<Op, OpHalf> ? 65519.0f : 3.38e38f;

// Returns a bit for each row of k or v (or of other operands that are multiplied by zeros) that is not finite.
template <class Op, int MT, int DT>
SNE_DEVICE uint32_t bad_rows(const Tile (&k)[MT][DT], const Tile (&v)[MT][DT]) {
  uint32_t rows = 0;
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      bool bad = false;
      SNE_UNROLL
      for (int n = 0; n < DT; ++n) {
        SNE_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e)
          bad |= !(__builtin_fabsf(k[i][n].c[e]) < kLimit<Op>) | !(__builtin_fabsf(v[i][n].c[e]) < kLimit<Op>);
      }
      const uint32_t lanes = ballot(bad);
      if (lanes)
        for (int g = 0; g < 8; ++g)
          if (lanes >> 4 * g & 15) rows |= 1u << (16 * i + 8 * r + g);
    }
  }
  return rows;
}
template <int MT, int DT>
SNE_DEVICE void clear_rows(Tile (&k)[MT][DT], uint32_t rows) {
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int e = 0; e < 4; ++e)
      if (rows >> (16 * i + 8 * (e / 2) + lane_id() / 4) & 1) {
        SNE_UNROLL
        for (int n = 0; n < DT; ++n) k[i][n].c[e] = 0;
      }
  }
}

}  // namespace sne
