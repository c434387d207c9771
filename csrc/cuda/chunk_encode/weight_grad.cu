// Gradients of a block's matrices and biases: products over rows of the factors that its backward has stored.
//
// A thread block owns a square of one matrix (fc_q, fc_k, fc_v, fc_o) and some of the rows, which it takes 32 at a
// time.
#include "cuda/chunk_encode/backward.h"
#include "cuda/ptx/vectors.h"

namespace sne {
namespace {

constexpr int kRowsAtOnce = 32;

template <class Op, int tile>
struct GradTile {
  using T = typename Op::Storage;
  // The stride keeps the lanes of a fragment in different banks.
  static constexpr int kStride = tile + (Op::kPacked ? 8 : 4), kBytes = kRowsAtOnce * kStride * int(sizeof(T));
  // 4 warps, 2 x 2, each with M pieces of 16 by N of 8.
  static constexpr int M = tile / 32, N = tile / 16;

  // Loads the next rows, all of them or `left`; the others are zeros.
  template <bool all>
  static SNE_MEMBER void load(T *to, const T *from, int64_t width, int64_t left) {
    constexpr int kPerRow = tile * int(sizeof(T)) / 16;
    for (int i = thread_id(); i < kRowsAtOnce * kPerRow; i += num_threads()) {
      const int row = i / kPerRow, part = i % kPerRow * (16 / int(sizeof(T)));
      if (all || row < left)
        copy_async(to + row * kStride + part, from + row * width + part);
      else
        store_words(to + row * kStride + part, Words{});
    }
  }
  // Loads columns m.. of rows k.. as the left operand of a product over rows.
  static SNE_MEMBER Rows16<Op> left(const T *at, int k, int m) {
    Rows16<Op> out;
    const int lane = lane_id();
    if constexpr (Op::kPacked) {
      load_matrices_transposed<4>(out.r, at + (k + lane % 8 + lane / 16 * 8) * kStride + m + lane / 8 % 2 * 8);
    } else {
      SNE_UNROLL
      for (int i = 0; i < 8; ++i)
        out.r[i] = operand_value<Op>(
            at[(k + 8 * (i / 4) + 2 * (lane % 4) + i % 2) * kStride + m + lane / 4 + 8 * (i / 2 % 2)]);
    }
    return out;
  }
  // Loads columns n.. of rows k.. as the right operand.
  static SNE_MEMBER Cols8<Op> right(const T *at, int k, int n) {
    Cols8<Op> out;
    const int lane = lane_id();
    if constexpr (Op::kPacked) {
      load_matrices_transposed<2>(out.r, at + (k + lane % 16) * kStride + n);
    } else {
      SNE_UNROLL
      for (int i = 0; i < 4; ++i)
        out.r[i] = operand_value<Op>(at[(k + 8 * (i / 2) + 2 * (lane % 4) + i % 2) * kStride + n + lane / 4]);
    }
    return out;
  }
};

// block_id(1) counts the squares of all matrices from `first` on.
template <class Op, int tile>
SNE_KERNEL SNE_BOUNDS(128, 4)
    chunk_weight_grad(const typename Op::Storage *saved, const typename Op::Storage *products, int64_t rows, int width,
                      int first, float *w_qkv_part, float *b_qkv_part, float *w_o_part, float *b_o_part) {
  using G = GradTile<Op, tile>;
  using T = typename Op::Storage;
  const int per_side = width / tile, which = first + int(block_id(1)) / (per_side * per_side);
  const int row_of = int(block_id(1)) / per_side % per_side * tile, column_of = int(block_id(1)) % per_side * tile;
  const int64_t plane = rows * width, square = int64_t(width) * width;
  T *grads = (T *)shared_memory(), *inputs = grads + G::kBytes / int(sizeof(T));
  const T *from_grads = products + which * plane + row_of;
  const T *from_inputs = (which == 3 ? products + 4 * plane : saved) + column_of;
  const int m = warp_id() / 2 * (tile / 2), n = warp_id() % 2 * (tile / 2);
  Tile sum[G::M][G::N] = {};
  float bias = 0;
  int64_t row = block_id() * kRowsAtOnce;
  const auto add = [&](auto all) {
    constexpr bool kAll = decltype(all)::value;
    G::template load<kAll>(grads, from_grads + row * width, width, rows - row);
    G::template load<kAll>(inputs, from_inputs + row * width, width, rows - row);
    copies_done();
    sync_block();
    if (column_of == 0 && thread_id() < tile)
      for (int i = 0; i < kRowsAtOnce; ++i) bias += to_real(grads[i * G::kStride + thread_id()]);
    SNE_UNROLL
    for (int k = 0; k < kRowsAtOnce; k += 16) {
      Rows16<Op> a[G::M];
      SNE_UNROLL
      for (int i = 0; i < G::M; ++i) a[i] = G::left(grads, k, m + 16 * i);
      SNE_UNROLL
      for (int j = 0; j < G::N; ++j) {
        const Cols8<Op> b = G::right(inputs, k, n + 8 * j);
        SNE_UNROLL
        for (int i = 0; i < G::M; ++i) product(sum[i][j], a[i], b);
      }
    }
    sync_block();
  };
  for (; row + kRowsAtOnce <= rows; row += num_blocks() * kRowsAtOnce) add(std::true_type{});
  if (row < rows) add(std::false_type{});
  float *w = which == 3 ? w_o_part + block_id() * square : w_qkv_part + (block_id() * 3 + which) * square;
  float *b = which == 3 ? b_o_part + block_id() * width : b_qkv_part + (block_id() * 3 + which) * width;
  SNE_UNROLL
  for (int i = 0; i < G::M; ++i) {
    SNE_UNROLL
    for (int j = 0; j < G::N; ++j) {
      float *at = w + int64_t(row_of + m + 16 * i) * width + column_of + n + 8 * j;
      Tile total = load_tile(at, width);
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) total.c[e] += sum[i][j].c[e];
      store_tile(at, width, total);
    }
  }
  if (column_of == 0 && thread_id() < tile) b[row_of + thread_id()] += bias;
}

template <class Op, int tile>
int run(const sne_fast_cuda_chunk_weight_grad_args &a, Stream stream) {
  using T = typename Op::Storage;
  const int64_t first = a.block ? 0 : 3, per_side = a.hidden / tile, pieces = (a.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const T *saved = (const T *)a.saved + (a.block ? a.block - 1 : 0) * a.rows * a.hidden;
  return launch(stream, pieces < a.multiprocessors ? pieces : a.multiprocessors, (4 - first) * per_side * per_side, 128,
                2 * GradTile<Op, tile>::kBytes, chunk_weight_grad<Op, tile>, saved, (const T *)a.products, a.rows,
                int(a.hidden), int(first), (float *)a.w_qkv_part, (float *)a.b_qkv_part, (float *)a.w_o_part,
                (float *)a.b_o_part);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_chunk_weight_grad(int precision, const sne_fast_cuda_chunk_weight_grad_args *a,
                                               void *stream) {
  using namespace sne;
  if (a->block < 0 || a->block > 3 || a->rows < 0 || a->hidden % 32 || a->multiprocessors < 1)
    return SNE_FAST_CUDA_BAD_ARGUMENT;
  return with_operands(precision, [&](auto op) {
    using Op = decltype(op);
    return a->hidden % 64 ? run<Op, 32>(*a, (Stream)stream) : run<Op, 64>(*a, (Stream)stream);
  });
}
