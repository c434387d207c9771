// Ragged segments of rows, shared out evenly over blocks without a map.
//
// A segment is as many items as it has rows and, behind them, `cost` more: what it takes to write its result. A block
// has `per_block` items, whatever segments these are of. Segments that lie in one block are its own; of one that is
// cut, every block with rows of it has a part, in slot 2 b of block b, or 2 b + 1 where the segment begins. So a block
// has two slots, and the slots of a segment follow from where it begins and ends.
//
// Within a block, rows are walked by groups of lanes: a group alone has a short segment, a warp one of middle length,
// the whole block a long one.
#pragma once

#include "cuda/tiles/warp_search.h"

namespace sne {

struct Segments {
  const int64_t *ptr;  // (count + 1,)
  int64_t count, cost, per_block;

  SNE_MEMBER int64_t first_item(int64_t segment) const { return ptr[segment] + cost * segment; }
};

// The segment of an item, not before segment `low`.
SNE_DEVICE int64_t segment_of(const Segments &s, int64_t item, int64_t low) {
  return low + last_at_most(s.count - low, item, [&](int64_t i) { return s.first_item(low + i); });
}

// What this block has of a segment: `rows` rows from begin on; segment -1 is none.
struct Part {
  int64_t segment = -1, begin = 0;
  int rows = 0;
  bool whole = false, first = false;  // has all rows, the first row

  SNE_MEMBER int64_t slot() const { return 2 * block_id() + first; }
};

// The items of this block, and the segments that these are of. It lies in shared memory, where it begins.
struct Share {
  int64_t begin, end;
  int64_t first, last;

  static SNE_MEMBER const Share &make(const Segments &s) {
    Share *shared = (Share *)shared_memory();
    if (warp_id() == 0) {
      const int64_t begin = block_id() * s.per_block, items = s.first_item(s.count);
      const int64_t end = begin + s.per_block < items ? begin + s.per_block : items;
      const int64_t first = segment_of(s, begin, 0), last = segment_of(s, end - 1, first);
      if (lane_id() == 0) *shared = {begin, end, first, last};
    }
    sync_block();
    return *shared;
  }

  SNE_MEMBER Part part(const Segments &s, int64_t segment) const {
    Part out;
    if (segment > last) return out;
    const int64_t from = s.ptr[segment], to = s.ptr[segment + 1], items = s.cost * segment;
    const int64_t upper = to < end - items ? to : end - items;
    out.begin = from > begin - items ? from : begin - items;
    // Of an empty segment the block with its first item has the whole; else rows decide.
    if (from < to ? out.begin >= upper : from + items < begin) return out;
    out.segment = segment;
    out.rows = int(upper - out.begin);
    out.first = out.begin == from;
    out.whole = out.first && upper == to;
    return out;
  }
};

// Slots of a segment that is cut.
struct Slots {
  int64_t first_block, count;

  SNE_MEMBER Slots(const Segments &s, int64_t segment) {
    const int64_t first = s.first_item(segment), rows = s.ptr[segment + 1] - s.ptr[segment];
    first_block = first / s.per_block;
    count = (first + rows - 1) / s.per_block - first_block + 1;
  }
  SNE_MEMBER int64_t slot(int64_t i) const { return i ? 2 * (first_block + i) : 2 * first_block + 1; }
};

// Who walks: groups of `lanes` lanes (a power of two), `warps` warps of the block; this thread's place in them.
struct Team {
  int lanes, warps, warp;

  SNE_MEMBER int groups() const { return kWarp / lanes; }
  SNE_MEMBER int group() const { return lane_id() / lanes; }
  SNE_MEMBER int lane() const { return lane_id() & (lanes - 1); }
};

enum Level { kGroup, kWholeWarp, kBlock };

// The rows of a part that fall to this thread's group: first, first + step, ...
struct Walk {
  int first, step;

  SNE_MEMBER Walk(const Team &t, Level level) : first(0), step(1) {
    if (level != kGroup) first = t.group(), step = t.groups();
    if (level == kBlock) first += t.warp * t.groups(), step *= t.warps;
  }
};

constexpr int kShortRows = 16;       // up to here a group keeps a segment for itself
constexpr int kLongParts = 256;      // most long parts of a block
constexpr int kFewestLongRows = 64;  // at least so many rows has a long part
constexpr int64_t kMostItems = int64_t(kLongParts - 1) * kFewestLongRows;  // of a block

SNE_HOST_DEVICE int long_rows(int groups, int warps) {
  return 8 * groups * warps > kFewestLongRows ? 8 * groups * warps : kFewestLongRows;
}

SNE_DEVICE int max_over_warp(int value) {
  for (int mask = kWarp / 2; mask; mask >>= 1) {
    const int other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Calls act(part, level) in all lanes of a warp, of all warps of the block for kBlock, until every part of the block's
// share has been had by the team. `longs` (kLongParts,) is shared memory of the block.
template <class Act>
SNE_DEVICE void for_each_part(const Segments &s, const Share &share, const Team &team, int *longs, Act act) {
  for (int i = thread_id(); i < kLongParts; i += num_threads()) longs[i] = -1;
  sync_block();
  const int segments = int(share.last - share.first) + 1, most = long_rows(team.groups(), team.warps);
  const int bundle = segments >= team.groups() * team.warps ? team.groups() : 1;  // segments of a warp at a time
  int next = team.warp * bundle, pass = 0, window = 0;
  uint32_t found = 0;
  bool walking_longs = false, alone = false;
  for (;;) {
    Part part;
    Level level = kWholeWarp;
    if (walking_longs) {
      while (!found && window < kLongParts) {
        found = ballot(longs[window + lane_id()] >= 0);
        window += kWarp;
      }
      if (!found) break;
      int bit = 0;
      while (!(found >> bit & 1)) ++bit;
      found &= found - 1;
      part = share.part(s, share.first + longs[window - kWarp + bit]);
      level = kBlock;
    } else if (next >= segments) {
      walking_longs = true;
      sync_block();
      continue;
    } else {
      if (pass == 0 && bundle > 1) {
        part = share.part(s, share.first + next + team.group());
        alone = max_over_warp(part.rows) <= kShortRows;
      }
      if (alone)
        level = kGroup;
      else
        part = share.part(s, share.first + next + pass++);
      if (alone || pass == bundle) pass = 0, next += team.warps * bundle;
      if (!alone && part.segment < 0) continue;
      if (!alone && part.rows >= most) {  // two long parts do not begin in the same window
        const int64_t item = part.begin + s.cost * part.segment - share.begin;
        if (lane_id() == 0) longs[item / most] = int(part.segment - share.first);
        continue;
      }
    }
    act(part, level);
  }
}

}  // namespace sne
