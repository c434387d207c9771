// Vectors of reals, from gcc's vector types: loads, broadcasts, maxima, exponentials, transposes.
#pragma once

#include <math.h>
#include <stdint.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "sne_fast/isa.h"

namespace sne::SNE_ISA {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(SNE_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(SNE_VECTOR_BYTES), aligned(4), may_alias));
  using Int = int32_t;
  typedef int32_t mask __attribute__((vector_size(SNE_VECTOR_BYTES)));
  typedef int32_t unaligned_mask __attribute__((vector_size(SNE_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(SNE_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(SNE_VECTOR_BYTES), aligned(8), may_alias));
  using Int = int64_t;
  typedef int64_t mask __attribute__((vector_size(SNE_VECTOR_BYTES)));
  typedef int64_t unaligned_mask __attribute__((vector_size(SNE_VECTOR_BYTES), aligned(8), may_alias));
};

// A compile-time number as an argument of generic lambdas.
template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Mask = typename VecOf<T>::mask;
template <class T>
using Int = typename VecOf<T>::Int;

template <class T>
constexpr int kLanes = SNE_VECTOR_BYTES / int(sizeof(T));

template <class T>
SNE_INLINE Vec<T> load(const T *p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned *>(p);
}
template <class T>
SNE_INLINE void store(T *p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned *>(p) = v;
}
// Loads the first n lanes, and zeros; stores the first n lanes.
#if defined(SNE_AVX512)
SNE_INLINE Vec<float> load_part(const float *p, long n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
SNE_INLINE Vec<double> load_part(const double *p, long n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
SNE_INLINE void store_part(float *p, long n, Vec<float> v) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
SNE_INLINE void store_part(double *p, long n, Vec<double> v) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#else
template <class T>
SNE_INLINE Vec<T> load_part(const T *p, long n) {
  T lanes[kLanes<T>] = {};
  for (long i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
SNE_INLINE void store_part(T *p, long n, Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (long i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif
// Returns a mask that is set in the first n lanes.
template <class T>
SNE_INLINE Mask<T> first_lanes(long n) {
  Mask<T> lane = {};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < Int<T>(n);
}
template <class T>
SNE_INLINE Mask<T> load_int(const Int<T> *p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned_mask *>(p);
}

template <class T>
SNE_INLINE Vec<T> splat(T s) {
  if constexpr (kLanes<T> == 2) return Vec<T>{s, s};
  if constexpr (kLanes<T> == 4) return Vec<T>{s, s, s, s};
  if constexpr (kLanes<T> == 8) return Vec<T>{s, s, s, s, s, s, s, s};
  if constexpr (kLanes<T> == 16) return Vec<T>{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
}

template <class T>
SNE_INLINE Vec<T> zero() {
  return Vec<T>{};
}

// Returns the larger of two, or b where either is NaN (as the x86 instruction does).
SNE_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
#if defined(SNE_AVX512)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SNE_ISA_avx2)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SNE_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) {
#if defined(SNE_AVX512)
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(SNE_ISA_avx2)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Returns v where the mask is set, 0 elsewhere.
template <class T>
SNE_INLINE Vec<T> keep(Mask<T> m, Vec<T> v) {
  return (Vec<T>)((Mask<T>)v & m);
}

template <class T>
SNE_INLINE Vec<T> vsqrt(Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) v[i] = __builtin_sqrt(double(v[i]));
  return v;
}
#if defined(SNE_AVX512)
template <>
SNE_INLINE Vec<float> vsqrt<float>(Vec<float> v) {
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
}
template <>
SNE_INLINE Vec<double> vsqrt<double>(Vec<double> v) {
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
}
#elif defined(SNE_ISA_avx2)
template <>
SNE_INLINE Vec<float> vsqrt<float>(Vec<float> v) {
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
}
template <>
SNE_INLINE Vec<double> vsqrt<double>(Vec<double> v) {
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
}
#endif

template <class T>
constexpr T kLog2e = T(1.4426950408889634073599L);

// The lowest finite number.
template <class T>
constexpr T kLowest = T(-3.40282346638528859812e38);
template <>
inline constexpr double kLowest<double> = -1.79769313486231570815e308;

// Bits as unsigned numbers, in which overflow is defined.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type __attribute__((vector_size(SNE_VECTOR_BYTES)));
  static constexpr int kFraction = 23;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type __attribute__((vector_size(SNE_VECTOR_BYTES)));
  static constexpr int kFraction = 52;
};

// Returns p 2^n where `seen`, 0 elsewhere. The low bits of `shifted` are n plus the bias of exponents. NaN stays NaN
// whatever its bits, as p is multiplied: added to p, they could make a number of it.
template <class T>
SNE_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> shifted, Mask<T> seen) {
  return keep<T>(seen, p * (Vec<T>)((typename BitsOf<T>::type)shifted << BitsOf<T>::kFraction));
}

// Returns 2^x for x <= 0 or moderately positive, with a relative error of 1e-7 (2e-16), and 0 for x below -100 (-1000):
// every caller adds it to a sum of at least one, and denormal numbers would be slow. NaN stays NaN.
#if defined(SNE_AVX512)
// Returns p 2^n, 0 where x is below -100: x and n are NaN together.
SNE_INLINE Vec<float> scale_by_integer(Vec<float> p, Vec<float> n, Vec<float> x) {
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
}
SNE_INLINE Vec<float> nearest_integer(Vec<float> x) { return (Vec<float>)_mm512_roundscale_ps((__m512)x, 0); }
#endif

SNE_INLINE Vec<float> vexp2(Vec<float> x) {
#if defined(SNE_AVX512)
  const Vec<float> n = nearest_integer(x), f = x - n;
#else
  const Mask<float> seen = ~(x < -100.0f);
  x = vmax(splat(-100.0f), x);
  // 1.5 * 2^23 + 127: adding it rounds to an integer in the low mantissa bits, with the bias of exponents.
  const Vec<float> magic = splat(12583039.0f);
  const Vec<float> shifted = x + magic, n = shifted - magic, f = x - n;
#endif
  Vec<float> p = splat(1.3276472e-3f);
  p = p * f + 9.6755413e-3f;
  p = p * f + 5.5507131e-2f;
  p = p * f + 2.4022233e-1f;
  p = p * f + 6.9314696e-1f;
  p = p * f + 1.0f;
#if defined(SNE_AVX512)
  return scale_by_integer(p, n, x);
#else
  return scale_by_power<float>(p, shifted, seen);
#endif
}
SNE_INLINE Vec<double> vexp2(Vec<double> x) {
  const Mask<double> seen = ~(x < -1000.0);
  x = vmax(splat(-1000.0), x);
  const Vec<double> magic = splat(6755399441056767.0);  // 1.5 * 2^52 + 1023
  const Vec<double> shifted = x + magic, n = shifted - magic, r = (x - n) * 0.69314718055994530942;
  Vec<double> p = splat(1.0 / 6227020800.0);  // Taylor of exp: |r| <= 0.347, so degree 13 leaves 4e-18
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return scale_by_power<double>(p, shifted, seen);
}

template <class T>
SNE_INLINE T horizontal_sum(Vec<T> v) {
  T s[kLanes<T>];
  store(s, v);
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) s[i] += s[i + step];
  return s[0];
}
template <class T>
SNE_INLINE T horizontal_max(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < kLanes<T>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Returns a mask with lanes 0..count-1 set.
template <class T>
SNE_INLINE Mask<T> first_lanes(int count) {
  Mask<T> iota;
  for (int i = 0; i < kLanes<T>; ++i) iota[i] = i;
  return iota < Int<T>(count);
}

// One stage of the butterfly that transposes kLanes x kLanes values: lane l of the new pair comes from a or b.
template <int STEP, int... L>
struct Exchange {
  template <class V>
  static SNE_INLINE void run(V &a, V &b) {
    constexpr int n = sizeof...(L);
    const V lo = __builtin_shufflevector(a, b, ((L & STEP) ? n + L - STEP : L)...);
    const V hi = __builtin_shufflevector(a, b, ((L & STEP) ? n + L : L + STEP)...);
    a = lo;
    b = hi;
  }
};
template <int STEP, class V>
SNE_INLINE void exchange(V &a, V &b) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  if constexpr (n == 2) Exchange<STEP, 0, 1>::run(a, b);
  if constexpr (n == 4) Exchange<STEP, 0, 1, 2, 3>::run(a, b);
  if constexpr (n == 8) Exchange<STEP, 0, 1, 2, 3, 4, 5, 6, 7>::run(a, b);
  if constexpr (n == 16) Exchange<STEP, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>::run(a, b);
}
template <int STEP, class V>
SNE_INLINE void exchange_all(V *r) {
  if constexpr (STEP >= 1) {
    constexpr int n = sizeof(V) / sizeof(r[0][0]);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if ((i & STEP) == 0) exchange<STEP>(r[i], r[i + STEP]);
    exchange_all<STEP / 2>(r);
  }
}
template <class T>
SNE_INLINE void transpose_registers(Vec<T> *r) {
  exchange_all<kLanes<T> / 2>(r);
}

// to[c * to_stride + r] = from[r * from_stride + c] for r, c < kLanes.
template <class T>
SNE_INLINE void transpose_square(const T *from, long from_stride, T *to, long to_stride) {
  Vec<T> r[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) r[i] = load(from + i * from_stride);
  transpose_registers<T>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) store(to + i * to_stride, r[i]);
}

}  // namespace sne::SNE_ISA
