// Backward of chunk_encode on one tile with products of bfloat16 pairs: what differs from chunk_encode_tile_backward.h.
#pragma once

#include "cpu/chunk_encode_bf16.h"
#if defined(SNE_BF16)

#include "cpu/chunk_encode_tile_backward.h"

namespace sne::SNE_ISA {

struct Bf16BackWork : BackWork<float> {
  Pair *features;  // (3h/2, R) the gradient in back.g, back.gr or back.gqkv, features paired
  Pair *slots;     // (3h, R/2) the same, slots paired
  Pair *rows;      // (P/2, h) the other operand of a weight's gradient
  HeadBackScratch head;
  void take(Scratch &s, long R, long h, long H) {
    take_shared(s, R, h, H);
    features = s.take<Pair>(3 * h * R / 2);
    slots = s.take<Pair>(3 * h * R / 2);
    rows = s.take<Pair>(h * kPairPanel);
    head.take(s, R);
  }
};

// dw (M, h) += the products over slots of g (M, R/2), in back.slots, and of input (h, R/2).
inline void weight_gradient(const Tile<float> &tile, long M, long h, const Bf16BackWork &back, const Pair *input,
                            float *dw) {
  for (long p = 0; p < tile.panels; ++p) {
    slot_rows(h, input + p * h * kPairPanel, back.rows);
    add_slot_products(M, h, back.slots + p * M * kPairPanel, back.rows, dw);
  }
}

// Rounds panels g (F, R), or where `relu` is given only what lies where that is positive, to back.features and
// back.slots, and adds its rows to db_lanes. Writes the float numbers to `real` where it is not null.
inline void round_gradient(const Tile<float> &tile, long F, const float *g, const float *relu, Bf16BackWork &back,
                           float *db_lanes, float *real) {
  constexpr int W = kLanes<float>, NV = SNE_VECTORS_PER_PANEL;
  for (long p = 0; p < tile.panels; ++p)
    for (long f = 0; f < F; f += 2) {
      Vec<float> row[2][NV];
      for (int i = 0; i < 2; ++i) {
        const long at = (p * F + f + i) * kWidePanel;
        Vec<float> sum = load(db_lanes + (f + i) * W);
        for (int v = 0; v < NV; ++v) {
          row[i][v] = load(g + at + v * W);
          if (relu) row[i][v] = keep<float>(load(relu + at + v * W) > 0.0f, row[i][v]);
          sum += row[i][v];
        }
        store(db_lanes + (f + i) * W, sum);
      }
      const long at = p * F * kWidePanel;
      write_rows<2, NV>({real ? real + at : nullptr, back.features + at / 2, back.slots + at / 2}, f, row);
    }
}

inline void output_backward(const Bf16Encoder &enc, Bf16Work &work, Bf16BackWork &back, SliceSums<float> &sums, int b) {
  constexpr int W = kLanes<float>;
  const long h = enc.h;
  round_gradient(work.tile, h, back.g, work.block[b].relu, back, sums.b_o_lanes + b * h * W, b ? nullptr : back.gr);
  for (long p = 0; p < work.tile.panels; ++p) {
    const long at = p * h * kWidePanel;
    packed_product(h, enc.out_back_pairs[b], back.features + at / 2, h / 2, {back.g + at, nullptr, nullptr}, nullptr,
                   kAccumulate);
  }
  if (b == 0)
    table_gradient<float>(enc, work, back, sums);
  else
    weight_gradient(work.tile, h, h, back, work.operands[b].o_slots, sums.w_o + (b - 1) * h * h);
}

inline void attention_block_backward(const Bf16Encoder &enc, Bf16Work &work, Bf16BackWork &back, SliceSums<float> &sums,
                                     int b) {
  constexpr int W = kLanes<float>;
  const long h = enc.h, R = work.tile.slots;
  const BlockOperands &operands = work.operands[b];
  finish_block_backward(enc, work, back, sums, b);
  for (long p = 0; p < work.tile.panels; ++p)
    round_panel(h, back.g + p * h * kWidePanel, back.features + p * h * kPairPanel, nullptr);
  for (long a = 0; a < enc.H; ++a)
    attention_head_backward_bf16(work.tile, h, enc.d, a, operands.heads, operands.e + a * R * R / 2,
                                 work.block[b].inv + a * R, back.g, back.features, back.gqkv, back.head);
  round_gradient(work.tile, 3 * h, back.gqkv, nullptr, back, sums.b_qkv_lanes + (b - 1) * 3 * h * W, nullptr);
  weight_gradient(work.tile, 3 * h, h, back, operands.in_slots, sums.w_qkv + (b - 1) * 3 * h * h);
  for (long p = 0; p < work.tile.panels; ++p)
    packed_product(h, enc.qkv_back_pairs[b], back.features + p * 3 * h * kPairPanel, 3 * h / 2,
                   {back.g + p * h * kWidePanel, nullptr, nullptr});
}

}  // namespace sne::SNE_ISA

#endif
