// Gradient of q of set_attention and, for each query, the mean of its weights' gradient, which key_grad.cu reads.
#include "cuda/set_attention/tiles.h"

namespace sne::set_attention {
namespace {

template <class Op, int D>
SNE_KERNEL SNE_BOUNDS(kThreads, (kBackwardBlocks<Op, D>)) query_grad_kernel(Call call) {
  using T = typename Op::Storage;
  constexpr int kStride = Inner<Op, D>::kStride, kGroups = D < 64 && Op::kPacked ? 2 : 1;
  const Team team(call);
  const WorkItem item = find_work_item(call, team, call.q_ptr, call.k_ptr);
  if (item.none) return;
  Tiles<Op, D> tiles(call, team, item, call.k, call.v);
  int64_t left = item.end - item.begin;  // inner rows
  if (left > 0) tiles.start(0, left);

  const int64_t own = 16 * team.warp, count = item.row_end - item.row - own;
  const bool busy = count > 0;
  Own<Op, D> q, grad;
  QueryGradSums<Op, D> s{};
  if (busy) {
    const int64_t from = (item.row + own) * call.width + item.head * D;
    const int rows = count < 16 ? int(count) : 16;
    Own<Op, D> out;
    q.load((const T *)call.q + from, call.width, rows);
    grad.load((const T *)call.grad + from, call.width, rows);
    out.load((const T *)call.out + from, call.width, rows);
    row_products(s.guess, grad, out);
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = lane_id() / 4 + 8 * half;
      const int64_t at = (item.row + own + (row < rows ? row : rows - 1)) * call.heads + item.head;
      s.lse[half] = base2_shift(call.lse[at]);
    }
  }
  const float scale = call.scale * kLog2e;

  int stage = 0;
  for (; left > 0; left -= tiles.rows, stage ^= 1) {
    copies_done();
    team.sync();
    if (left > tiles.rows) tiles.start(stage ^ 1, left - tiles.rows);
    if (!busy) continue;
    const T *keys = tiles.tile(stage, 0), *values = tiles.tile(stage, 1);
    int here = tiles.count(left);
    for (; here >= 16 * kGroups; here -= 16 * kGroups, keys += 16 * kGroups * kStride, values += 16 * kGroups * kStride)
      add_keys<Op, D, kStride, kGroups>(s, q, grad, keys, values, AllSeen{}, scale);
    for (; here > 0; here -= 16, keys += 16 * kStride, values += 16 * kStride)
      add_keys<Op, D, kStride, 1>(s, q, grad, keys, values, FirstSeen<Op>{here}, scale);
  }
  if (!busy) return;

  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float lack = sum_over_quad(s.lack[half]);
    const int row = lane_id() / 4 + 8 * half;
    const bool writes = lane_id() % 4 == 0 && row < count;
    if constexpr (kCorrected<Op>) {
      if (item.partial) {
        if (writes) call.partial_rows[(item.place + own + row) * call.heads + item.head] = lack;
      } else {
        SNE_UNROLL
        for (int n = 0; n < D / 8; ++n) {
          SNE_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) s.grad[n].c[i] -= lack * s.key[n].c[i];
        }
      }
    }
    // Where results are partial, combine.cu adds what the guess lacks.
    if (writes && item.first)
      call.mean[(item.row + own + row) * call.heads + item.head] = s.guess[half] + (item.partial ? 0.0f : lack);
  }
  const int64_t to = (item.place + own) * call.width + item.head * D;
  if (!item.partial) {
    store_rows((T *)call.grad_q + to, call.width, count, s.grad, call.scale, call.scale);
  } else {
    store_rows(call.partial + to, call.width, count, s.grad, 1.0f, 1.0f);
    if constexpr (kCorrected<Op>) store_rows(call.partial_second + to, call.width, count, s.key, 1.0f, 1.0f);
  }
}

}  // namespace
}  // namespace sne::set_attention

extern "C" int sne_fast_cuda_set_attention_query_grad(const sne_fast_cuda_set_attention_args *args, void *stream) {
  using namespace sne;
  using namespace sne::set_attention;
  return run(args, Stream(stream), combine_query_grad, [&](auto op, auto d, const Call &call) {
    using Op = decltype(op);
    constexpr int D = decltype(d)::value;
    return launch(Stream(stream), blocks_of(call), 1, kThreads, Inner<Op, D>::kShared, query_grad_kernel<Op, D>, call);
  });
}
