// Matrices in the registers of a warp, and the matrix instructions (mma.sync, ldmatrix, movmatrix) on them.
//
// Lane l stands at g = l / 4, t = l % 4. A Tile is 16 x 8 sums: rows g and g + 8, columns 2t and 2t + 1. Everything else
// is made of tiles without moving data between lanes: two tiles side by side are 16 x 16 operand values (Rows16), and
// the rows of those, eight at a time, are the other operand of a product with a transpose (Cols8). Only where a
// product runs over rows do lanes exchange values (transposed).
//
// Operands (Op) are 16-bit numbers, two to a register, or 32-bit floats whose products are rounded to TF32 or, as three
// products, keep float32's precision. For floats the columns of 8 that an instruction takes are read in the order
// 0 2 4 6 1 3 5 7, so that a lane's columns are 2t and 2t + 1 there as well.
#pragma once

#include <type_traits>

#include "cuda/simt.h"

namespace sne {

struct Tile {
  float c[4];
};

struct OpBfloat {
  using Storage = BFloat;
  static constexpr bool kPacked = true;
};
struct OpHalf {
  using Storage = Half;
  static constexpr bool kPacked = true;
};
struct OpTf32 {
  using Storage = float;
  static constexpr bool kPacked = false;
};
struct OpFloat {  // float32 products as three of TF32: the parts that TF32 leaves off are multiplied too
  using Storage = float;
  static constexpr bool kPacked = false;
};

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

// ---------------------------------------------------------------------------------------------------- instructions

#if defined(SNE_EMULATED)

namespace detail {
struct MatrixItem {
  float *c;
  const void *a, *b;
};
template <class T>
float operand(uint32_t pair, int half) {
  const uint16_t bits = uint16_t(half ? pair >> 16 : pair);
  T value;
  memcpy(&value, &bits, 2);
  return to_real(value);
}
// steps: groups of 8 of the contraction.
template <class T, int steps>
void multiply_packed(void **all) {
  float a[16][8 * steps], b[8 * steps][8];
  for (int l = 0; l < kWarp; ++l) {
    const MatrixItem &item = *(MatrixItem *)all[l];
    const uint32_t *ra = (const uint32_t *)item.a, *rb = (const uint32_t *)item.b;
    const int g = l / 4, t = l % 4;
    for (int s = 0; s < steps; ++s)
      for (int i = 0; i < 2; ++i) {
        a[g][8 * s + 2 * t + i] = operand<T>(ra[2 * s], i);
        a[g + 8][8 * s + 2 * t + i] = operand<T>(ra[2 * s + 1], i);
        b[8 * s + 2 * t + i][g] = operand<T>(rb[s], i);
      }
  }
  for (int l = 0; l < kWarp; ++l) {
    float *c = ((MatrixItem *)all[l])->c;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8 * steps; ++k) c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
  }
}
SNE_DEVICE float truncated(float v) { return float_of_bits(bits_of_float(v) & 0xffffe000); }
inline void multiply_tf32(void **all) {
  float a[16][8], b[8][8];
  for (int l = 0; l < kWarp; ++l) {
    const MatrixItem &item = *(MatrixItem *)all[l];
    const float *ra = (const float *)item.a, *rb = (const float *)item.b;
    const int g = l / 4, t = l % 4;
    a[g][t] = truncated(ra[0]), a[g + 8][t] = truncated(ra[1]);
    a[g][t + 4] = truncated(ra[2]), a[g + 8][t + 4] = truncated(ra[3]);
    b[t][g] = truncated(rb[0]), b[t + 4][g] = truncated(rb[1]);
  }
  for (int l = 0; l < kWarp; ++l) {
    float *c = ((MatrixItem *)all[l])->c;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k) c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
  }
}
struct LoadItem {
  const unsigned char *row;
  uint32_t *r;
};
template <int count, bool transpose>
void load_matrices(void **all) {
  for (int l = 0; l < kWarp; ++l) {
    LoadItem &item = *(LoadItem *)all[l];
    for (int m = 0; m < count; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = transpose ? l % 4 * 2 + i : l / 4, column = transpose ? l / 4 : l % 4 * 2 + i;
        memcpy(&pair[i], ((LoadItem *)all[8 * m + row])->row + 2 * column, 2);
      }
      item.r[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
    }
  }
}
}  // namespace detail

