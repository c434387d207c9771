// segment_pool: out[s, a] = sum over the rows of segment s of softmax(logits[:, a]) x, reading x once.
//
// The team that has a part of a segment first finds the largest of its logits; then each of its lanes sums rows.
// Softmax weights are computed once, one row per lane, and read by the other lanes from shared memory. Sums are added
// over the warp, over the thread block and, for segments that are cut, in a second kernel, always in the same order. A
// warp pools kQueries queries over some of the columns. Where there are more queries or columns, several warps of a
// thread block walk the same rows together, so that memory is read once.
#include "cuda/segment_pool/pool.h"

namespace sne {
namespace {

struct PoolJob {
  Segments segments;
  const void *x, *logits;
  void *out;
  float *lse, *part, *part_state;  // sums (partials, A, h); their shift and total (partials, A, 2)
  int width, queries;
  int query_blocks, column_blocks, part_warps, lanes;
};

template <int kQueries>
constexpr int kRows = kQueries > 4 ? 4 : 8;  // of a group, loaded before the first is used

template <int kQueries, int kColumns>
struct Sums {
  static constexpr int kFields = kQueries * (kColumns + 1);
  float total[kQueries], sum[kQueries][kColumns];

  // act(field, number) for all of them.
  template <class Act>
  SNE_MEMBER void each(Act act) {
    SNE_UNROLL
    for (int a = 0; a < kQueries; ++a) {
      act(total[a], a * (kColumns + 1));
      SNE_UNROLL
      for (int v = 0; v < kColumns; ++v) act(sum[a][v], a * (kColumns + 1) + 1 + v);
    }
  }
};

// Work of one lane: to pool queries first_query.. and 16 bytes of columns.
template <class T, int kQueries>
struct Lane {
  static constexpr int kCount = kRows<kQueries>, kColumns = kVector<T>;
  const PoolJob &job;
  const Team &team;
  float *shift, *weights;  // (kQueries,) and (kCount, kQueries) of the group, in shared memory
  int64_t first_query, column;
  bool inside, vectors;  // it has such columns; logits are read in vectors

  static constexpr int kShared = (kCount + 1) * kQueries;

  SNE_MEMBER Lane(const PoolJob &job, const Team &team, float *shared)
      : job(job), team(team), shift(shared), weights(shared + kQueries) {
    const int part = int(block_id(1)) * job.part_warps + warp_id() % job.part_warps;
    first_query = part % job.query_blocks * kQueries;
    column = (int64_t(part / job.query_blocks) * team.lanes + team.lane()) * kColumns;
    inside = column < job.width && part < job.query_blocks * job.column_blocks;
    vectors = job.queries % kQueries == 0;
  }

  // shift = the largest logits of a part, in every group that has it; `exchange` (warps, kQueries) of the block.
  SNE_MEMBER void find_shift(const Part &p, Level level, float *exchange) const {
    float out[kQueries];
    const int lanes = level == kGroup ? team.lanes : kWarp;
    const int first = level == kGroup ? team.lane() : lane_id() + (level == kBlock ? team.warp * kWarp : 0);
    const int step = level == kBlock ? team.warps * kWarp : lanes;
    SNE_UNROLL
    for (int a = 0; a < kQueries; ++a) out[a] = -kInfinity;
    const T *logits = (const T *)job.logits + p.begin * job.queries;
    SNE_UNROLL_BY(4)
    for (int row = first; row < p.rows; row += step) {
      float logit[kQueries];
      load_logits<T>(logit, logits + int64_t(row) * job.queries, first_query, job.queries, vectors);
      SNE_UNROLL
      for (int a = 0; a < kQueries; ++a) out[a] = max_of(out[a], logit[a]);
    }
    for (int mask = 1; mask < lanes; mask <<= 1) {
      SNE_UNROLL
      for (int a = 0; a < kQueries; ++a) out[a] = max_of(out[a], shuffle_xor(out[a], mask));
    }
    if (level == kBlock) {
      if (lane_id() == 0) store_floats(exchange + warp_id() * kQueries, out);
      sync_block();
      for (int warp = 0; warp < team.warps; ++warp) {
        float other[kQueries];
        load_floats(other, exchange + (warp * job.part_warps + warp_id() % job.part_warps) * kQueries);
        SNE_UNROLL
        for (int a = 0; a < kQueries; ++a) out[a] = max_of(out[a], other[a]);
      }
      sync_block();
    }
    if (team.lane() == 0) store_floats(shift, out);
    sync_warp();
  }

