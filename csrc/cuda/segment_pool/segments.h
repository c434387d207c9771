// Ragged segments of rows, distributed evenly over thread blocks without a table.
//
// A segment counts as one item per row and, behind those, `cost` more items for writing its result. Every thread block
// gets `per_block` consecutive items, whatever segments they belong to. A segment inside one block is finished there. A
// segment that is cut has a part in each of several blocks, and every part leaves a partial result: number 2 b of block
// b, or 2 b + 1 for the part with the first row. A block therefore has at most two partial results, and the numbers of
// a segment's partial results follow from where it begins and ends.
//
// Within a block, groups of lanes walk the rows: one group takes a short segment, a warp one of medium length, the
// whole block a long one.
#pragma once

#include "cuda/tiles/warp_search.h"

namespace sne {

struct Segments {
  const int64_t *ptr;  // (count + 1,)
  int64_t count, cost, per_block;

  SNE_MEMBER int64_t first_item(int64_t segment) const { return ptr[segment] + cost * segment; }
};

// Returns the segment of an item. It must not be before segment `low`.
SNE_DEVICE int64_t segment_of(const Segments &s, int64_t item, int64_t low) {
  return low + last_at_most(s.count - low, item, [&](int64_t i) { return s.first_item(low + i); });
}

// The rows of a segment that fall to this block: `rows` rows from `begin` on. Segment -1 means none.
struct Part {
  int64_t segment = -1, begin = 0;
  int rows = 0;
  bool whole = false, first = false;  // has all rows; has the first row

  SNE_MEMBER int64_t partial() const { return 2 * block_id() + first; }
};

// The items of this block and the segments that they belong to, at the start of shared memory.
struct BlockItems {
  int64_t begin, end;
  int64_t first, last;

  static SNE_MEMBER const BlockItems &make(const Segments &s) {
    BlockItems *shared = (BlockItems *)shared_memory();
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
    // An empty segment belongs to the block with its first item, any other to the blocks with its rows.
    if (from < to ? out.begin >= upper : from + items < begin) return out;
    out.segment = segment;
    out.rows = int(upper - out.begin);
    out.first = out.begin == from;
    out.whole = out.first && upper == to;
    return out;
  }
};

// Numbers of the partial results of a segment that is cut.
struct Partials {
  int64_t first_block, count;

  SNE_MEMBER Partials(const Segments &s, int64_t segment) {
    const int64_t first = s.first_item(segment), rows = s.ptr[segment + 1] - s.ptr[segment];
    first_block = first / s.per_block;
    count = (first + rows - 1) / s.per_block - first_block + 1;
  }
  SNE_MEMBER int64_t index(int64_t i) const { return i ? 2 * (first_block + i) : 2 * first_block + 1; }
};

// The threads that walk together: groups of `lanes` lanes (a power of two) in `warps` warps of the block, and the
// number of this thread's warp among them.
struct Team {
  int lanes, warps, warp;

  SNE_MEMBER int groups() const { return kWarp / lanes; }
  SNE_MEMBER int group() const { return lane_id() / lanes; }
  SNE_MEMBER int lane() const { return lane_id() & (lanes - 1); }
};

enum Level { kGroup, kWholeWarp, kBlock };

// The rows of a part that this thread's group walks: first, first + step, ...
struct Walk {
  int first, step;

  SNE_MEMBER Walk(const Team &t, Level level) : first(0), step(1) {
    if (level != kGroup) first = t.group(), step = t.groups();
    if (level == kBlock) first += t.warp * t.groups(), step *= t.warps;
  }
};

constexpr int kShortRows = 16;    // up to so many rows a group takes a segment alone
constexpr int kLongParts = 256;   // at most so many long parts in a block
constexpr int kMinLongRows = 64;  // a long part has at least so many rows
constexpr int64_t kMaxItems = int64_t(kLongParts - 1) * kMinLongRows;  // of a block

SNE_HOST_DEVICE int long_rows(int groups, int warps) {
  return 8 * groups * warps > kMinLongRows ? 8 * groups * warps : kMinLongRows;
}

SNE_DEVICE int max_over_warp(int value) {
  for (int mask = kWarp / 2; mask; mask >>= 1) {
    const int other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Calls act(part, level) for every part of the block's items that falls to this team, in all lanes of a warp, and in
// all warps of the block for kBlock. `longs` (kLongParts,) is shared memory of the block.
template <class Act>
SNE_DEVICE void for_each_part(const Segments &s, const BlockItems &items, const Team &team, int *longs, Act act) {
  for (int i = thread_id(); i < kLongParts; i += num_threads()) longs[i] = -1;
  sync_block();
  const int segments = int(items.last - items.first) + 1, min_long_rows = long_rows(team.groups(), team.warps);
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
      part = items.part(s, items.first + longs[window - kWarp + bit]);
      level = kBlock;
    } else if (next >= segments) {
      walking_longs = true;
      sync_block();
      continue;
    } else {
      if (pass == 0 && bundle > 1) {
        part = items.part(s, items.first + next + team.group());
        alone = max_over_warp(part.rows) <= kShortRows;
      }
      if (alone)
        level = kGroup;
      else
        part = items.part(s, items.first + next + pass++);
      if (alone || pass == bundle) pass = 0, next += team.warps * bundle;
      if (!alone && part.segment < 0) continue;
      if (!alone && part.rows >= min_long_rows) {  // so two long parts never begin in the same window
        const int64_t item = part.begin + s.cost * part.segment - items.begin;
        if (lane_id() == 0) longs[item / min_long_rows] = int(part.segment - items.first);
        continue;
      }
    }
    act(part, level);
  }
}

}  // namespace sne
