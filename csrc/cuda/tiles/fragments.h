// Matrices in the registers of a warp, and products of them by the matrix instructions (ptx/mma.h).
//
// Lane l stands at g = l / 4, t = l % 4. A Tile is 16 x 8 sums, of which a lane holds rows g and g + 8, columns 2t and
// 2t + 1. Other layouts are made of tiles without moving data between lanes: two tiles side by side are 16 x 16 operand
// values (Rows16), and 8 of their rows are the right operand of a product with the transpose (Cols8). Lanes exchange
// values only for products over rows (transposed).
//
// Operands (Op) are 16-bit numbers, two to a register, or 32-bit floats. Products of floats are rounded to TF32 or, as
// three products, keep the precision of float32. For floats the 8 columns of an instruction are read in the order
// 0 2 4 6 1 3 5 7, so that a lane's columns are 2t and 2t + 1 there as well.
#pragma once

#include "cuda/ptx/mma.h"

namespace sne {

template <class Op, bool packed = Op::kPacked>
struct Rows16 {
  uint32_t r[4];
};
template <class Op>
struct Rows16<Op, false> {
  float r[8];
};
template <class Op, bool packed = Op::kPacked>
struct Cols8 {
  uint32_t r[2];
};
template <class Op>
struct Cols8<Op, false> {
  float r[4];
};

// ------------------------------------------------------------------------------------------------------- fragments

template <class Op>
SNE_DEVICE float operand_value(float v) {  // as it enters a product
  if constexpr (std::is_same_v<Op, OpTf32>) return round_to_tf32(v);
  return v;
}

// M[g][2t], M[g][2t + 1] -> M[2t][g], M[2t + 1][g] of an 8 x 8 matrix.
SNE_DEVICE void transpose8(float &first, float &second) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4, from = 2 * t * 4 + g / 2;
  const float a = shuffle(first, from), b = shuffle(second, from), c = shuffle(first, from + 4),
              d = shuffle(second, from + 4);
  first = g % 2 ? b : a;
  second = g % 2 ? d : c;
}

// Makes an operand of 16 rows from their columns 0..7 and 8..15.
template <class Op>
SNE_DEVICE Rows16<Op> rows16(const Tile &left, const Tile &right) {
  Rows16<Op> out;
  if constexpr (Op::kPacked) {
    using T = typename Op::Storage;
    out.r[0] = pack2<T>(left.c[0], left.c[1]), out.r[1] = pack2<T>(left.c[2], left.c[3]);
    out.r[2] = pack2<T>(right.c[0], right.c[1]), out.r[3] = pack2<T>(right.c[2], right.c[3]);
  } else {
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      out.r[i] = operand_value<Op>(left.c[i]);
      out.r[4 + i] = operand_value<Op>(right.c[i]);
    }
  }
  return out;
}

// Makes the right operand of a product over columns from rows 0..7 (half 0) or 8..15.
template <class Op>
SNE_DEVICE Cols8<Op> cols8(const Rows16<Op> &a, int half) {
  Cols8<Op> out;
  if constexpr (Op::kPacked) {
    out.r[0] = a.r[half], out.r[1] = a.r[2 + half];
  } else {
    out.r[0] = a.r[2 * half], out.r[1] = a.r[2 * half + 1];
    out.r[2] = a.r[4 + 2 * half], out.r[3] = a.r[4 + 2 * half + 1];
  }
  return out;
}

// Makes the right operand of a product over rows from columns 0..7 (half 0) or 8..15.
template <class Op>
SNE_DEVICE Cols8<Op> cols8_transposed(const Rows16<Op> &a, int half) {
  Cols8<Op> out;
  if constexpr (Op::kPacked) {
    out.r[0] = transpose8(a.r[2 * half]), out.r[1] = transpose8(a.r[2 * half + 1]);
  } else {
    out.r[0] = a.r[4 * half], out.r[1] = a.r[4 * half + 1];
    out.r[2] = a.r[4 * half + 2], out.r[3] = a.r[4 * half + 3];
    transpose8(out.r[0], out.r[1]);
    transpose8(out.r[2], out.r[3]);
  }
  return out;
}