  // Weights of the rows at begin.. of this group's walk, into shared memory: lane u has row u.
  SNE_MEMBER void weigh(const Part &p, const Walk &walk, int begin) const {
    SNE_UNROLL_BY(1)
    for (int u = team.lane(); u < kCount; u += team.lanes) {
      const int row = begin + u * walk.step;
      float weight[kQueries], from[kQueries];
      load_floats(from, shift);
      if (row < p.rows)
        load_logits<T>(weight, (const T *)job.logits + (p.begin + row) * job.queries, first_query, job.queries,
                       vectors);
      SNE_UNROLL
      for (int a = 0; a < kQueries; ++a) weight[a] = row < p.rows ? exp_from(weight[a], from[a]) : 0.0f;
      store_floats(weights + u * kQueries, weight);
    }
  }

  // Sums over the rows of this group. All lanes of the warp.
  SNE_MEMBER Sums<kQueries, kColumns> walk(const Part &p, const Walk &walk) const {
    Sums<kQueries, kColumns> sums;
    sums.each([](float &field, int) { field = 0; });
    const T *x = (const T *)job.x + p.begin * job.width + column;
    const int longest = max_over_warp(p.rows - walk.first);
    for (int begin = 0; begin < longest; begin += kCount * walk.step) {
      Words rows[kCount];
      SNE_UNROLL
      for (int u = 0; u < kCount; ++u) {
        const int row = walk.first + begin + u * walk.step;
        rows[u] = inside && row < p.rows ? load_words(x + int64_t(row) * job.width) : Words{};
      }
      weigh(p, walk, walk.first + begin);
      sync_warp();
      SNE_UNROLL
      for (int u = 0; u < kCount; ++u) {
        if (begin + u * walk.step >= longest) continue;
        float weight[kQueries], value[kColumns];
        load_floats(weight, weights + u * kQueries);
        unpack<T>(value, rows[u]);
        SNE_UNROLL
        for (int a = 0; a < kQueries; ++a) {
          sums.total[a] += weight[a];
          SNE_UNROLL
          for (int v = 0; v < kColumns; ++v) sums.sum[a][v] += weight[a] * value[v];
        }
      }
      sync_warp();
    }
    return sums;
  }

