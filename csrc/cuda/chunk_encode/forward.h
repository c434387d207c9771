// The forward kernel of chunk_encode: a warp or a few warps take a bin of slots from its values to its pooled rows or,
// for the backward, to the inputs of blocks 1 to 3 and of the pool.
#pragma once

#include "cuda/chunk_encode/full_bins.h"

namespace sne {

// Adds the codes of each row's tensor and element to x, after rounding x to the operand type.
template <class Op, class Shape>
SNE_DEVICE void add_codes(Tile (&o)[Shape::MT][Shape::NT], const WarpMemory<Op, Shape> &memory,
                          const ChunkCall<typename Op::Storage> &call) {
  using T = typename Op::Storage;
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Slot slot = memory.slots[16 * i + 8 * r + g];
      const bool there = slot.chunk >= 0;
      const T *row = call.row_code + (there ? call.owner[slot.chunk] : 0) * Shape::W + 2 * t;
      const T *element = call.element_code + int64_t(slot.element) * Shape::W + 2 * t;
      SNE_UNROLL
      for (int j = 0; j < Shape::NT; ++j) {
        SNE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float &x = o[i][j].c[2 * r + e];
          x = to_real(from_float<T>(x));  // as between other blocks
          if (there) x += to_real(row[8 * j + e]) + to_real(element[8 * j + e]);
        }
      }
    }
  }
}

// Pools every chunk to (H, h): the softmax of <query_a, x> over its rows, and the sum of its rows with these weights.
template <class Op, class Shape>
SNE_DEVICE void pool(Tile (&o)[Shape::MT][Shape::NT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                     const WeightSource<Op> &weights, const WarpMemory<Op, Shape> &memory, const SetOfWarps &set,
                     const ChunkCall<typename Op::Storage> &call, const Chunks &chunks, typename Op::Storage *out) {
  using T = typename Op::Storage;
  constexpr int MT = Shape::MT, H = Shape::HEADS, HT = H < 8 ? 1 : H / 8, ROWS = Shape::ROWS;
  const WeightLayout layout(Shape::W, Shape::D);
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  Tile logits[MT][HT] = {};
  multiply<Shape::kWarpgroup>(logits, x, weights.piece(layout.queries(), layout.query_rows() * Shape::W));
  SNE_UNROLL
  for (int i = 0; i < MT; ++i) {
    SNE_UNROLL
    for (int n = 0; n < HT; ++n) {
      SNE_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int head = 8 * n + 2 * t + e % 2;
        if (head < H) memory.head_values[(16 * i + 8 * (e / 2) + g) * H + head] = logits[i][n].c[e];
      }
    }
  }
  set.sync();
  // From here on, slots of all warps of the set: their memory is contiguous.
  float *weight = memory.head_values - set.part * ROWS * H;
  constexpr int kPerRow = 32 / ROWS, kOwn = H < kPerRow ? 1 : H / kPerRow;
  const int row = lane % ROWS, first_head = lane / ROWS;
  const Slot slot = memory.slots[row];
  float own[kOwn];
  SNE_UNROLL
  for (int a = 0; a < kOwn; ++a) {
    const int head = a * kPerRow + first_head;
    if (head >= H) continue;
    float top = -INFINITY;
    for (int j = slot.key_begin; j < slot.key_end; ++j) top = max_of(top, weight[j * H + head]);
    own[a] = exp2_fast((memory.head_values[row * H + head] - (top == -INFINITY ? 0.0f : top)) * kLog2e);
  }
  set.sync();
  SNE_UNROLL
  for (int a = 0; a < kOwn; ++a)
    if (a * kPerRow + first_head < H) memory.head_values[row * H + a * kPerRow + first_head] = own[a];
  float *slice = (float *)(memory.exchange);  // (ROWS, 16): 16 columns of x at a time
  SNE_LOOP
  for (int k = 0; k < Shape::KT; ++k) {
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) {
      SNE_UNROLL
      for (int e = 0; e < 8; ++e)
        slice[(16 * i + 8 * (e / 2 % 2) + g) * 16 + 8 * (e / 4) + 2 * t + e % 2] =
            to_real(from_float<T>(o[i][e / 4].c[e % 4]));
    }
    turn<2>(o);
    set.sync();
    for (int item = set.part * 32 + lane; item < 16 * H; item += 32 * set.warps) {
      const int column = item % 16, head = item / 16;
      for (int group = 0; group < chunks.count; ++group) {
        float total = 0, sum = 0;
        for (int j = group * chunks.length; j < (group + 1) * chunks.length; ++j) {
          const float *at = (const float *)(memory.exchange + (j / ROWS - set.part) * WarpMemory<Op, Shape>::kExchange);
          const float p = weight[j * H + head];
          total += p;
          sum += p * at[j % ROWS * 16 + column];
        }
        const int64_t chunk = call.order[chunks.first + group];
        out[(chunk * H + head) * Shape::W + 16 * k + column] = from_float<T>(sum / total);
      }
    }
    set.sync();
  }
}

template <class Op, class Shape>
SNE_DEVICE void save_for_backward(typename Op::Storage *to, const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                                  const BinClass &cls) {
  if constexpr (kHasFullBins<Op, Shape>)
    save_full<Op, Shape>(to, x, cls.min_length == kFullLength);
  else
    save_rows<Op, Shape>(to, x);
}

