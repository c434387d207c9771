// Attention between the rows of each chunk, in the registers of the warps that hold its bin of slots.
#pragma once

#include "cuda/chunk_encode/tile.h"
#include "cuda/tiles/finite_rows.h"

namespace sne {

template <int MT>
struct KeyRanges {  // for each row of a lane the slots from begin to end, both in one register
  uint32_t range[MT][2];
  SNE_MEMBER int begin(int i, int r) const { return range[i][r] & 0xffff; }
  SNE_MEMBER int end(int i, int r) const { return range[i][r] >> 16; }
};
template <class Shape>
SNE_DEVICE KeyRanges<Shape::MT> key_ranges(const Slot *slots) {
  KeyRanges<Shape::MT> out;
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Slot slot = slots[16 * i + 8 * r + lane_id() / 4];
      out.range[i][r] = uint32_t(slot.key_begin) | uint32_t(slot.key_end) << 16;
    }
  }
  return out;
}

// Returns whether a key from `begin` to `end` is among the bits of `bad`, which stand for `rows` slots from `first` on.
SNE_DEVICE bool touches(uint32_t bad, int begin, int end, int first, int rows) {
  begin = begin > first ? begin - first : 0;
  end = end < first + rows ? end - first : rows;
  return begin < end && (bad >> begin & (end - begin < 32 ? (1u << (end - begin)) - 1 : ~0u)) != 0;
}

// Makes the operands of a head: 16 x 16 pieces, the last one padded with zeros where d = 8.
template <class Op, class Shape>
SNE_DEVICE void head_operands(Rows16<Op> (&out)[Shape::MT][Shape::DK], const Tile (&c)[Shape::MT][Shape::DT]) {
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k)
      out[i][k] = rows16<Op>(c[i][2 * k], Shape::D == 8 ? Tile{} : c[i][2 * k + (Shape::D > 8)]);
  }
}

// Adds the product a b over the width of a head to c.
template <class Shape, class Op>
SNE_DEVICE void head_product(Tile &c, const Rows16<Op> &a, const Cols8<Op> &b) {
  if constexpr (Shape::D == 8)
    product_left(c, a, b);
  else
    product(c, a, b);
}

// Returns the address of a warp's 16 x 16 piece (i, k) of one of the exchanged matrices.
template <class Shape, class Memory>
SNE_DEVICE unsigned char *exchanged(const Memory &memory, int warp, int which, int i, int k) {
  const int piece = (which * Shape::MT + i) * Shape::DK + k;
  return memory.exchange + warp * Memory::kExchange + piece * Memory::kRowsBytes;
}
template <class Shape, class Op, class Memory>
SNE_DEVICE void offer(const Memory &memory, int which, const Rows16<Op> (&rows)[Shape::MT][Shape::DK]) {
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k) put_rows(exchanged<Shape>(memory, 0, which, i, k), rows[i][k]);
  }
}

// Computes the products of 16 own rows (a) with the 16 MT rows of warp `warp` of an exchanged matrix.
template <class Shape, class Op, class Memory>
SNE_DEVICE void products_with(Tile (&s)[2 * Shape::MT], const Rows16<Op> (&a)[Shape::DK], const Memory &memory,
                              int warp, int which) {
  SNE_UNROLL
  for (int m = 0; m < Shape::MT; ++m) {
    s[2 * m] = s[2 * m + 1] = Tile{};
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k) {
      const Rows16<Op> rows = get_rows<Op>(exchanged<Shape>(memory, warp, which, m, k));
      SNE_UNROLL
      for (int half = 0; half < 2; ++half) head_product<Shape>(s[2 * m + half], a[k], cols8(rows, half));
    }
  }
}

// Adds p (16, 16 MT) times the 16 MT rows of warp `warp` of an exchanged matrix to c.
template <class Op, class Shape, class Memory>
SNE_DEVICE void add_weighted(Tile (&c)[Shape::DT], const Tile (&p)[2 * Shape::MT], const Memory &memory, int warp,
                             int which) {
  SNE_UNROLL
  for (int m = 0; m < Shape::MT; ++m) {
    const Rows16<Op> weights = rows16<Op>(p[2 * m], p[2 * m + 1]);
    SNE_UNROLL
    for (int k = 0; k < Shape::DK; ++k) {
      const Rows16<Op> rows = get_rows<Op>(exchanged<Shape>(memory, warp, which, m, k));
      SNE_UNROLL
      for (int half = 0; half < (Shape::D == 8 ? 1 : 2); ++half)
        product(c[2 * k + half], weights, cols8_transposed(rows, half));
    }
  }
}

