// Which rows a team of warps computes in set_attention, and where its results go.
//
// A unit is a piece of a set and a head. Without split the piece is 16 * warps own rows, and the team loops over all
// inner rows of the set. With split (few own rows, many inner ones) the piece is `split` inner rows and all own rows of
// their set; sets of several such pieces get partial results, which a second kernel adds up in the order of the pieces.
//
// Where partial results stand depends on rows alone, not on how many sets there are: a page is `split` inner rows of
// the packed array, and of the pieces that start in it at most one is the first of a set of several, at most one is
// another. So page p holds partial results 2p (another) and 2p + 1 (the first).
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

// Warps of a block that work on the same unit. Teams of a block never wait for each other.
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

struct Unit {
  bool none;
  int head;
  int64_t row, row_end;  // own rows of the team, up to the end of the set
  int64_t begin, end;    // inner rows
  int64_t place;         // row of the results of own row `row`
  bool partial;          // in the arrays of partial results
  bool first;            // of the pieces that hold these own rows
};

SNE_DEVICE int64_t partial_place(const Call &call, int64_t set_begin, int64_t index) {
  return (2 * ((set_begin >> call.split_bits) + index) + (index == 0)) * call.most;
}

SNE_DEVICE Unit find_unit(const Call &call, const Team &team, const int64_t *own_ptr, const int64_t *inner_ptr) {
  Unit unit{};
  const int64_t id = (block_id() << (2 - call.team_bits)) + team.index, piece = id >> call.head_bits;
  unit.head = int(id & (call.heads - 1));
  unit.none = piece >= call.pieces;
  if (unit.none) return unit;
  if (!call.split) {
    int64_t set = piece;
    if (call.single) {
      unit.row = own_ptr[set], unit.row_end = own_ptr[set + 1];
    } else {
      const SetSlot slot = find_slot(own_ptr, call.sets, piece, kOwnBits + call.team_bits);
      set = slot.set, unit.row = slot.begin, unit.row_end = slot.end;
    }
    unit.begin = inner_ptr[set], unit.end = inner_ptr[set + 1];
    unit.place = unit.row;
    unit.first = true;
  } else {
    const SetSlot slot = find_slot(inner_ptr, call.sets, piece, call.split_bits);
    const int64_t set_begin = slot.begin - (slot.index << call.split_bits), piece_end = slot.begin + call.split;
    unit.none = slot.index && slot.begin >= slot.end;
    unit.row = own_ptr[slot.set], unit.row_end = own_ptr[slot.set + 1];
    unit.begin = slot.begin, unit.end = slot.end < piece_end ? slot.end : piece_end;
    unit.first = slot.index == 0;
    unit.partial = slot.end - set_begin > call.split;
    unit.place = unit.partial ? partial_place(call, set_begin, slot.index) : unit.row;
  }
  unit.none = unit.none || unit.row >= unit.row_end;
  return unit;
}

// ------------------------------------------------------------------------------------------------- on the host's side

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
  if (args->sets < 0 || args->pieces < 0 || args->pages < 0 || args->most < 0) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (!power_of_two(args->warps) || args->warps > kBlockWarps) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (args->split && (!power_of_two(args->split) || args->most > 16 * args->warps)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (!power_of_two(args->heads) || args->width % args->heads) return SNE_FAST_CUDA_BAD_VARIANT;
  call.head_bits = bits_of(args->heads);
  call.team_bits = bits_of(args->warps);
  call.split_bits = bits_of(args->split);
  call.scale = float(1 / sqrt(double(args->width)));
  return SNE_FAST_CUDA_OK;
}

inline int64_t blocks_of(const Call &call) {
  const int64_t teams = kBlockWarps / call.warps;
  return (call.pieces * call.heads + teams - 1) / teams;
}

// launch_kernel(Op, width of a head, call), then what adds up partial results, where there are some.
template <class LaunchKernel>
int run(const sne_fast_cuda_set_attention_args *args, Stream stream, int (*combine)(const Call &, Stream),
        LaunchKernel launch_kernel) {
  Call call;
  if (const int status = prepare(call, args)) return status;
  const int status = with_operands(int(call.precision), [&](auto op) {
    return with_head_width(call.width / call.heads, [&](auto d) { return launch_kernel(op, d, call); });
  });
  return status || !call.split ? status : combine(call, stream);
}

}  // namespace sne::set_attention
