// Gradients of segment_pool: of row i of x, sum over queries of weight[i, a] grad[a]; of its logits,
// weight[i, a] (<x_i, grad_a> - mean over the segment's rows of that by weight). x is read once, its gradient written
// once.
//
// A group of lanes walks rows as in the forward kernel and writes <x_i, grad_a>. Then the team that has the part sums
// the mean and, for a whole segment, writes the gradient of the logits. For segments that are cut a second kernel
// writes it, from the means of all parts in order.
#include "cuda/segment_pool/pool.h"

namespace sne {
namespace {

constexpr int kQueries = 4;  // of a group at a time
template <class T>
constexpr int kRows = sizeof(T) == 2 ? 2 : 4;

struct GradJob {
  Segments segments;
  const void *grad, *x, *logits;
  const float *lse;
  void *grad_x, *grad_logits;
  float *products, *part_mean;  // (rows, A) and (partials, A)
  int width, queries;
  int query_blocks, column_blocks, lanes;
};

// Lanes of a team arranged as rows x queries: `across` queries (a power of two) side by side.
struct Grid {
  int across, row, query, rows;

  SNE_MEMBER Grid(const GradJob &job, const Team &team, Level level) {
    const int lanes = level == kGroup ? team.lanes : kWarp, lane = level == kGroup ? team.lane() : lane_id();
    across = power_of_two(job.queries, lanes);
    query = lane & (across - 1), row = lane / across, rows = lanes / across;
    if (level == kBlock) row += team.warp * rows, rows *= team.warps;
  }
};

// Returns the sum over the rows of a grid, the same in all lanes that share a query; `exchange` (warps, lanes) of the
// block.
SNE_DEVICE float sum_over_rows(float value, const Grid &grid, const Team &team, Level level, float *exchange) {
  for (int mask = grid.across; mask < (level == kGroup ? team.lanes : kWarp); mask <<= 1)
    value += shuffle_xor(value, mask);
  if (level != kBlock) return value;
  exchange[thread_id()] = value;
  sync_block();
  value = 0;
  for (int warp = 0; warp < team.warps; ++warp) value += exchange[warp * kWarp + lane_id()];
  sync_block();
  return value;
}

template <class T>
SNE_DEVICE float weight_of(const GradJob &job, int64_t at, float log_sum) {
  return exp_from(to_real(((const T *)job.logits)[at]), log_sum);
}

// Returns the weighted mean of the products over the rows of a part, for the query of this lane.
template <class T>
SNE_DEVICE float mean_of_part(const GradJob &job, const Part &p, const Grid &grid, int64_t query, float log_sum) {
  float mean = 0;
  if (query < job.queries) {
    SNE_UNROLL_BY(4)
    for (int row = grid.row; row < p.rows; row += grid.rows) {
      const int64_t at = (p.begin + row) * job.queries + query;
      mean += weight_of<T>(job, at, log_sum) * job.products[at];
    }
  }
  return mean;
}

template <class T>
SNE_DEVICE void write_logits(const GradJob &job, const Part &p, const Grid &grid, int64_t query, float log_sum,
                             float mean) {
  if (query >= job.queries) return;
  SNE_UNROLL_BY(4)
  for (int row = grid.row; row < p.rows; row += grid.rows) {
    const int64_t at = (p.begin + row) * job.queries + query;
    ((T *)job.grad_logits)[at] = from_float<T>(weight_of<T>(job, at, log_sum) * (job.products[at] - mean));
  }
}

template <class T>
struct Lane {
  static constexpr int kColumns = kVector<T>;
  const GradJob &job;
  const Team &team;
  float *weights;  // (kRows<T>, kQueries) of the group, in shared memory

  // Weights of queries first.. of this group's rows, into shared memory: lane u has row u.
  SNE_MEMBER void weigh(const Part &p, const Walk &walk, int begin, int64_t first) const {
    for (int u = team.lane(); u < kRows<T>; u += team.lanes) {
      const int row = begin + u * walk.step;
      float weight[kQueries];
      SNE_UNROLL
      for (int a = 0; a < kQueries; ++a) weight[a] = 0;
      if (row < p.rows) {
        float logit[kQueries];
        load_logits<T>(logit, (const T *)job.logits + (p.begin + row) * job.queries, first, job.queries,
                       job.queries % kQueries == 0);
        SNE_UNROLL
        for (int a = 0; a < kQueries; ++a)
          if (first + a < job.queries) weight[a] = exp_from(logit[a], job.lse[p.segment * job.queries + first + a]);
      }
      store_floats(weights + u * kQueries, weight);
    }
  }