// Takes bin `local` of the launch from its values to its pooled rows or, where `saved` is not null, to the inputs of
// blocks 1 to 3 and of the pool.
template <class Op, class Shape>
SNE_DEVICE void encode_bin(const ChunkCall<typename Op::Storage> &call, const WeightSource<Op> &weights,
                           const float *vectors, const WarpMemory<Op, Shape> &memory, const SetOfWarps &set,
                           bool layer_norm, int64_t local, typename Op::Storage *out, typename Op::Storage *saved,
                           int64_t plane) {
  constexpr int MT = Shape::MT;
  const WeightLayout layout(Shape::W, Shape::D);
  const VectorLayout at{Shape::W};
  const Chunks chunks = load_bin<Shape>(memory, call, set, local);
  scalar_means<Shape>(memory, set, call.logit, Shape::HEADS);
  Tile o[MT][Shape::NT];
  scalar_rows<Shape>(o, memory, vectors, Shape::HEADS);
  feed_forward<Op, Shape>(o, weights, layout.out(0), vectors + at.out_bias(0), layer_norm);
  Rows16<Op> x[MT][Shape::KT];
  SNE_LOOP
  for (int block = 1; block < 4; ++block) {
    if (block == 2) add_codes<Op, Shape>(o, memory, call);
    to_operands<Op>(x, o);
    if (saved && local < call.count) save_for_backward<Op, Shape>(saved + (block - 1) * plane, x, call.cls);
    attention_block<Op, Shape>(o, x, weights, block, vectors + at.qkv_bias(block), memory, set);
    feed_forward<Op, Shape>(o, weights, layout.out(block), vectors + at.out_bias(block), layer_norm);
  }
  to_operands<Op>(x, o);
  if (!saved)
    pool<Op, Shape>(o, x, weights, memory, set, call, chunks, out);
  else if (local < call.count)
    save_for_backward<Op, Shape>(saved + 3 * plane, x, call.cls);
  set.sync();
}

// Writes out (N, H, h) or, if that is null, saved (4, count * slots, h).
template <class Op, class Shape>
SNE_DEVICE void encode_chunks(const ChunkCall<typename Op::Storage> &call, bool resident, bool layer_norm,
                              typename Op::Storage *out, typename Op::Storage *saved) {
  constexpr int W = Shape::W;
  constexpr bool kFull = kHasFullBins<Op, Shape>;
  const WeightLayout layout(W, Shape::D);
  unsigned char *memory_at = (unsigned char *)shared_memory();
  float *vectors = (float *)memory_at, *tile_vectors = vectors + VectorLayout{W}.size();
  memory_at += forward_vectors<Op, Shape>() * 4;
  const WarpMemory<Op, Shape> memory(memory_at, num_warps(), warp_id());
  memory_at += num_warps() * WarpMemory<Op, Shape>::kBytes;
  const WeightSource<Op> weights{call.prepared, memory_at, resident, 0};
  load_vectors(vectors, W, call.basis, call.b_o, layer_norm ? call.norm : nullptr, call.b_qkv);
  if constexpr (kFull)
    load_tile_vectors(tile_vectors, W, Shape::HEADS, call.logit, call.b_o, call.b_qkv,
                      layer_norm ? call.norm : nullptr);
  if (resident) weights.copy(0, layout.forward_size());
  sync_block();

  const SetOfWarps set = set_of_warps(call.cls, Shape::ROWS);
  const int64_t per_step = num_warps() / set.warps, plane = call.count * call.cls.slots * W;
  const bool all_full = kFull && call.cls.min_length == kFullLength;
  int full = 0, full_end = 0;  // steps whose bins are all full
  if (kFull && call.cls.slots == kFullLength && !call.cls.multi_chunk) {
    const int64_t before = call.table[call.cls.min_length] + call.first_bin;
    const int64_t first = call.table[kFullLength] - before, filled = filled_bins(call).count;
    full = first > 0 ? int((first + per_step - 1) / per_step) : 0;
    full_end = int((all_full ? filled + per_step - 1 : filled) / per_step);
  }
  for (int64_t step = block_id(); step * per_step < call.count; step += num_blocks()) {
    int64_t local = step * per_step + warp_id() / set.warps;
    const bool is_full = kFull && step >= full && step < full_end;
    if (all_full && !is_full) return;
    if (all_full && step + 1 == full_end) {  // a warp that has no bin takes the last one once more
      const int64_t last = filled_bins(call).count - 1;
      if (local > last) local = last;
    }
    typename Op::Storage *to = saved ? saved + (local * call.cls.slots + set.part * Shape::ROWS) * W : nullptr;
    if constexpr (kFull) {
      // The same way for all warps of the block, as those of a warpgroup multiply together.
      if (is_full) {
        const int64_t chunk = call.order[call.table[call.cls.min_length] + call.first_bin + local];
        encode_full_bin<Op, Shape>(call, weights, vectors, tile_vectors, memory, set, layer_norm, chunk, out, to,
                                   plane);
        continue;
      }
    }
    encode_bin<Op, Shape>(call, weights, vectors, memory, set, layer_norm, local, out, to, plane);
  }
}

template <class Op, class Shape, int kThreads>
SNE_KERNEL SNE_BOUNDS(kThreads, 1)
    chunk_encode_forward(ChunkCall<typename Op::Storage> call, bool resident, bool layer_norm,
                         typename Op::Storage *out, typename Op::Storage *saved) {
  encode_chunks<Op, Shape>(call, resident, layer_norm, out, saved);
}

}  // namespace sne