namespace detail {
template <class Op>
SNE_DEVICE void multiply8(Tile &c, const float *a4, const float *b2) {
  const float a[4] = {a4[0], a4[2], a4[1], a4[3]};  // the instruction wants rows g, g + 8 of each column
  if constexpr (std::is_same_v<Op, OpTf32>) {
    mma_tf32(c, a, b2);
  } else {
    float big_a[4], small_a[4], big_b[2], small_b[2];
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) big_a[i] = round_to_tf32(a[i]), small_a[i] = round_to_tf32(a[i] - big_a[i]);
    SNE_UNROLL
    for (int i = 0; i < 2; ++i) big_b[i] = round_to_tf32(b2[i]), small_b[i] = round_to_tf32(b2[i] - big_b[i]);
    mma_tf32(c, small_a, big_b);
    mma_tf32(c, big_a, small_b);
    mma_tf32(c, big_a, big_b);
  }
}
}  // namespace detail

// Adds the product a b over 16 columns of a to c.
template <class Op>
SNE_DEVICE void product(Tile &c, const Rows16<Op> &a, const Cols8<Op> &b) {
  if constexpr (Op::kPacked) {
    mma_k16<Op>(c, a.r, b.r);
  } else {
    detail::multiply8<Op>(c, a.r, b.r);
    detail::multiply8<Op>(c, a.r + 4, b.r + 2);
  }
}
// Adds the product over the first 8 columns of a alone.
template <class Op>
SNE_DEVICE void product_left(Tile &c, const Rows16<Op> &a, const Cols8<Op> &b) {
  if constexpr (Op::kPacked)
    mma_k8<Op>(c, a.r, b.r);
  else
    detail::multiply8<Op>(c, a.r, b.r);
}

// --------------------------------------------------------------------------------- matrices stored as core matrices
//
// An N x K matrix in shared memory as core matrices: pieces of 8 rows x 16 bytes, each in 128 consecutive bytes, and
// the pieces of the same 8 rows one behind the other. ldmatrix reads them without bank conflicts, and wgmma as they
// are.

template <class Op>
constexpr int kColumns = Op::kPacked ? 8 : 4;  // of a core matrix: 16 bytes
template <class Op>
constexpr int kSize = Op::kPacked ? 2 : 4;  // bytes of a value

// Returns the place of element (n, k), in elements.
template <class Op>
SNE_HOST_DEVICE int64_t core_index(int64_t n, int64_t k, int64_t columns) {
  if (!Op::kPacked) k = k / 8 * 8 + (k % 2 * 4 + k % 8 / 2);
  constexpr int kWide = kColumns<Op>;
  return ((n / 8) * (columns / kWide) + k / kWide) * 8 * kWide + n % 8 * kWide + k % kWide;
}

// Loads rows 8 n8.. and columns 16 k16.. of a matrix as right operand.
template <class Op>
SNE_DEVICE Cols8<Op> load_cols8(const void *matrix, int n8, int k16, int columns) {
  constexpr int kWide = kColumns<Op>;
  const unsigned char *at =
      (const unsigned char *)matrix + (n8 * (columns / kWide) + k16 * (16 / kWide)) * 128 + lane_id() * 16;
  Cols8<Op> out;
  if constexpr (Op::kPacked) {
    load_matrices<2>(out.r, at - (lane_id() & 16) * 16);  // the instruction ignores the addresses of lanes 16..
  } else {
    uint32_t r[4];
    load_matrices<4>(r, at);
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) out.r[i] = float_of_bits(r[i]);
  }
  return out;
}
// Loads the right operand of product_left from a matrix of 8 columns.
template <class Op>
SNE_DEVICE Cols8<Op> load_cols8_left(const void *matrix, int n8) {
  const unsigned char *at = (const unsigned char *)matrix + n8 * 8 / kColumns<Op> * 128;
  Cols8<Op> out{};
  if constexpr (Op::kPacked) {
    load_matrices<1>(out.r, at + lane_id() % 8 * 16);
  } else {
    uint32_t r[2];
    load_matrices<2>(r, at + lane_id() % 16 * 16);
    out.r[0] = float_of_bits(r[0]), out.r[1] = float_of_bits(r[1]);
  }
  return out;
}
// Loads two operands, columns 32 k32..: one instruction for 16-bit operands.
template <class Op>
SNE_DEVICE void load_cols8_pair(Cols8<Op> (&out)[2], const void *matrix, int n8, int k32, int columns) {
  if constexpr (Op::kPacked) {
    uint32_t r[4];
    load_matrices<4>(r, (const unsigned char *)matrix + (n8 * (columns / 8) + k32 * 4) * 128 + lane_id() * 16);
    out[0].r[0] = r[0], out[0].r[1] = r[1], out[1].r[0] = r[2], out[1].r[1] = r[3];
  } else {
    out[0] = load_cols8<Op>(matrix, n8, 2 * k32, columns);
    out[1] = load_cols8<Op>(matrix, n8, 2 * k32 + 1, columns);
  }
}