// Computes q, k or v (which = 0, 1, 2) of a head.
template <class Op, class Shape>
SNE_DEVICE void project(Tile (&c)[Shape::MT][Shape::DT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                        const WeightSource<Op> &weights, int64_t head_offset, int which, const float *bias) {
  fill_rows(c, bias);
  multiply<Shape::kWarpgroup>(c, x, weights.piece(head_offset + which * Shape::D * Shape::W, Shape::D * Shape::W));
}

// Computes q, k and v of a head by one product: wide products keep Hopper's tensor cores busy.
template <class Op, class Shape>
SNE_DEVICE void project_together(Tile (&q)[Shape::MT][Shape::DT], Tile (&k)[Shape::MT][Shape::DT],
                                 Tile (&v)[Shape::MT][Shape::DT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                                 const WeightSource<Op> &weights, int64_t head_offset, const float *bias) {
  constexpr int DT = Shape::DT;
  fill_rows(q, bias);
  fill_rows(k, bias + Shape::W);
  fill_rows(v, bias + 2 * Shape::W);
  Tile c[Shape::MT][3 * DT];
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int n = 0; n < DT; ++n) c[i][n] = q[i][n], c[i][DT + n] = k[i][n], c[i][2 * DT + n] = v[i][n];
  }
  multiply<Shape::kWarpgroup>(c, x, weights.piece(head_offset, 3 * Shape::D * Shape::W));
  SNE_UNROLL
  for (int i = 0; i < Shape::MT; ++i) {
    SNE_UNROLL
    for (int n = 0; n < DT; ++n) q[i][n] = c[i][n], k[i][n] = c[i][DT + n], v[i][n] = c[i][2 * DT + n];
  }
}

// Computes o = q + attention(q, k, v) of every head, from the rows x as operands.
template <class Op, class Shape, class Memory>
SNE_DEVICE void attention_block(Tile (&o)[Shape::MT][Shape::NT], const Rows16<Op> (&x)[Shape::MT][Shape::KT],
                                const WeightSource<Op> &weights, int block, const float *bias, const Memory &memory,
                                const SetOfWarps &set) {
  constexpr int MT = Shape::MT, DT = Shape::DT, D = Shape::D, W = Shape::W, ROWS = Shape::ROWS;
  const WeightLayout layout(W, D);
  const KeyRanges<MT> keys = key_ranges<Shape>(memory.slots);
  const float scale = kLog2e / __builtin_sqrtf(float(W));
  SNE_LOOP
  for (int head = 0; head < Shape::HEADS; ++head) {
    const int64_t offset = layout.qkv(block, head);
    Rows16<Op> q_rows[MT][Shape::DK];
    Tile q[MT][DT];
    {
      Tile k[MT][DT], v[MT][DT];
      if constexpr (Shape::kTogether) {
        project_together<Op, Shape>(q, k, v, x, weights, offset, bias + head * D);
      } else {
        project<Op, Shape>(k, x, weights, offset, 1, bias + W + head * D);
        project<Op, Shape>(v, x, weights, offset, 2, bias + 2 * W + head * D);
      }
      if (set.multi_chunk) {  // p v adds zero times the rows of other chunks, which must be finite
        const uint32_t bad = bad_rows<Op>(k, v);
        if (lane_id() == 0) *memory.poison = bad;
        clear_rows(k, bad);
        clear_rows(v, bad);
      }
      Rows16<Op> rows[MT][Shape::DK];
      head_operands<Op, Shape>(rows, k);
      offer<Shape>(memory, kKeys, rows);
      head_operands<Op, Shape>(rows, v);
      offer<Shape>(memory, kValues, rows);
    }
    if constexpr (!Shape::kTogether) project<Op, Shape>(q, x, weights, offset, 0, bias + head * D);
    head_operands<Op, Shape>(q_rows, q);
    set.sync();
    // One piece of 16 rows after the other, as two at a time would spill registers.
    SNE_UNROLL
    for (int i = 0; i < MT; ++i) {
      Tile attended[DT] = {};
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
      for (int part = 0; part < set.warps; ++part) {
        const int warp = part - set.part, first = part * ROWS;
        Tile s[2 * MT];
        products_with<Shape>(s, q_rows[i], memory, warp, kKeys);
        const uint32_t bad = set.multi_chunk ? memory.poison[4 * warp] : 0;
        SNE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int begin = keys.begin(i, r), end = keys.end(i, r);
          float highest = top[r];
          SNE_UNROLL
          for (int n = 0; n < 2 * MT; ++n) {
            SNE_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int key = first + 8 * n + 2 * (lane_id() % 4) + e;
              float &logit = s[n].c[2 * r + e];
              logit = key >= begin && key < end ? logit : -INFINITY;
              highest = max_of(highest, logit);
            }
          }
          highest = max_over_quad(highest);
          // The largest logit is subtracted before scaling, as in set_attention/forward.cu.
          const float shift = highest == -INFINITY ? 0.0f : highest, decay = exp2_fast((top[r] - shift) * scale);
          float sum = 0;
          SNE_UNROLL
          for (int n = 0; n < 2 * MT; ++n) {
            SNE_UNROLL
            for (int e = 0; e < 2; ++e) {
              float &p = s[n].c[2 * r + e];
              p = exp2_fast((p - shift) * scale);
              sum += p;
            }
          }
          total[r] = total[r] * decay + sum_over_quad(sum);
          if (bad && touches(bad, begin, end, first, ROWS)) total[r] = NAN;
          top[r] = highest;
          SNE_UNROLL
          for (int n = 0; n < DT; ++n) attended[n].c[2 * r] *= decay, attended[n].c[2 * r + 1] *= decay;
        }
        add_weighted<Op, Shape>(attended, s, memory, warp, kValues);
      }
      SNE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float inverse = 1.0f / total[r];
        SNE_UNROLL
        for (int n = 0; n < DT; ++n) {
          SNE_UNROLL
          for (int e = 2 * r; e < 2 * r + 2; ++e) o[i][n].c[e] = q[i][n].c[e] + attended[n].c[e] * inverse;
        }
      }
    }
    turn<DT>(o);
    set.sync();
  }
}

}  // namespace sne
