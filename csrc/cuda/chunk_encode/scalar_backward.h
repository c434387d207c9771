// Backward of block 0 of chunk_encode (docs/method.md 4.1): from the gradient of its rows to that of the values.
#pragma once

#include "cuda/chunk_encode/backward.h"

namespace sne {
namespace {

// Numbers of a row and head that its keys read, stored behind the means.
enum Record { kSlope, kExtreme, kInverse, kMean, kGrad, kRecords };

// The number of heads is a run-time number here, at most a head for every 8 columns.
template <class Op, int width>
using ScalarShape = ChunkShape<Op, width, 8, 1>;
template <class Op, int width>
using ScalarMemory = WarpMemory<Op, ScalarShape<Op, width>, 0, 1 + kRecords>;
template <int width>
constexpr int kScalarSums = 4 * width + 3 * width + 2 * (width / 8);  // of a warp: norms, basis, logits

template <class Op, int width>
struct Records {
  float *at;
  int heads;
  SNE_MEMBER Records(const ScalarMemory<Op, width> &memory, int warp, int num_heads)
      : at(memory.head_values + warp * (ScalarMemory<Op, width>::kHeadBytes / 4) + 16 * num_heads), heads(num_heads) {}
  SNE_MEMBER float &operator()(int field, int head, int row) const { return at[(field * heads + head) * 16 + row]; }
};

// Computes the softmax of each row and head: the means of scalar_means, and the records except the gradient.
template <class Op, int width, class T>
SNE_DEVICE void record_rows(const ScalarMemory<Op, width> &memory, const SetOfWarps &set, const T *logit, int heads) {
  const Records<Op, width> record(memory, 0, heads);
  scalar_means<ScalarShape<Op, width>>(memory, set, logit, heads,
                                       [&](int head, int row, float slope, float extreme, float total, float mean) {
                                         record(kSlope, head, row) = slope;
                                         record(kExtreme, head, row) = extreme;
                                         record(kInverse, head, row) = 1.0f / total;
                                         record(kMean, head, row) = mean;
                                       });
}

// Returns the gradient of a row's value through the attention of all heads, as query and as key, and adds to the sums
// of the logits' gradients (2, H).
template <class Op, int width, class T>
SNE_DEVICE float attention_grad(const ScalarMemory<Op, width> &memory, const SetOfWarps &set, const T *logit, int heads,
                                float *logit_sums) {
  const int row = lane_id() % 16, own = set.part * 16 + row;
  const Slot slot = memory.slots[row];
  const float *values = memory.values - set.part * 16;
  const float x = values[own];
  float grad = 0;
  for (int pair = 0; pair < heads; pair += 2) {
    const int head = pair + lane_id() / 16;
    float of_slope = 0;
    if (head < heads) {
      const Records<Op, width> mine(memory, 0, heads);
      const float slope = mine(kSlope, head, row), extreme = mine(kExtreme, head, row);
      const float mean = mine(kMean, head, row);
      float variance = 0;
      for (int j = slot.key_begin; j < slot.key_end; ++j) {
        const float p = exp2_fast(slope * (values[j] - extreme) * kLog2e), off = values[j] - mean;
        variance += p * off * off;
      }
      of_slope = mine(kGrad, head, row) * variance * mine(kInverse, head, row);
      grad += of_slope * to_real(logit[head]);
      for (int i = slot.key_begin; i < slot.key_end; ++i) {
        const Records<Op, width> theirs(memory, i / 16 - set.part, heads);
        const int query = i % 16;
        const float p = exp2_fast(theirs(kSlope, head, query) * (x - theirs(kExtreme, head, query)) * kLog2e);
        grad += p * theirs(kInverse, head, query) * theirs(kGrad, head, query) *
                (1 + (x - theirs(kMean, head, query)) * theirs(kSlope, head, query));
      }
    }
    float by_slope = of_slope * x, by_offset = of_slope;
    SNE_UNROLL
    for (int mask = 8; mask; mask /= 2)
      by_slope += shuffle_xor(by_slope, mask), by_offset += shuffle_xor(by_offset, mask);
    if (row == 0 && head < heads) logit_sums[head] += by_slope, logit_sums[heads + head] += by_offset;
  }
  return grad + shuffle_xor(grad, 16);
}

template <class Op, int width, int kThreads>
SNE_KERNEL SNE_BOUNDS(kThreads, 1)
    chunk_scalar_backward(ChunkCall<typename Op::Storage> call, ChunkSpace space, int heads, bool resident,
                          bool layer_norm, typename Op::Storage *values_grad, float *logit_part, float *basis_part,
                          float *norm_part) {
  using T = typename Op::Storage;
  using Shape = ScalarShape<Op, width>;
  using Memory = ScalarMemory<Op, width>;
  constexpr int W = width, NT = Shape::NT;
  constexpr int64_t kSquare = int64_t(W) * W;
  const WeightLayout layout(W, W / heads);
  const VectorLayout at{W};
  const int g = lane_id() / 4, t = lane_id() % 4;
  unsigned char *memory_at = (unsigned char *)shared_memory();
  float *vectors = (float *)memory_at;
  memory_at += at.size() * 4;
  float *norm_sums = (float *)memory_at, *basis_sums = norm_sums + num_warps() * 4 * W;
  float *logit_sums = basis_sums + num_warps() * 3 * W;
  memory_at += num_warps() * kScalarSums<W> * 4;
  const Memory memory(memory_at, num_warps(), warp_id());
  memory_at += num_warps() * Memory::kBytes;
  const WeightSource<Op> out{call.prepared, memory_at, resident, layout.out(0)};
  const WeightSource<Op> transposed{call.prepared, resident ? memory_at + kSquare * sizeof(T) : memory_at, resident,
                                    layout.out_transposed(0)};
  load_vectors(vectors, W, call.basis, call.b_o, layer_norm ? call.norm : nullptr, call.b_qkv);
  clear(norm_sums, num_warps() * kScalarSums<W>);
  if (resident) {
    out.copy(layout.out(0), kSquare);
    transposed.copy(layout.out_transposed(0), kSquare);
  }
  sync_block();

  const SetOfWarps set = set_of_warps(call.cls, Shape::ROWS);
  const int64_t per_step = num_warps() / set.warps, rows = call.count * call.cls.slots;
  for (int64_t step = block_id(); step * per_step < call.count; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / set.warps;
    const bool there = local < call.count;
    load_bin<Shape>(memory, call, set, local);
    record_rows<Op, width>(memory, set, call.logit, heads);
    const int64_t row = local * call.cls.slots + set.part * Shape::ROWS;
    Tile o[1][NT], grad[1][NT];
    scalar_rows<Shape>(o, memory, vectors, heads);
    load_grad(grad[0], space, there, row);
    const ProductRows<T> products = product_rows<T>(space, there, row, rows, W);
    feed_forward_backward<Op, Shape>(grad, o, out, layout.out(0), transposed, layout.out_transposed(0),
                                     vectors + at.out_bias(0), norm_sums + warp_id() * 4 * W, layer_norm,
                                     saving<Op, Shape>(products));

    // o = x basis_0 + mean basis_1 + basis_2.
    const float x[2] = {memory.values[g], memory.values[g + 8]};
    float *sums = basis_sums + warp_id() * 3 * W;
    add_columns_of(sums + 2 * W, grad[0]);
    float by_value[2 * NT], by_mean[2 * NT], of_value[2] = {0, 0}, of_mean[2] = {0, 0};
    const Records<Op, width> record(memory, 0, heads);
    SNE_UNROLL
    for (int j = 0; j < NT; ++j) {
      const int head = 8 * j * heads / W;
      SNE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + 2 * t + e;
        const float upper = grad[0][j].c[e], lower = grad[0][j].c[2 + e];
        by_value[2 * j + e] = upper * x[0] + lower * x[1];
        by_mean[2 * j + e] =
            upper * memory.head_values[g * heads + head] + lower * memory.head_values[(g + 8) * heads + head];
        of_value[0] += upper * vectors[column], of_value[1] += lower * vectors[column];
        of_mean[0] += upper * vectors[W + column], of_mean[1] += lower * vectors[W + column];
      }
      if ((8 * j + 8) * heads / W != head) {  // the last columns of the head
        SNE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float sum = sum_over_quad(of_mean[r]);
          if (t == 0) record(kGrad, head, g + 8 * r) = sum;
          of_mean[r] = 0;
        }
      }
    }
    add_columns(sums, by_value);
    add_columns(sums + W, by_mean);
    float *direct = (float *)memory.exchange;  // (16): gradient of x beside the attention
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_over_quad(of_value[r]);
      if (t == 0) direct[g + 8 * r] = sum;
    }
    set.sync();
    const float through = attention_grad<Op, width>(memory, set, call.logit, heads, logit_sums + warp_id() * 2 * heads);
    if (lane_id() < 16) {
      const Slot slot = memory.slots[lane_id()];
      if (slot.chunk >= 0)
        values_grad[call.chunk_ptr[slot.chunk] + slot.element] = from_float<T>(direct[lane_id()] + through);
    }
    set.sync();
  }
  add_warp_sums(basis_part + block_id() * 3 * W, basis_sums, 3 * W);
  add_warp_sums(logit_part + block_id() * 2 * heads, logit_sums, 2 * heads);
  if (layer_norm) add_warp_sums(norm_part + block_id() * 4 * W, norm_sums, 4 * W);
}

template <class Op, int width>
int run_scalar_backward(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space,
                        const sne_fast_cuda_chunk_scalar_grads &g, Stream stream) {
  using T = typename Op::Storage;
  constexpr int kMaxWarps = 8;
  constexpr int64_t kSize = sizeof(T), kPiece = width * ScalarShape<Op, width>::kOutRows * kSize;
  const LaunchSize size = launch_size(a.shared_limit, VectorLayout{width}.size() * 4,
                                      ScalarMemory<Op, width>::kBytes + kScalarSums<width> * 4,
                                      2 * kSize * width * width, kPiece, int(a.slots / 16), kMaxWarps, 8);
  if (!size.warps) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count * (a.slots / 16) + size.warps - 1) / size.warps;
  return launch(stream, tiles < a.multiprocessors ? tiles : a.multiprocessors, 1, 32 * size.warps, size.shared,
                chunk_scalar_backward<Op, width, 32 * kMaxWarps>, call_of<T>(a), space, int(a.heads), size.resident,
                bool(a.layer_norm), (T *)g.values, (float *)g.logit_part, (float *)g.basis_part, (float *)g.norm_part);
}

}  // namespace
}  // namespace sne
