// Results of sets whose inner rows are split between several work items: partial results added up in order.
//
// A thread block takes split_rows inner rows between two cuts (work_items.h) and finds the set that starts among them
// and has several splits. There is at most one, and it holds the last of these rows. A thread computes one value.
#include "cuda/set_attention/work_items.h"
#include "cuda/tiles/warp_search.h"

namespace sne::set_attention {
namespace {

struct Value {
  bool none;
  int64_t row;            // of the result
  int64_t at, rows_at;    // place in a partial result, of the value and of the number of its row
  int64_t begin, pieces;  // first inner row of the set, and number of its splits
  bool first_of_head;
};

SNE_DEVICE Value find_value(const Call &call, const int64_t *own_ptr, const int64_t *inner_ptr, int64_t columns) {
  Value v{};
  const int64_t cut = block_id(0), last = ((cut + 1) << call.split_bits) - 1;
  const int64_t set = last_at_most(call.sets, last, [=](int64_t s) { return inner_ptr[s]; });
  v.begin = inner_ptr[set];
  const int64_t end = inner_ptr[set + 1];
  const int64_t element = block_id(1) * kThreads + thread_id(), local = element / columns, column = element % columns;
  v.row = own_ptr[set] + local;
  const bool whole = end <= last || v.begin >> call.split_bits != cut || end - v.begin <= call.split_rows;
  v.none = whole || v.row >= own_ptr[set + 1];
  const int64_t d = call.width / call.heads;
  v.at = element;
  v.rows_at = local * call.heads + column / d;
  v.first_of_head = column % d == 0;
  v.pieces = (end - v.begin + call.split_rows - 1) >> call.split_bits;
  return v;
}

template <class T>
SNE_KERNEL combine_forward_kernel(Call call) {
  const Value v = find_value(call, call.q_ptr, call.k_ptr, call.width);
  if (v.none) return;
  float top = -INFINITY;
  for (int64_t i = 0; i < v.pieces; ++i)
    top = max_of(top, call.partial_rows[partial_place(call, v.begin, i) * call.heads + v.rows_at]);
  const float shift = top == -INFINITY ? 0.0f : top;
  float sum = 0, total = 0;
  for (int64_t i = 0; i < v.pieces; ++i) {
    const int64_t place = partial_place(call, v.begin, i);
    const float weight = exp2_fast((call.partial_rows[place * call.heads + v.rows_at] - shift) * kLog2e);
    sum += weight;
    total += weight * call.partial[place * call.width + v.at];
  }
  const bool saw_nothing = top == -INFINITY && sum == 0;
  ((T *)call.out)[v.row * call.width + v.at % call.width] =
      from_float<T>(saw_nothing ? 0.0f : divide_exactly(total, sum));
  if (v.first_of_head)
    call.lse[v.row * call.heads + v.rows_at % call.heads] = saw_nothing ? -INFINITY : top + log2_fast(sum) * kLn2;
}

template <class T>
SNE_KERNEL combine_query_grad_kernel(Call call) {
  const Value v = find_value(call, call.q_ptr, call.k_ptr, call.width);
  if (v.none) return;
  float grad = 0, key = 0, lack = 0;
  for (int64_t i = 0; i < v.pieces; ++i) {
    const int64_t place = partial_place(call, v.begin, i);
    grad += call.partial[place * call.width + v.at];
    if (!call.partial_second) continue;
    key += call.partial_second[place * call.width + v.at];
    lack += call.partial_rows[place * call.heads + v.rows_at];
  }
  ((T *)call.grad_q)[v.row * call.width + v.at % call.width] = from_float<T>((grad - lack * key) * call.scale);
  if (v.first_of_head) call.mean[v.row * call.heads + v.rows_at % call.heads] += lack;
}

template <class T>
SNE_KERNEL combine_key_grad_kernel(Call call) {
  const Value v = find_value(call, call.k_ptr, call.q_ptr, call.width);
  if (v.none) return;
  float grad_k = 0, grad_v = 0;
  for (int64_t i = 0; i < v.pieces; ++i) {
    const int64_t at = partial_place(call, v.begin, i) * call.width + v.at;
    grad_k += call.partial[at];
    grad_v += call.partial_second[at];
  }
  const int64_t to = v.row * call.width + v.at % call.width;
  ((T *)call.grad_k)[to] = from_float<T>(grad_k);
  ((T *)call.grad_v)[to] = from_float<T>(grad_v);
}

int run(const Call &call, Stream stream, void (*of_float)(Call), void (*of_half)(Call), void (*of_bfloat)(Call)) {
  const auto kernel = call.precision == SNE_FAST_PRECISION_HALF     ? of_half
                      : call.precision == SNE_FAST_PRECISION_BFLOAT ? of_bfloat
                                                                    : of_float;
  const int64_t values = call.max_own_rows * call.width;
  return launch(stream, call.aligned_splits, (values + kThreads - 1) / kThreads, kThreads, 0, kernel, call);
}

}  // namespace

int combine_forward(const Call &call, Stream stream) {
  return run(call, stream, combine_forward_kernel<float>, combine_forward_kernel<Half>, combine_forward_kernel<BFloat>);
}
int combine_query_grad(const Call &call, Stream stream) {
  return run(call, stream, combine_query_grad_kernel<float>, combine_query_grad_kernel<Half>,
             combine_query_grad_kernel<BFloat>);
}
int combine_key_grad(const Call &call, Stream stream) {
  return run(call, stream, combine_key_grad_kernel<float>, combine_key_grad_kernel<Half>,
             combine_key_grad_kernel<BFloat>);
}

}  // namespace sne::set_attention
