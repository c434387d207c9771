// Inner rows of set_attention: tiles in shared memory (tiles/inner_rows.h), which arrive while others are worked on.
#pragma once

#include "cuda/set_attention/work_items.h"
#include "cuda/tiles/flash_attention.h"

namespace sne::set_attention {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

template <class Op, int D>
struct Inner {
  using T = typename Op::Storage;
  static constexpr int kStride = D == 8 ? 8 : D + 8;                 // values from row to row
  static constexpr int kRows = kStride * sizeof(T) <= 96 ? 32 : 16;  // of a tile, per warp of the team
  static constexpr int kValues = kRows * kStride;
  // Two tiles of each of two matrices.
  static constexpr size_t kShared = kBlockWarps * 4 * kValues * sizeof(T);
};

// Thread blocks of the backward that a multiprocessor has registers for; the compiler alone would use more registers.
template <class Op, int D>
constexpr int kBackwardBlocks = std::is_same_v<Op, OpFloat> || D == 64 ? 2
                                : D == 32                              ? 3
                                : D == 16                              ? 4
                                                                       : 5;

// Starts copying `count` rows of a head, and writes zeros behind them up to a multiple of 16 rows.
template <class Op, int D>
SNE_DEVICE void copy_rows(typename Op::Storage *tile, const typename Op::Storage *from, int64_t width, int count,
                          const Team &team) {
  using In = Inner<Op, D>;
  constexpr int kPieces = D / kColumns<Op>,
                kEach = In::kRows * kPieces / kWarp;  // pieces of 16 bytes: of a row, a thread
  const int thread = team.thread(), filled = (count + 15) & ~15;
  SNE_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int piece = i * team.warps * kWarp + thread, row = piece / kPieces, column = piece % kPieces * kColumns<Op>;
    typename Op::Storage *to = tile + row * In::kStride + column;
    if (row < count)
      copy_async(to, from + row * width + column);
    else if (row < filled)
      *(Bytes16 *)to = Bytes16{};
  }
}

// Double-buffered tiles of the inner rows of two matrices in shared memory.
template <class Op, int D>
struct Tiles {
  using T = typename Op::Storage;
  using In = Inner<Op, D>;
  const Team &team;
  T *memory;
  const T *first, *second;  // the next rows to come
  int64_t width;
  int rows;  // of a tile

  SNE_MEMBER Tiles(const Call &call, const Team &team, const WorkItem &item, const void *first, const void *second)
      : team(team), memory((T *)shared_memory() + team.index * team.warps * (4 * In::kValues)),
        first((const T *)first + item.begin * call.width + item.head * D),
        second((const T *)second + item.begin * call.width + item.head * D), width(call.width),
        rows(team.warps * In::kRows) {}
  SNE_MEMBER int count(int64_t left) const { return left < rows ? int(left) : rows; }
  SNE_MEMBER T *tile(int stage, int matrix) const { return memory + (2 * stage + matrix) * rows * In::kStride; }
  // Starts copying the next tile; `left` rows are still to come.
  SNE_MEMBER void start(int stage, int64_t left) {
    copy_rows<Op, D>(tile(stage, 0), first, width, count(left), team);
    copy_rows<Op, D>(tile(stage, 1), second, width, count(left), team);
    first += rows * width;
    second += rows * width;
  }
};

}  // namespace sne::set_attention
