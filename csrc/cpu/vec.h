// SIMD vocabulary of the CPU kernels. Every kernel unit is compiled once per instruction set (see isa.h), each time in
// the namespace PYVIT_ISA, so that no inline function of one set can be linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyvit::PYVIT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

// Element types of the tensors. Arithmetic is float32 unless a tile is said to be bf16.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class T, class V>
inline void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline vf set1(float x) { return x - vf{}; }
inline vi set1i(int32_t x) { return x - vi{}; }
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline vf vabs(vf x) { return (vf)((vi)x & set1i(INT32_MAX)); }

// conversions
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(f16 h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = (h.bits >> 10) & 31, mantissa = h.bits & 1023, u;
  if (exponent == 31) {
    u = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    u = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float f = float(mantissa) * 0x1p-24f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 64)};  // keep NaN a NaN
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (u >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 2**16 and above; rounding carries the rest to infinity
  if (u < 0x38800000) {                                   // subnormal: adding 0.5 aligns the mantissa and rounds
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    float shifted = magnitude + 0.5f;
    std::memcpy(&u, &shifted, 4);
    return {uint16_t(sign | (u - 0x3f000000))};
  }
  u += 0xfff + ((u >> 13) & 1);
  return {uint16_t(sign | ((u - 0x38000000) >> 13))};
}

inline vu widen(vh x) {
#if defined(__AVX512F__)  // gcc makes four instructions of the conversion
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
// A vector of 16-bit elements to floats, and back, rounded to the nearest even.
template <class T>
vf widen_as(vh bits);
template <class T>
vh narrow_as(vf v);
template <>
inline vf widen_as<bf16>(vh bits) {
  return (vf)(widen(bits) << 16);
}
template <>
inline vh narrow_as<bf16>(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu result = (vu)((v != v) ? (vi)((u >> 16) | 64u) : (vi)rounded);
  return __builtin_convertvector(result, vh);
#endif
}
#if defined(__F16C__)
template <>
inline vf widen_as<f16>(vh bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)bits);
#else
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#endif
}
template <>
inline vh narrow_as<f16>(vf v) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, NEAREST);
#else
  return (vh)_mm256_cvtps_ph((__m256)v, NEAREST);
#endif
}
#else  // calls: what they do would outgrow the loops around them
template <>
__attribute__((noinline)) inline vf widen_as<f16>(vh bits) {
  vf v;
  for (int i = 0; i < W; i++) v[i] = to_float(f16{bits[i]});
  return v;
}
template <>
__attribute__((noinline)) inline vh narrow_as<f16>(vf v) {
  vh bits;
  for (int i = 0; i < W; i++) bits[i] = from_float<f16>(v[i]).bits;
  return bits;
}
#endif

inline vf load(const float* p) { return load_as<vf>(p); }
template <class T>
inline vf load(const T* p) {
  return widen_as<T>(load_as<vh>(p));
}
inline void store(float* p, vf v) { store_as(p, v); }
template <class T>
inline void store(T* p, vf v) {
  store_as(p, narrow_as<T>(v));
}

#if defined(__AVX512BW__)
inline vu interleave_halves(__m512i both) {
  static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}
#endif
// Pairs of 16-bit elements as 32-bit lanes, low first.
inline vu pair_lanes(vh low, vh high) {
#if defined(__AVX512BW__)
  return interleave_halves(_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1));
#else
  return widen(low) | widen(high) << 16;
#endif
}
// The same of values, rounded to bf16.
inline vu pair_lanes(vf low, vf high) {
#if defined(__AVX512BF16__)
  return interleave_halves((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  bf16 a[W], b[W];
  store(a, low);
  store(b, high);
  return pair_lanes(load_as<vh>(a), load_as<vh>(b));
#endif
}

// Two vectors of values, rounded to bf16, as pairs of neighbours.
inline vu round_in_order(vf first, vf second) {
#if defined(__AVX512BF16__)
  return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  bf16 both[2 * W];
  store(both, first);
  store(both + W, second);
  return load_as<vu>(both);
#endif
}

// -1 in the first n lanes, 0 in the rest.
inline vi first_lanes(int n) {
  vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane < set1i(n);
}
// The first n lanes of v, 0 in the rest.
inline vf keep_first(vf v, int n) { return first_lanes(n) ? v : vf{}; }

// The first n < W 16-bit elements, or n < 2 W of them as pairs; the rest are 0.
template <class T>
inline vh load_bits(const T* p, int n) {
#if defined(__AVX512BW__)
  return (vh)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
#else
  vh v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}
template <class T>
inline vu load_pairs(const T* p, int n) {
#if defined(__AVX512BW__)
  return (vu)_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
#else
  vu v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}

// The first n < W elements; the rest read as `fill` and are not touched by a store.
inline vf load_n(const float* p, int n, float fill = 0.f) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i mask = (__m256i)first_lanes(n);
  return (vf)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), (__m256)mask);
