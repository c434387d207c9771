// set_attention: softmax(q k^T / sqrt(h)) v of each head inside each set, and the logarithms of the softmax's sums.
#include "cuda/set_attention/tiles.h"

namespace sne::set_attention {
namespace {

// Running softmax of rows g and g + 8, in base 2. The largest logit is subtracted before scaling: a compiler contracts
// `logit * scale - top` to one rounding while `top` was rounded before, which is far off where logits are large.
template <int D>
struct Softmax {
  float top[2];  // largest logit so far, before scaling; -inf before the first
  float sum[2];  // sum of weights exp2((logit - top) scale) over this lane's columns
  Tile out[D / 8];

  SNE_MEMBER float shift(int half) const { return top[half] == -INFINITY ? 0.0f : top[half]; }
};

// Adds 16 * groups keys to the running softmax. With `masked` only the first `left` of them exist.
template <class Op, int D, int groups, bool masked>
SNE_DEVICE void attend(Softmax<D> &s, Own<Op, D> &q, const typename Op::Storage *keys,
                       const typename Op::Storage *values, int left, float scale) {
  constexpr int kStride = Inner<Op, D>::kStride;
  q.keep();
  Tile p[2 * groups] = {};
  SNE_UNROLL
  for (int i = 0; i < groups; ++i) multiply_transposed<Op, D>(p + 2 * i, q.a, keys + 16 * i * kStride);
  if constexpr (masked) {
    SNE_UNROLL
    for (int n = 0; n < 2 * groups; ++n) {
      SNE_UNROLL
      for (int i = 0; i < 4; ++i)
        if (8 * n + inner_row<Op>(i % 2) >= left) p[n].c[i] = -INFINITY;
    }
  }

  float higher[2];
  SNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float highest = max_of(p[0].c[2 * half], p[0].c[2 * half + 1]);
    SNE_UNROLL
    for (int n = 1; n < 2 * groups; ++n) highest = max_of(highest, max_of(p[n].c[2 * half], p[n].c[2 * half + 1]));
    higher[half] = max_of(s.top[half], max_over_quad(highest));
  }
  if (ballot(higher[0] > s.top[0] || higher[1] > s.top[1])) {
    SNE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float before = s.top[half];
      s.top[half] = higher[half];
      const float decay = exp2_fast((before - s.shift(half)) * scale);
      s.sum[half] *= decay;
      SNE_UNROLL
      for (int n = 0; n < D / 8; ++n) s.out[n].c[2 * half] *= decay, s.out[n].c[2 * half + 1] *= decay;
    }
  }
  const float shift[2] = {s.shift(0), s.shift(1)};
  SNE_UNROLL
  for (int n = 0; n < 2 * groups; ++n) {
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      p[n].c[i] = exp2_fast((p[n].c[i] - shift[i / 2]) * scale);
      s.sum[i / 2] += p[n].c[i];
    }
  }
  SNE_UNROLL
  for (int i = 0; i < groups; ++i)
    multiply<Op, D>(s.out, rows16<Op>(p[2 * i], p[2 * i + 1]), values + 16 * i * kStride);
}

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
      attend<Op, D, 2, false>(s, q, keys, values, here, scale);
    for (; here > 0; here -= 16, keys += 16 * kStride, values += 16 * kStride)
      attend<Op, D, 1, true>(s, q, keys, values, here, scale);
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
