// Work items of set_attention: the rows that a team of warps computes, and where its results go.
//
// A kernel's own rows are those its warps keep in registers, its inner rows those they loop over: queries and keys in
// the forward and for the gradient of q, keys and queries for the gradients of k and v. A work item is a head and a
// piece of a set. Without split_rows the piece is a tile of 16 * warps own rows, and the team loops over all inner rows
// of the set. With split_rows (few own rows, many inner rows) the piece is a split of so many inner rows, with all own
// rows of their set. A set of several splits gets partial results, which a second kernel adds up in the order of the
// splits.
//
// Where partial results stand depends on rows alone, not on the number of sets. Cut the packed array of inner rows at
// every multiple of split_rows. Of the splits that start between two cuts, at most one is the first of a set with
// several splits, and at most one is a later split of such a set. So cut p has partial results 2 p (later) and 2 p + 1
// (first).
#pragma once

#include <math.h>

#include "cuda/dispatch.h"
#include "cuda/tiles/row_pieces.h"

namespace sne::set_attention {

constexpr int kThreads = 128, kBlockWarps = kThreads / kWarp;
constexpr int kOwnBits = 4;  // 16 own rows a warp

struct Call : sne_fast_cuda_set_attention_args {
  int head_bits, team_bits, split_bits;
  float scale;  // of logits
};

// The warps of a thread block that work on the same item. Teams of a block never wait for each other.
struct Team {
  int warps, index, warp;
  SNE_MEMBER explicit Team(const Call &call)
      : warps(int(call.warps)), index(warp_id() >> call.team_bits), warp(warp_id() & (int(call.warps) - 1)) {}
  SNE_MEMBER int thread() const { return warp * kWarp + lane_id(); }
  SNE_MEMBER void sync() const {
    if (warps == 1)
      sync_warp();
    else
      sync_named(1 + index, warps * kWarp);
  }
};

struct WorkItem {
  bool none;
  int head;
  int64_t row, row_end;  // own rows of the team, up to the end of the set
  int64_t begin, end;    // inner rows
  int64_t place;         // row of the results of own row `row`
  bool partial;          // results go to the arrays of partial results
  bool first;            // first of the pieces that hold these own rows
};

SNE_DEVICE int64_t partial_place(const Call &call, int64_t set_begin, int64_t index) {
  return (2 * ((set_begin >> call.split_bits) + index) + (index == 0)) * call.max_own_rows;
}

SNE_DEVICE WorkItem find_work_item(const Call &call, const Team &team, const int64_t *own_ptr,
                                   const int64_t *inner_ptr) {
  WorkItem item{};
  const int64_t id = (block_id() << (2 - call.team_bits)) + team.index, piece = id >> call.head_bits;
  item.head = int(id & (call.heads - 1));
  item.none = piece >= call.pieces;
  if (item.none) return item;
  if (!call.split_rows) {
    int64_t set = piece;
    if (call.one_tile_per_set) {
      item.row = own_ptr[set], item.row_end = own_ptr[set + 1];
    } else {
      const SetPiece found = find_piece(own_ptr, call.sets, piece, kOwnBits + call.team_bits);
      set = found.set, item.row = found.begin, item.row_end = found.end;
    }
    item.begin = inner_ptr[set], item.end = inner_ptr[set + 1];
    item.place = item.row;
    item.first = true;
  } else {
    const SetPiece found = find_piece(inner_ptr, call.sets, piece, call.split_bits);
    const int64_t set_begin = found.begin - (found.index << call.split_bits), piece_end = found.begin + call.split_rows;
    item.none = found.index && found.begin >= found.end;
    item.row = own_ptr[found.set], item.row_end = own_ptr[found.set + 1];
    item.begin = found.begin, item.end = found.end < piece_end ? found.end : piece_end;
    item.first = found.index == 0;
    item.partial = found.end - set_begin > call.split_rows;
    item.place = item.partial ? partial_place(call, set_begin, found.index) : item.row;
  }
  item.none = item.none || item.row >= item.row_end;
  return item;
}

// ------------------------------------------------------------------------------------------------------------ host

int combine_forward(const Call &call, Stream stream);
int combine_query_grad(const Call &call, Stream stream);
int combine_key_grad(const Call &call, Stream stream);

inline int bits_of(int64_t power) {
  int bits = 0;
  while ((int64_t(1) << bits) < power) ++bits;
  return bits;
}
inline bool power_of_two(int64_t n) { return n > 0 && !(n & (n - 1)); }

inline int prepare(Call &call, const sne_fast_cuda_set_attention_args *args) {
  static_cast<sne_fast_cuda_set_attention_args &>(call) = *args;
  if (args->sets < 0 || args->pieces < 0 || args->aligned_splits < 0 || args->max_own_rows < 0)
    return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (!power_of_two(args->warps) || args->warps > kBlockWarps) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (args->split_rows && (!power_of_two(args->split_rows) || args->max_own_rows > 16 * args->warps))
    return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (!power_of_two(args->heads) || args->width % args->heads) return SNE_FAST_CUDA_BAD_VARIANT;
  call.head_bits = bits_of(args->heads);
  call.team_bits = bits_of(args->warps);
  call.split_bits = bits_of(args->split_rows);
  call.scale = float(1 / sqrt(double(args->width)));
  return SNE_FAST_CUDA_OK;
}

inline int64_t blocks_of(const Call &call) {
  const int64_t teams = kBlockWarps / call.warps;
  return (call.pieces * call.heads + teams - 1) / teams;
}

// Calls launch_kernel(Op, width of a head, call), and then `combine` where there are partial results.
template <class LaunchKernel>
int run(const sne_fast_cuda_set_attention_args *args, Stream stream, int (*combine)(const Call &, Stream),
        LaunchKernel launch_kernel) {
  Call call;
  if (const int status = prepare(call, args)) return status;
  const int status = with_operands(int(call.precision), [&](auto op) {
    return with_head_width(call.width / call.heads, [&](auto d) { return launch_kernel(op, d, call); });
  });
  return status || !call.split_rows ? status : combine(call, stream);
}

}  // namespace sne::set_attention