#else
  vf v = set1(fill);
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}
template <class T>
inline vf load_n(const T* p, int n) {
  return widen_as<T>(load_bits(p, n));
}
inline void store_n(float* p, vf v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}
template <class T>
inline void store_n(T* p, vf v, int n) {
  const vh bits = narrow_as<T>(v);
#if defined(__AVX512BW__)
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)bits);
#else
  std::memcpy(p, &bits, n * sizeof(T));
#endif
}

// body(column, elements there) for the vectors of a row, the last one perhaps shorter.
template <class F>
inline void vectors(int64_t cols, const F& body) {
  int64_t c = 0;
  for (; c + W <= cols; c += W) body(c, W);
  if (c < cols) body(c, int(cols - c));
}
// Up to a whole vector.
template <class T>
inline vf read(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
inline void write(T* p, vf v, int n) {
  n == W ? store(p, v) : store_n(p, v, n);
}

// reductions and exp2
inline float reduce_add(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
#endif
}
inline float reduce_max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX__)
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float s = v[0];
  for (int i = 1; i < W; i++) s = v[i] > s ? v[i] : s;
  return s;
#endif
}

// 1 / x for x in [1, 2**126]: relative error 1.2e-7, or 6.2e-5 with COARSE, for values about to be rounded to 16 bits.
// A division takes as long as ten multiplications.
template <bool COARSE = false>
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return COARSE ? r : r + r * (1.f - x * r);
#else
  return 1.f / x;
#endif
}

// 2**x for x up to 127; 0 where that is below float's range, also for -inf. Minimax polynomials of 2**f on [0, 1] that
// are 1 at 0: relative error 1.5e-7, or 3e-6 with COARSE, for values about to be rounded to 16 bits.
template <bool COARSE = false>
inline vf exp2v(vf x) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 for -inf
#else
  x = vmax(set1(-1000.f), x);  // in this order a NaN stays
#if defined(__AVX__)
  const vf n = (vf)_mm256_floor_ps((__m256)x);
#else
  const vf shift = set1(12582912.f);  // 1.5 * 2**23: adding it rounds to an integer
  const vf n = (x - 0.5f + shift) - shift;
#endif
  const vf f = x - n;
#endif
  vf p;
  if constexpr (COARSE) {
    p = set1(1.342668436e-02f);
    p = p * f + 5.224247403e-02f;
    p = p * f + 2.412802049e-01f;
    p = p * f + 6.930448449e-01f;
    p = p * f + 1.f;
  } else {
    p = set1(1.867130070e-03f);
    p = p * f + 9.017030322e-03f;
    p = p * f + 5.579991310e-02f;
    p = p * f + 2.401644502e-01f;
    p = p * f + 6.931513118e-01f;
    p = p * f + 1.f;
  }
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // of x's floor
#else
  vi e = __builtin_convertvector(n, vi);
  vf r = (vf)((vi)p + (e << 23));
  return n < -126.f ? vf{} : r;  // not asked of e, which is least for a NaN
#endif
}

// log2 of positive normal numbers: 2 atanh((m - 1) / (m + 1)) / ln 2 for the mantissa m in [sqrt(1/2), sqrt(2)).
inline vf log2v(vf x) {
  const vi e = (vi)((vu)x - 0x3f3504f3u) >> 23;
  const vf m = (vf)((vi)x - (e << 23));
  const vf t = (m - 1.f) / (m + 1.f), u = t * t;
  vf p = set1(2.f / 9.f * LOG2E);
  p = p * u + 2.f / 7.f * LOG2E;
  p = p * u + 2.f / 5.f * LOG2E;
  p = p * u + 2.f / 3.f * LOG2E;
  p = p * u + 2.f * LOG2E;
  return t * p + __builtin_convertvector(e, vf);
}

// Transposition of W x W 32-bit lanes, by exchanging blocks of 1, 2, 4, ... lanes.
template <int STEP, int... J>
inline void transpose_pair(vu& a, vu& b, std::integer_sequence<int, J...>) {
  vu low = __builtin_shufflevector(a, b, ((J & STEP) ? W + J - STEP : J)...);
  vu high = __builtin_shufflevector(a, b, ((J & STEP) ? W + J : J + STEP)...);
  a = low;
  b = high;
}
template <int STEP = 1>
inline void transpose(vu (&r)[W]) {
  if constexpr (STEP < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & STEP)) transpose_pair<STEP>(r[i], r[i + STEP], std::make_integer_sequence<int, W>{});
    transpose<STEP * 2>(r);
  }
}

}  // namespace pyvit::PYVIT_ISA
