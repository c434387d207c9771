// Forward of chunk_encode on one tile with products of bfloat16 pairs: the weights, activations and blocks that differ
// from chunk_encode_tile.h. Block 0, norms, softmax, sums and the pooling are float.
#pragma once

#include "cpu/product_bf16.h"
#if defined(SNE_BF16)

#include "cpu/chunk_attention_bf16.h"
#include "cpu/chunk_encode_tile.h"

namespace sne::SNE_ISA {

struct Bf16Work;

struct Bf16Encoder : ChunkEncoder<float> {
  using Work = Bf16Work;
  Pair *qkv_pairs[4], *out_pairs[4];            // packed for the forward; index = block, 0 unused
  Pair *qkv_back_pairs[4], *out_back_pairs[4];  // packed transposed, backward only

  explicit Bf16Encoder(const sne_fast_chunk_encode_args &a) : ChunkEncoder<float>(a) {}

  void take(Scratch &scratch, bool backward) {
    take_table(scratch);
    for (int b = 0; b < 4; ++b) {
      out_pairs[b] = b ? scratch.take<Pair>(h * h / 2) : nullptr;
      qkv_pairs[b] = b ? scratch.take<Pair>(3 * h * h / 2) : nullptr;
      out_back_pairs[b] = backward ? scratch.take<Pair>(h * h / 2) : nullptr;
      qkv_back_pairs[b] = backward && b ? scratch.take<Pair>(3 * h * h / 2) : nullptr;
    }
  }
  void pack_weights(bool backward) {
    for (int b = 0; b < 4; ++b) {
      const float *wo = w_o + b * h * h, *wq = b ? w_qkv + (b - 1) * 3 * h * h : nullptr;
      if (b) pack_pairs(h, h, wo, h, 1, out_pairs[b]);
      for (int i = 0; b && i < 3; ++i) pack_pairs(h, h, wq + i * h * h, h, 1, qkv_pairs[b] + i * h * h / 2);
      if (!backward) continue;
      pack_pairs(h, h, wo, 1, h, out_back_pairs[b]);
      if (b) pack_pairs(h, 3 * h, wq, 1, h, qkv_back_pairs[b]);
    }
    make_table();
  }
};

// Operands of one of the blocks 1 to 3.
struct BlockOperands {
  HeadOperands heads;
  Pair *in_slots, *o_slots;  // (h, R/2) input of the block and of fc_o, backward only
  Pair *e;                   // (H, R, R/2) attention_head_bf16, backward only
};

struct Bf16Work : TileWork<float> {
  BlockOperands operands[4];
  float *q;       // (h, R) queries
  Pair *rounded;  // (h/2, R) an input of a product, features paired
  GroupScratch group;

  void take(Scratch &scratch, long R, long h, long H, bool for_backward) {
    take_shared(scratch, R, h, H, for_backward);
    float *in = scratch.take<float>(h * R);
    q = scratch.take<float>(h * R);
    rounded = scratch.take<Pair>(h * R / 2);
    group.take(scratch, R);
    for (int b = 0; b < 4; ++b) {
      if (!for_backward && b > 1) {
        block[b] = block[1];
        operands[b] = operands[1];
        continue;
      }
      take_rest(scratch, R, h, H, b);
      block[b].in = in;
      if (b == 0) continue;
      auto words = [&](bool needed) { return needed ? scratch.take<Pair>(h * R / 2) : nullptr; };
      HeadOperands &heads = operands[b].heads;
      heads.q = words(true);
      heads.k = words(true);
      heads.v_slots = words(true);
      heads.v = words(for_backward);
      heads.q_slots = words(for_backward);
      heads.k_slots = words(for_backward);
      operands[b].in_slots = words(for_backward);
      operands[b].o_slots = words(for_backward);
      operands[b].e = for_backward ? scratch.take<Pair>(H * R * R / 2) : nullptr;
    }
  }
};

inline void output_product(const Bf16Encoder &enc, Bf16Work &work, int b, long p) {
  const long h = enc.h, at = p * h * kWidePanel;
  Pair *slots = work.operands[b].o_slots;
  round_panel(h, work.o + at, work.rounded, slots ? slots + at / 2 : nullptr);
  packed_product(h, enc.out_pairs[b], work.rounded, h / 2, {work.block[b].relu + at, nullptr, nullptr}, enc.b_o + b * h,
                 kRelu);
}

// One of the blocks 1 to 3, from its input k.in.
inline void attention_block(const Bf16Encoder &enc, Bf16Work &work, int b, float *to) {
  const long h = enc.h, R = work.tile.slots, square = h * h / 2;
  const BlockActivations<float> &k = work.block[b];
  const BlockOperands &operands = work.operands[b];
  const HeadOperands &heads = operands.heads;
  for (long p = 0; p < work.tile.panels; ++p) {
    const long at = p * h * kWidePanel;
    auto part = [&](Pair *words) { return words ? words + at / 2 : nullptr; };
    round_panel(h, k.in + at, work.rounded, part(operands.in_slots));
    const Pair *packed = enc.qkv_pairs[b];
    const float *bias = enc.bias_qkv(b);
    packed_product(h, packed, work.rounded, h / 2, {work.q + at, part(heads.q), part(heads.q_slots)}, bias);
    packed_product(h, packed + square, work.rounded, h / 2, {nullptr, part(heads.k), part(heads.k_slots)}, bias + h);
    packed_product(h, packed + 2 * square, work.rounded, h / 2, {nullptr, part(heads.v), part(heads.v_slots)},
                   bias + 2 * h);
  }
  for (long a = 0; a < enc.H; ++a)
    attention_head_bf16(work.tile, h, enc.d, a, heads, work.q, work.o,
                        operands.e ? operands.e + a * R * R / 2 : nullptr, k.inv + a * R, work.group);
  finish_block(enc, work, b, to);
}

}  // namespace sne::SNE_ISA

#endif