template <class Op>
SNE_DEVICE void mma_k16(Tile &c, const uint32_t *a, const uint32_t *b) {
  detail::MatrixItem item{c.c, a, b};
  emulator::meet_warp("mma_k16", &item, detail::multiply_packed<typename Op::Storage, 2>);
}
template <class Op>
SNE_DEVICE void mma_k8(Tile &c, const uint32_t *a, const uint32_t *b) {
  detail::MatrixItem item{c.c, a, b};
  emulator::meet_warp("mma_k8", &item, detail::multiply_packed<typename Op::Storage, 1>);
}
SNE_DEVICE void mma_tf32(Tile &c, const float *a, const float *b) {
  detail::MatrixItem item{c.c, a, b};
  emulator::meet_warp("mma_tf32", &item, detail::multiply_tf32);
}
// Lane l gives the address of row l % 8 of matrix l / 8; 8 x 8 matrices of 16-bit numbers, rows of 16 bytes.
template <int count>
SNE_DEVICE void load_matrices(uint32_t *r, const void *row) {
  detail::LoadItem item{(const unsigned char *)row, r};
  emulator::meet_warp("ldmatrix", &item, detail::load_matrices<count, false>);
}
template <int count>
SNE_DEVICE void load_matrices_transposed(uint32_t *r, const void *row) {
  detail::LoadItem item{(const unsigned char *)row, r};
  emulator::meet_warp("ldmatrix.trans", &item, detail::load_matrices<count, true>);
}
SNE_DEVICE uint32_t transpose8(uint32_t pair) {
  struct Item {
    uint32_t in, out;
  } item{pair, 0};
  emulator::meet_warp("movmatrix", &item, [](void **all) {
    for (int l = 0; l < kWarp; ++l) {
      uint32_t out = 0;
      for (int i = 0; i < 2; ++i) {
        const uint32_t from = ((Item *)all[(l % 4 * 2 + i) * 4 + l / 4 / 2])->in;
        out |= (l / 4 % 2 ? from >> 16 : from & 0xffff) << 16 * i;
      }
      ((Item *)all[l])->out = out;
    }
  });
  return item.out;
}
SNE_DEVICE float round_to_tf32(float v) {
  const uint32_t bits = bits_of_float(v);
  return (bits & 0x7f800000) == 0x7f800000 ? v : float_of_bits((bits + 0x1000) & 0xffffe000);
}
template <class T>
SNE_DEVICE uint32_t pack2(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

#else

template <class Op>
SNE_DEVICE void mma_k16(Tile &c, const uint32_t *a, const uint32_t *b);
template <class Op>
SNE_DEVICE void mma_k8(Tile &c, const uint32_t *a, const uint32_t *b);

#define SNE_MMA_PACKED(Op, type)                                                                                     \
  template <>                                                                                                        \
  __device__ __forceinline__ void mma_k16<Op>(Tile & c, const uint32_t *a, const uint32_t *b) {                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                       \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                 \
        : "+f"(c.c[0]), "+f"(c.c[1]), "+f"(c.c[2]), "+f"(c.c[3])                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                         \
  }                                                                                                                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void mma_k8<Op>(Tile & c, const uint32_t *a, const uint32_t *b) {                       \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"    \
        : "+f"(c.c[0]), "+f"(c.c[1]), "+f"(c.c[2]), "+f"(c.c[3])                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));                                                                          \
  }
SNE_MMA_PACKED(OpBfloat, "bf16")
SNE_MMA_PACKED(OpHalf, "f16")
#undef SNE_MMA_PACKED

SNE_DEVICE void mma_tf32(Tile &c, const float *a, const float *b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.c[0]), "+f"(c.c[1]), "+f"(c.c[2]), "+f"(c.c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
template <int count>
SNE_DEVICE void load_matrices(uint32_t *r, const void *row) {
  const uint32_t at = shared_address(row);
  if constexpr (count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
}
template <int count>
SNE_DEVICE void load_matrices_transposed(uint32_t *r, const void *row) {
  const uint32_t at = shared_address(row);
  if constexpr (count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
}
SNE_DEVICE uint32_t transpose8(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}
SNE_DEVICE float round_to_tf32(float v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return __uint_as_float(out);
}
template <class T>
SNE_DEVICE uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<BFloat>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ uint32_t pack2<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

#endif

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

// Columns 0..7 and 8..15 of 16 rows.
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

// Rows 0..7 (half 0) or 8..15 as the right operand of a product over columns.
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

// Columns 0..7 (half 0) or 8..15 as the right operand of a product over rows.
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

// c += a b over 16 columns of a.
template <class Op>
SNE_DEVICE void product(Tile &c, const Rows16<Op> &a, const Cols8<Op> &b) {
  if constexpr (Op::kPacked) {
    mma_k16<Op>(c, a.r, b.r);
  } else {
    detail::multiply8<Op>(c, a.r, b.r);
    detail::multiply8<Op>(c, a.r + 4, b.r + 2);
  }
}
// The same over the first 8 columns of a alone.
template <class Op>
SNE_DEVICE void product_left(Tile &c, const Rows16<Op> &a, const Cols8<Op> &b) {
  if constexpr (Op::kPacked)
    mma_k8<Op>(c, a.r, b.r);
  else
    detail::multiply8<Op>(c, a.r, b.r);
}

// --------------------------------------------------------------------------------- matrices stored as core matrices
//
// An N x K matrix in shared memory, each 8 rows x 16 bytes of it one piece of 128 bytes (a "core matrix"), those of 8
// rows one behind the other: what ldmatrix reads without bank conflicts and wgmma takes as it is.

template <class Op>
constexpr int kUnit = Op::kPacked ? 8 : 4;  // columns of 16 bytes
template <class Op>
constexpr int kSize = Op::kPacked ? 2 : 4;  // bytes of a value

// Where element (n, k) stands, in elements.
template <class Op>
SNE_HOST_DEVICE int64_t core_index(int64_t n, int64_t k, int64_t columns) {
  if (!Op::kPacked) k = k / 8 * 8 + (k % 2 * 4 + k % 8 / 2);
  return ((n / 8) * (columns / kUnit<Op>)+k / kUnit<Op>)*8 * kUnit<Op> + n % 8 * kUnit<Op> + k % kUnit<Op>;
}

// Rows 8 n8.. and columns 16 k16.. of a matrix of K columns, as right operand.
template <class Op>
SNE_DEVICE Cols8<Op> load_cols8(const void *matrix, int n8, int k16, int columns) {
  const unsigned char *at =
      (const unsigned char *)matrix + (n8 * (columns / kUnit<Op>)+k16 * (16 / kUnit<Op>)) * 128 + lane_id() * 16;
  Cols8<Op> out;
  if constexpr (Op::kPacked) {
    load_matrices<2>(out.r, at - (lane_id() & 16) * 16);  // lanes 16.. give no address of their own
  } else {
    uint32_t r[4];
    load_matrices<4>(r, at);
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) out.r[i] = float_of_bits(r[i]);
  }
  return out;
}
// Of a matrix of 8 columns: what product_left takes.
template <class Op>
SNE_DEVICE Cols8<Op> load_cols8_left(const void *matrix, int n8) {
  const unsigned char *at = (const unsigned char *)matrix + n8 * (8 / kUnit<Op>)*128;
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
// Two such steps, columns 32 k32..: one instruction for 16-bit operands.
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

// Rows g and g + 8, columns 2t and 2t + 1 of a 16 x 8 piece at `at`, whose rows are `stride` apart.
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
// 16 x 16 of them as operands; for 16-bit numbers nothing is converted.
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

SNE_DEVICE float sum_over_quad(float v) {  // over the lanes of one row
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}
SNE_DEVICE float max_over_quad(float v) {
  v = max_of(v, shuffle_xor(v, 1));
  return max_of(v, shuffle_xor(v, 2));
}

}  // namespace sne
