#include "cpu/tile_plan.h"

#include <algorithm>
#include <new>
#include <vector>

namespace sne {

bool pointers_fit(int64_t sets, const int64_t *ptr, int64_t rows) {
  if (sets < 0 || rows < 0 || !ptr || ptr[0] != 0) return false;
  for (int64_t i = 0; i < sets; ++i)
    if (ptr[i + 1] < ptr[i] || ptr[i + 1] > rows) return false;
  return ptr[sets] == rows;
}

namespace {

long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Returns the slots of a tile: 64, or 128 for widths whose weight gradients do not stay in the second-level cache
// (every tile reads and writes them once), or more for longer chunks; among those the smallest that leaves few slots
// unused.
long choose_slots(long longest, long panel, long hidden) {
  const long min_slots = round_up(std::max(longest, hidden > 64 ? 128L : 64L), panel);
  const long max_slots = std::max(min_slots, 256L);
  double best = 1.0;
  auto waste = [&](long slots) { return 1.0 - double(slots / longest * longest) / double(slots); };
  for (long slots = min_slots; slots <= max_slots; slots += panel) best = std::min(best, waste(slots));
  for (long slots = min_slots; slots <= max_slots; slots += panel)
    if (waste(slots) <= best + 0.05) return slots;
  return min_slots;
}

// Packs first fit among the last few open tiles: short tails of tensors fill what longer chunks have left.
class Packer {
 public:
  explicit Packer(long slots) : slots_(slots) {}
  int64_t place(long n, std::vector<int32_t> &used) {
    for (size_t i = 0; i < open_.size(); ++i) {
      const int64_t t = open_[i];
      if (used[t] + n > slots_) continue;
      used[t] += int32_t(n);
      if (used[t] == slots_) open_.erase(open_.begin() + i);
      return t;
    }
    const int64_t t = int64_t(used.size());
    used.push_back(int32_t(n));
    if (n < slots_) {
      if (open_.size() == 8) open_.erase(open_.begin());
      open_.push_back(t);
    }
    return t;
  }

 private:
  long slots_;
  std::vector<int64_t> open_;
};

}  // namespace

int make_tile_plan(const sne_fast_chunk_encode_args &args, long lanes, long panel, TilePlan *plan) {
  const int64_t num_chunks = args.num_chunks, num_tensors = args.num_tensors;
  const int64_t *chunk_ptr = args.chunk_ptr, *tensor_ptr = args.tensor_ptr;
  if (!pointers_fit(num_chunks, chunk_ptr, args.num_values)) return SNE_FAST_BAD_ARGUMENT;
  if (!pointers_fit(num_tensors, tensor_ptr, num_chunks)) return SNE_FAST_BAD_ARGUMENT;
  long longest = 0;
  for (int64_t t = 0; t < num_chunks; ++t) longest = std::max(longest, long(chunk_ptr[t + 1] - chunk_ptr[t]));
  if (longest > args.element_rows || longest > SNE_FAST_LONGEST_CHUNK) return SNE_FAST_BAD_ARGUMENT;
  if (longest == 0) return SNE_FAST_OK;
  try {
    plan->longest = longest;
    plan->slots = choose_slots(longest, panel, args.hidden);
    // Chunks that fill whole vectors have tiles of their own, where no lane of the attention is masked.
    std::vector<int32_t> used;
    std::vector<int64_t> tile_of(num_chunks);
    Packer whole(plan->slots), ragged(plan->slots);
    for (int64_t t = 0; t < num_chunks; ++t) {
      const long n = long(chunk_ptr[t + 1] - chunk_ptr[t]);
      Packer &packer = n % lanes == 0 ? whole : ragged;
      tile_of[t] = n == 0 ? -1 : packer.place(n, used);
    }
    plan->num_tiles = long(used.size());
    plan->first = new int64_t[plan->num_tiles + 1]();
    plan->order = new int64_t[num_chunks];
    plan->tensor_of = new int64_t[num_chunks];
    for (int64_t t = 0; t < num_chunks; ++t)
      if (tile_of[t] >= 0) ++plan->first[tile_of[t] + 1];
    for (long i = 0; i < plan->num_tiles; ++i) plan->first[i + 1] += plan->first[i];
    std::vector<int64_t> next(plan->first, plan->first + plan->num_tiles);
    for (int64_t t = 0; t < num_chunks; ++t)
      if (tile_of[t] >= 0) plan->order[next[tile_of[t]]++] = t;
    for (int64_t s = 0; s < num_tensors; ++s)
      for (int64_t t = tensor_ptr[s]; t < tensor_ptr[s + 1]; ++t) plan->tensor_of[t] = s;
  } catch (const std::bad_alloc &) {
    free_tile_plan(plan);
    return SNE_FAST_NO_MEMORY;
  }
  return SNE_FAST_OK;
}

void free_tile_plan(TilePlan *plan) {
  delete[] plan->first;
  delete[] plan->order;
  delete[] plan->tensor_of;
  *plan = TilePlan();
}

}  // namespace sne