  // Queries that are `which` modulo `of`: the mean and lse of a whole segment, or the sums of a part.
  SNE_MEMBER void store(const Part &p, const Sums<kQueries, kColumns> &sums, int which, int of) const {
    SNE_UNROLL
    for (int a = 0; a < kQueries; ++a) {
      const int64_t query = first_query + a;
      if (!inside || p.segment < 0 || query >= job.queries || (a & (of - 1)) != which) continue;
      const int64_t row = (p.whole ? p.segment : p.partial()) * job.queries + query;
      const float total = sums.total[a];
      if (p.whole) {
        const float scale = total == 0 ? 0.0f : divide_exactly(1.0f, total);
        float mean[kColumns];
        SNE_UNROLL
        for (int v = 0; v < kColumns; ++v) mean[v] = sums.sum[a][v] * scale;
        store_words((T *)job.out + row * job.width + column, pack<T>(mean));
        if (column == 0) job.lse[row] = total == 0 ? -kInfinity : shift[a] + log2_fast(total) * kLn2;
      } else {
        store_floats(job.part + row * job.width + column, sums.sum[a]);
        if (column == 0) job.part_state[2 * row] = shift[a], job.part_state[2 * row + 1] = total;
      }
    }
  }
};

// With 8 queries, sums of 8 columns of 16-bit numbers take more registers than two blocks may have.
template <class T, int kQueries>
SNE_KERNEL SNE_BOUNDS(kPoolThreads, kQueries > 4 && sizeof(T) == 2 ? 1 : 2) pool(PoolJob job) {
  constexpr int fields = Sums<kQueries, kVector<T>>::kFields, own = Lane<T, kQueries>::kShared;
  const BlockItems &items = BlockItems::make(job.segments);
  const Team team{job.lanes, kPoolWarps / job.part_warps, warp_id() / job.part_warps};
  int *longs = (int *)((BlockItems *)shared_memory() + 1);
  float *weights = (float *)(longs + kLongParts), *exchange = weights + kPoolWarps * team.groups() * own;
  const Lane<T, kQueries> lane(job, team, weights + (warp_id() * team.groups() + team.group()) * own);
  for_each_part(job.segments, items, team, longs, [&](const Part &part, Level level) {
    lane.find_shift(part, level, exchange);
    auto sums = lane.walk(part, Walk(team, level));
    if (level != kGroup)
      for (int mask = team.lanes; mask < kWarp; mask <<= 1)
        sums.each([&](float &field, int) { field += shuffle_xor(field, mask); });
    if (level == kBlock)
      for (int half = team.warps / 2; half; half /= 2) {
        const int place = team.warp % half * job.part_warps + warp_id() % job.part_warps;
        float *at = exchange + place * fields * team.lanes + team.lane();
        if (team.warp >= half && team.warp < 2 * half && team.group() == 0)
          sums.each([&](float &field, int i) { at[i * team.lanes] = field; });
        sync_block();
        if (team.warp < half) sums.each([&](float &field, int i) { field += at[i * team.lanes]; });
        sync_block();
      }
    if (level != kBlock || team.warp == 0)
      lane.store(part, sums, level == kGroup ? 0 : team.group(), level == kGroup ? 1 : team.groups());
    sync_warp();  // the next part has another shift
  });
}

constexpr int kCombineThreads = 512, kCombineColumns = 4 * kWarp;

// Block b adds up, in order, the partial results of the segment that begins in block b of `pool` and ends in another.
template <class T>
SNE_KERNEL SNE_BOUNDS(kCombineThreads, 2) combine(PoolJob job) {
  constexpr int flight = 4;
  const BlockItems &items = BlockItems::make(job.segments);
  const Part tail = items.part(job.segments, items.last);
  if (tail.segment < 0 || tail.whole || !tail.first) return;
  const Partials partials(job.segments, tail.segment);
  const int64_t column = block_id(1) * kCombineColumns + lane_id() * 4, size = int64_t(job.queries) * job.width;
  const bool inside = column < size;
  const int64_t query = inside ? column / job.width : 0;  // one for all four, as the width is a multiple of 16
  float shift = -kInfinity, total = 0, sum[4] = {0, 0, 0, 0};
  float *exchange = (float *)((BlockItems *)shared_memory() + 1);  // (warps, 6, lanes)
  for (int64_t i = warp_id(); i < partials.count; i += num_warps())
    shift = max_of(shift, job.part_state[2 * (partials.index(i) * job.queries + query)]);
  exchange[thread_id()] = shift;
  sync_block();
  for (int warp = 0; warp < num_warps(); ++warp) shift = max_of(shift, exchange[warp * kWarp + lane_id()]);
  sync_block();
  for (int64_t begin = warp_id(); inside && begin < partials.count; begin += int64_t(flight) * num_warps()) {
    Words sums[flight];
    float scale[flight], totals[flight];
    SNE_UNROLL
    for (int u = 0; u < flight; ++u) {
      const int64_t i = begin + u * num_warps(), partial = partials.index(i < partials.count ? i : begin);
      sums[u] = load_words(job.part + partial * size + column);
      const float *state = job.part_state + 2 * (partial * job.queries + query);
      scale[u] = exp_from(state[0], shift), totals[u] = state[1];
    }
    SNE_UNROLL
    for (int u = 0; u < flight; ++u) {
      if (begin + u * num_warps() >= partials.count) continue;
      total += scale[u] * totals[u];
      SNE_UNROLL
      for (int v = 0; v < 4; ++v) sum[v] += scale[u] * value_of<float>(sums[u], v);
    }
  }
  float *at = exchange + warp_id() * 5 * kWarp + lane_id();
  at[0] = total;
  SNE_UNROLL
  for (int v = 0; v < 4; ++v) at[(1 + v) * kWarp] = sum[v];
  sync_block();
  if (warp_id() || !inside) return;
  for (int warp = 1; warp < num_warps(); ++warp) {
    total += at[warp * 5 * kWarp];
    SNE_UNROLL
    for (int v = 0; v < 4; ++v) sum[v] += at[(warp * 5 + 1 + v) * kWarp];
  }
  const float scale = total == 0 ? 0.0f : divide_exactly(1.0f, total);
  T *out = (T *)job.out + tail.segment * size + column;
  SNE_UNROLL
  for (int v = 0; v < 4; ++v) out[v] = from_float<T>(sum[v] * scale);
  if (column % job.width == 0)
    job.lse[tail.segment * job.queries + query] = total == 0 ? -kInfinity : shift + log2_fast(total) * kLn2;
}

template <class T, int kQueries>
int run_pool(const sne_fast_cuda_pool *a, PoolJob job, Stream stream) {
  job.lanes = lanes_of<T>(a->width);
  job.query_blocks = int(quotient_up(a->queries, kQueries));
  job.column_blocks = int(quotient_up(a->width, int64_t(job.lanes) * kVector<T>));
  const int64_t parts = int64_t(job.query_blocks) * job.column_blocks;
  job.part_warps = power_of_two(parts, kPoolWarps);
  // The exchange of sums takes the most memory, except where the team is one warp: then that of the logits does.
  const int64_t senders = kPoolWarps / job.part_warps / 2 * job.part_warps;
  const int64_t sums = senders * Sums<kQueries, kVector<T>>::kFields * job.lanes, logits = kPoolWarps * kQueries;
  const int64_t weights = kPoolWarps * (kWarp / job.lanes) * Lane<T, kQueries>::kShared;
  const size_t shared =
      sizeof(BlockItems) + kLongParts * sizeof(int) + (weights + (sums > logits ? sums : logits)) * sizeof(float);
  const int status =
      launch(stream, a->blocks, quotient_up(parts, job.part_warps), kPoolThreads, shared, pool<T, kQueries>, job);
  if (status || a->blocks == 1) return status;
  return launch(stream, a->blocks - 1, quotient_up(a->queries * a->width, kCombineColumns), kCombineThreads,
                sizeof(BlockItems) + kCombineThreads * 5 * sizeof(float), combine<T>, job);
}

template <class T>
int run_pool(const sne_fast_cuda_pool *a, Stream stream) {
  const PoolJob job{segments_of(a),  a->x, a->logits, a->out, a->lse, a->part, a->part_state, int(a->width),
                    int(a->queries), 0,    0,         0,      0};
  return a->queries > 4 ? run_pool<T, 8>(a, job, stream) : run_pool<T, 4>(a, job, stream);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_segment_pool(const sne_fast_cuda_pool *a, void *stream) {
  if (!sne::pool_fits(a)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return sne::with_storage(int(a->precision),
                           [&](auto value) { return sne::run_pool<decltype(value)>(a, (sne::Stream)stream); });
}