// -------------------------------------------------------------------------------------- rows of matrices in memory

// Loads a 16 x 8 piece of a matrix whose rows are `stride` apart.
template <class T>
SNE_DEVICE Tile load_tile(const T *at, int64_t stride) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  Tile out;
  SNE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const T *row = at + (g + 8 * i) * stride + 2 * t;
    if constexpr (sizeof(T) == 2) {
      const uint32_t pair = *(const uint32_t *)row;
      out.c[2 * i] = to_real(T{uint16_t(pair)}), out.c[2 * i + 1] = to_real(T{uint16_t(pair >> 16)});
    } else {
      out.c[2 * i] = row[0], out.c[2 * i + 1] = row[1];
    }
  }
  return out;
}
// Loads a 16 x 16 piece as left operand; 16-bit numbers are not converted.
template <class Op>
SNE_DEVICE Rows16<Op> load_rows16(const typename Op::Storage *at, int64_t stride) {
  if constexpr (Op::kPacked) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    Rows16<Op> out;
    SNE_UNROLL
    for (int part = 0; part < 4; ++part)
      out.r[part] = *(const uint32_t *)(at + (g + 8 * (part % 2)) * stride + 8 * (part / 2) + 2 * t);
    return out;
  } else {
    return rows16<Op>(load_tile(at, stride), load_tile(at + 8, stride));
  }
}
template <class T>
SNE_DEVICE void store_tile(T *at, int64_t stride, const Tile &tile) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int i = 0; i < 2; ++i) {
    T *row = at + (g + 8 * i) * stride + 2 * t;
    if constexpr (sizeof(T) == 2)
      *(uint32_t *)row = pack2<T>(tile.c[2 * i], tile.c[2 * i + 1]);
    else
      row[0] = tile.c[2 * i], row[1] = tile.c[2 * i + 1];
  }
}

// Stores the first `count` rows of a 16 x 16 operand.
template <class Op>
SNE_DEVICE void store_rows16(typename Op::Storage *to, int64_t stride, const Rows16<Op> &rows, int count = 16) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  SNE_UNROLL
  for (int part = 0; part < 4; ++part) {  // columns 8 (part / 2).., rows 8 (part % 2)..
    const int row = g + 8 * (part % 2);
    typename Op::Storage *at = to + row * stride + 8 * (part / 2) + 2 * t;
    if (row >= count) continue;
    if constexpr (Op::kPacked)
      *(uint32_t *)at = rows.r[part];
    else
      at[0] = rows.r[4 * (part / 2) + 2 * (part % 2)], at[1] = rows.r[4 * (part / 2) + 2 * (part % 2) + 1];
  }
}

SNE_DEVICE float sum_over_quad(float v) {  // over the lanes of one row
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}
SNE_DEVICE float max_over_quad(float v) {
  v = max_of(v, shuffle_xor(v, 1));
  return max_of(v, shuffle_xor(v, 2));
}

}  // namespace sne
