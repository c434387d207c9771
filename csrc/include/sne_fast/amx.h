// Tiles of AMX: eight registers of 16 rows of 64 bytes. With SNE_EMULATED_AMX they are memory, for tests on processors
// without them. The number of a tile must be a literal.
#pragma once

#include <stdint.h>
#include <string.h>

#include "sne_fast/isa.h"

#if defined(SNE_AMX)
#if defined(SNE_EMULATED_AMX)

namespace sne::SNE_ISA {

struct EmulatedTile {
  uint32_t row[16][16];
};
inline thread_local EmulatedTile emulated_tiles[8];

inline void emulated_load(int tile, const void *from, long stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tiles[tile].row[r], (const char *)from + r * stride, 64);
}
inline void emulated_store(int tile, void *to, long stride) {
  for (int r = 0; r < 16; ++r) memcpy((char *)to + r * stride, emulated_tiles[tile].row[r], 64);
}
inline float emulated_half(uint32_t bits) {
  float f;
  bits <<= 16;
  memcpy(&f, &bits, sizeof f);
  return f;
}
inline void emulated_dot(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, &emulated_tiles[c].row[m][n], sizeof sum);
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = emulated_tiles[a].row[m][k], y = emulated_tiles[b].row[k][n];
        sum += emulated_half(x & 0xffff) * emulated_half(y & 0xffff);
        sum += emulated_half(x >> 16) * emulated_half(y >> 16);
      }
      memcpy(&emulated_tiles[c].row[m][n], &sum, sizeof sum);
    }
}

}  // namespace sne::SNE_ISA

#define SNE_TILE_LOAD(tile, from, stride) emulated_load(tile, from, stride)
#define SNE_TILE_STORE(tile, to, stride) emulated_store(tile, to, stride)
#define SNE_TILE_ZERO(tile) memset(&emulated_tiles[tile], 0, sizeof emulated_tiles[tile])
#define SNE_TILE_DOT(c, a, b) emulated_dot(c, a, b)

#else
#include <immintrin.h>

#define SNE_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define SNE_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define SNE_TILE_ZERO(tile) _tile_zero(tile)
#define SNE_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif
#endif

namespace sne::SNE_ISA {

// Holds the tiles of a thread as long as it computes.
class TileRegisters {
 public:
#if defined(SNE_AMX) && !defined(SNE_EMULATED_AMX)
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
#else
  TileRegisters() {}
  ~TileRegisters() {}
#endif
  TileRegisters(const TileRegisters &) = delete;
  TileRegisters &operator=(const TileRegisters &) = delete;
};

}  // namespace sne::SNE_ISA
