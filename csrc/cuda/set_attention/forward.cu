// set_attention: softmax(q k^T / sqrt(h)) v of each head inside each set, and the logarithms of the softmax's sums.
#include "cuda/set_attention/tiles.h"

namespace sne::set_attention {
namespace {

// Thread blocks that a multiprocessor has registers for; the compiler alone would use a few registers more.
template <class Op, int D>
constexpr int kBlocks = Op::kPacked && D == 8    ? 7
                        : Op::kPacked && D == 16 ? 6
                                                 : 1;

template <class Op, int D>
SNE_KERNEL SNE_BOUNDS(kThreads, (kBlocks<Op, D>)) forward_kernel(Call call) {
  using T = typename Op::Storage;
  constexpr int kStride = Inner<Op, D>::kStride;
  const Team team(call);
  const WorkItem item = find_work_item(call, team, call.q_ptr, call.k_ptr);
  if (item.none) return;
  Tiles<Op, D> tiles(call, team, item, call.k, call.v);
  int64_t left = item.end - item.begin;  // inner rows
  if (left > 0) tiles.start(0, left);

  const int64_t own = 16 * team.warp, count = item.row_end - item.row - own;
  const bool busy = count > 0;  // a warp without own rows helps to load
  Own<Op, D> q;
  if (busy) {
    const int64_t from = (item.row + own) * call.width + item.head * D;
    q.load((const T *)call.q + from, call.width, count < 16 ? int(count) : 16);
  }
  Softmax<D> s{{-INFINITY, -INFINITY}, {}, {}};
  const float scale = call.scale * kLog2e;

  int stage = 0;
  for (; left > 0; left -= tiles.rows, stage ^= 1) {
    copies_done();
    team.sync();
    if (left > tiles.rows) tiles.start(stage ^ 1, left - tiles.rows);
    if (!busy) continue;
    const T *keys = tiles.tile(stage, 0), *values = tiles.tile(stage, 1);
    int here = tiles.count(left);
    for (; here >= 32; here -= 32, keys += 32 * kStride, values += 32 * kStride)
      attend<Op, D, kStride, 2>(s, q, keys, values, AllSeen{}, scale);
    for (; here > 0; here -= 16, keys += 16 * kStride, values += 16 * kStride)
      attend<Op, D, kStride, 1>(s, q, keys, values, FirstSeen<Op>{here}, scale);
  }
  if (!busy) return;

  float factor[2];
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_over_quad(s.sum[half]);
    const bool saw_nothing = s.top[half] == -INFINITY && sum == 0;
    factor[half] = saw_nothing ? 1.0f : divide_exactly(1.0f, sum);
    const int row = lane_id() / 4 + 8 * half;
    float *lse = item.partial ? call.partial_rows : call.lse;
    if (lane_id() % 4 == 0 && row < count)
      lse[(item.place + own + row) * call.heads + item.head] =
          saw_nothing ? -INFINITY : s.top[half] * call.scale + log2_fast(sum) * kLn2;
  }
  const int64_t to = (item.place + own) * call.width + item.head * D;
  if (item.partial)
    store_rows(call.partial + to, call.width, count, s.out, factor[0], factor[1]);
  else
    store_rows((T *)call.out + to, call.width, count, s.out, factor[0], factor[1]);
}

}  // namespace
}  // namespace sne::set_attention

extern "C" int sne_fast_cuda_set_attention(const sne_fast_cuda_set_attention_args *args, void *stream) {
  using namespace sne;
  using namespace sne::set_attention;
  return run(args, Stream(stream), combine_forward, [&](auto op, auto d, const Call &call) {
    using Op = decltype(op);
    constexpr int D = decltype(d)::value;
    return launch(Stream(stream), blocks_of(call), 1, kThreads, Inner<Op, D>::kShared, forward_kernel<Op, D>, call);
  });
}