  // Adds up over the group, and onto what earlier columns gave; each lane writes some rows.
  SNE_MEMBER void write_products(float (&product)[kRows<T>][kQueries], const Part &p, const Walk &walk, int begin,
                                 int64_t first, bool more) const {
    for (int mask = 1; mask < team.lanes; mask <<= 1) {
      SNE_UNROLL
      for (int u = 0; u < kRows<T>; ++u) {
        SNE_UNROLL
        for (int a = 0; a < kQueries; ++a) product[u][a] += shuffle_xor(product[u][a], mask);
      }
    }
    SNE_UNROLL
    for (int u = 0; u < kRows<T>; ++u) {
      const int row = begin + u * walk.step;
      if (row >= p.rows || (u & (team.lanes - 1)) != team.lane()) continue;
      float *at = job.products + (p.begin + row) * job.queries + first;
      if (job.queries % kQueries == 0 && !more) {
        store_floats(at, product[u]);
      } else {
        SNE_UNROLL
        for (int a = 0; a < kQueries; ++a)
          if (first + a < job.queries) at[a] = product[u][a] + (more ? at[a] : 0.0f);
      }
    }
  }

  // Products and gradients of this group's rows. All lanes of the warp.
  SNE_MEMBER void walk(const Part &p, const Walk &walk) const {
    const int longest = max_over_warp(p.rows - walk.first);
    for (int block = 0; block < job.column_blocks; ++block) {
      const int64_t column = (int64_t(block) * team.lanes + team.lane()) * kColumns;
      const bool inside = column < job.width && p.segment >= 0;
      const T *x = (const T *)job.x + p.begin * job.width + column;
      T *grad_x = (T *)job.grad_x + p.begin * job.width + column;
      const T *grad = (const T *)job.grad + p.segment * job.queries * job.width + column;
      for (int start = 0; start < longest; start += kRows<T> * walk.step) {
        const int begin = walk.first + start;
        Words rows[kRows<T>];
        float result[kRows<T>][kColumns];
        SNE_UNROLL
        for (int u = 0; u < kRows<T>; ++u) {
          const int row = begin + u * walk.step;
          rows[u] = inside && row < p.rows ? load_words(x + int64_t(row) * job.width) : Words{};
          SNE_UNROLL
          for (int v = 0; v < kColumns; ++v) result[u][v] = 0;
        }
        for (int q = 0; q < job.query_blocks; ++q) {
          const int64_t first = int64_t(q) * kQueries;
          Words grads[kQueries];
          SNE_UNROLL
          for (int a = 0; a < kQueries; ++a)
            grads[a] = inside && first + a < job.queries ? load_words(grad + (first + a) * job.width) : Words{};
          weigh(p, walk, begin, first);
          sync_warp();
          float product[kRows<T>][kQueries];
          SNE_UNROLL
          for (int a = 0; a < kQueries; ++a) {
            float values[kColumns];
            unpack<T>(values, grads[a]);
            SNE_UNROLL
            for (int u = 0; u < kRows<T>; ++u) {
              const float weight = weights[u * kQueries + a];
              product[u][a] = 0;
              SNE_UNROLL
              for (int v = 0; v < kColumns; ++v) {
                product[u][a] += to_real(value_of<T>(rows[u], v)) * values[v];
                result[u][v] += weight * values[v];
              }
            }
          }
          write_products(product, p, walk, begin, first, block > 0);
          sync_warp();
        }
        SNE_UNROLL
        for (int u = 0; u < kRows<T>; ++u) {
          const int row = begin + u * walk.step;
          if (inside && row < p.rows) store_words(grad_x + int64_t(row) * job.width, pack<T>(result[u]));
        }
      }
    }
  }
};

template <class T>
SNE_KERNEL SNE_BOUNDS(kPoolThreads, 2) pool_backward(GradJob job) {
  const BlockItems &items = BlockItems::make(job.segments);
  const Team team{job.lanes, kPoolWarps, warp_id()};
  int *longs = (int *)((BlockItems *)shared_memory() + 1);
  float *exchange = (float *)(longs + kLongParts), *weights = exchange + kPoolThreads;
  const Lane<T> lane{job, team, weights + (warp_id() * team.groups() + team.group()) * kRows<T> * kQueries};
  for_each_part(job.segments, items, team, longs, [&](const Part &part, Level level) {
    lane.walk(part, Walk(team, level));
    if (level == kBlock)
      sync_block();  // products of a part are read by all who have it
    else
      sync_warp();
    const Grid grid(job, team, level);
    for (int64_t first = 0; first < job.queries; first += grid.across) {
      const int64_t query = first + grid.query;
      const bool mine = part.segment >= 0 && query < job.queries;
      const float log_sum = mine ? job.lse[part.segment * job.queries + query] : 0.0f;
      const float own = mine ? mean_of_part<T>(job, part, grid, query, log_sum) : 0.0f;
      const float mean = sum_over_rows(own, grid, team, level, exchange);
      if (!mine) continue;
      if (part.whole)
        write_logits<T>(job, part, grid, query, log_sum, mean);
      else if (grid.row == 0)
        job.part_mean[part.partial() * job.queries + query] = mean;
    }
  });
}

// Writes the gradients of the logits for the parts of cut segments; a block has at most two such parts.
template <class T>
SNE_KERNEL SNE_BOUNDS(kPoolThreads, 4) cut_logits(GradJob job) {
  const BlockItems &items = BlockItems::make(job.segments);
  const Team team{kWarp, kPoolWarps, warp_id()};
  const Grid grid(job, team, kBlock);
  float *exchange = (float *)((BlockItems *)shared_memory() + 1);
  for (int64_t segment = items.first;; segment = items.last) {
    const Part part = items.part(job.segments, segment);
    if (part.segment >= 0 && !part.whole) {
      const Partials partials(job.segments, segment);
      for (int64_t first = 0; first < job.queries; first += grid.across) {
        const int64_t query = first + grid.query;
        float mean = 0;
        if (query < job.queries)
          for (int64_t i = grid.row; i < partials.count; i += grid.rows)
            mean += job.part_mean[partials.index(i) * job.queries + query];
        mean = sum_over_rows(mean, grid, team, kBlock, exchange);
        if (query < job.queries) write_logits<T>(job, part, grid, query, job.lse[segment * job.queries + query], mean);
      }
    }
    if (segment == items.last) break;
  }
}

template <class T>
int run_backward(const sne_fast_cuda_pool *a, Stream stream) {
  const int lanes = lanes_of<T>(a->width);
  const int query_blocks = int(quotient_up(a->queries, kQueries));
  const int column_blocks = int(quotient_up(a->width, int64_t(lanes) * kVector<T>));
  const GradJob job{
      segments_of(a),  a->grad,      a->x,          a->logits,       a->lse,       a->grad_x,     a->grad_logits,
      a->weights_grad, a->part_mean, int(a->width), int(a->queries), query_blocks, column_blocks, lanes};
  const int groups = kPoolWarps * (kWarp / lanes);
  const size_t shared =
      sizeof(BlockItems) + kLongParts * sizeof(int) + (kPoolThreads + groups * kRows<T> * kQueries) * sizeof(float);
  const int status = launch(stream, a->blocks, 1, kPoolThreads, shared, pool_backward<T>, job);
  if (status || a->blocks == 1) return status;
  return launch(stream, a->blocks, 1, kPoolThreads, sizeof(BlockItems) + kPoolThreads * sizeof(float), cut_logits<T>,
                job);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_segment_pool_backward(const sne_fast_cuda_pool *a, void *stream) {
  if (!sne::pool_fits(a)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return sne::with_storage(int(a->precision),
                           [&](auto value) { return sne::run_backward<decltype(value)>(a, (sne::Stream)stream); });
}
