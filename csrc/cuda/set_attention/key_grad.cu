// Gradients of k and v of set_attention. Keys are the own rows, so weights are transposed, (keys, queries), as the
// products over queries need them.
#include "cuda/set_attention/tiles.h"

namespace sne::set_attention {
namespace {

// The numbers of queries stand behind the tiles.
template <class Op, int D>
constexpr size_t kShared = Inner<Op, D>::kShared + kBlockWarps * 2 * Inner<Op, D>::kRows * sizeof(QueryNumbers);

template <class Op, int D>
SNE_KERNEL SNE_BOUNDS(kThreads, (kBackwardBlocks<Op, D>)) key_grad_kernel(Call call) {
  using T = typename Op::Storage;
  using In = Inner<Op, D>;
  constexpr int kStride = In::kStride, kGroups = D < 64 && Op::kPacked ? 2 : 1;
  const Team team(call);
  const WorkItem item = find_work_item(call, team, call.k_ptr, call.q_ptr);
  if (item.none) return;
  Tiles<Op, D> tiles(call, team, item, call.q, call.grad);
  QueryNumbers *numbers = (QueryNumbers *)((unsigned char *)shared_memory() + In::kShared) +
                          team.index * team.warps * 2 * In::kRows;  // two tiles, one behind the other
  // A thread loads the numbers of one query of the next tile into registers: a tile has no more queries than the team
  // has threads. Where there is no query, weights are exp2(0 - infinity) = 0.
  QueryNumbers mine;
  int64_t next = (item.begin + team.thread()) * call.heads + item.head;
  const auto start = [&](int stage, int64_t left) {
    tiles.start(stage, left);
    mine = {INFINITY, 0.0f};
    if (team.thread() < tiles.count(left)) mine = {base2_shift(call.lse[next]), call.mean[next]};
    next += tiles.rows * call.heads;
  };
  int64_t left = item.end - item.begin;  // inner rows
  if (left > 0) start(0, left);

  const int64_t own = 16 * team.warp, count = item.row_end - item.row - own;
  const bool busy = count > 0;
  Own<Op, D> k, v;
  if (busy) {
    const int64_t from = (item.row + own) * call.width + item.head * D;
    const int rows = count < 16 ? int(count) : 16;
    k.load((const T *)call.k + from, call.width, rows);
    v.load((const T *)call.v + from, call.width, rows);
  }
  Tile grad_k[D / 8] = {}, grad_v[D / 8] = {};
  const float scale = call.scale * kLog2e;

  int stage = 0;
  for (; left > 0; left -= tiles.rows, stage ^= 1) {
    if (team.thread() < tiles.rows) numbers[stage * tiles.rows + team.thread()] = mine;
    copies_done();
    team.sync();
    if (left > tiles.rows) start(stage ^ 1, left - tiles.rows);
    if (!busy) continue;
    const T *queries = tiles.tile(stage, 0), *grads = tiles.tile(stage, 1);
    const QueryNumbers *of = numbers + stage * tiles.rows;
    int here = tiles.count(left);
    constexpr int kStep = 16 * kGroups;
    for (; here > 16 * (kGroups - 1); here -= kStep, queries += kStep * kStride, grads += kStep * kStride, of += kStep)
      add_queries<Op, D, kStride, kGroups>(grad_k, grad_v, k, v, queries, grads, of, AllSeen{}, scale);
    if (kGroups > 1 && here > 0)
      add_queries<Op, D, kStride, 1>(grad_k, grad_v, k, v, queries, grads, of, AllSeen{}, scale);
  }
  if (!busy) return;

  const int64_t to = (item.place + own) * call.width + item.head * D;
  if (item.partial) {
    store_rows(call.partial + to, call.width, count, grad_k, call.scale, call.scale);
    store_rows(call.partial_second + to, call.width, count, grad_v, 1.0f, 1.0f);
  } else {
    store_rows((T *)call.grad_k + to, call.width, count, grad_k, call.scale, call.scale);
    store_rows((T *)call.grad_v + to, call.width, count, grad_v, 1.0f, 1.0f);
  }
}

}  // namespace
}  // namespace sne::set_attention

extern "C" int sne_fast_cuda_set_attention_key_grad(const sne_fast_cuda_set_attention_args *args, void *stream) {
  using namespace sne;
  using namespace sne::set_attention;
  return run(args, Stream(stream), combine_key_grad, [&](auto op, auto d, const Call &call) {
    using Op = decltype(op);
    constexpr int D = decltype(d)::value;
    return launch(Stream(stream), blocks_of(call), 1, kThreads, kShared<Op, D>, key_grad_kernel<Op, D>, call);
  });
}
