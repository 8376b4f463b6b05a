// SPDX-License-Identifier: MIT
// Vectors of whatever width the including file asks for (KPFUSED_VECTOR_BYTES), over the GCC and Clang vector
// extensions, with intrinsics only where the extensions have no good word: half precision and reductions.
//
// The file is compiled once per instruction set, each time in a namespace of its own (KPFUSED_ISA), so that no function
// with AVX instructions in it can be linked in place of another's.
#pragma once

#include <type_traits>

#include "plan.h"

// Vectors only ever go to functions that are inlined: how they would be passed does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace kpfused::cpu::KPFUSED_ISA {

// Bits of masks become bytes in words.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kpfused's CPU kernels need a little-endian machine");

constexpr int kVectorBytes = KPFUSED_VECTOR_BYTES;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Accumulator = float;
  using Int = int32_t;
};
template <>
struct Traits<double> {
  using Accumulator = double;
  using Int = int64_t;
};
template <>
struct Traits<Half> {
  using Accumulator = float;
};
template <>
struct Traits<BFloat16> {
  using Accumulator = float;
};

// What elements of type T are computed in.
template <class T>
using Acc = typename Traits<T>::Accumulator;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using Mask = Vec<typename Traits<A>::Int>;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
KPFUSED_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // x - 0 keeps every value, -0 and NaN included
}

template <class A>
KPFUSED_INLINE Vec<A> load_vector(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
KPFUSED_INLINE void store_vector(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The same vector, of which compilers then know no more than that a register holds it: they do not read it again, nor make it
// part of another operation. For operations of x86, which can take an operand from memory.
template <class V>
KPFUSED_INLINE V in_register(V v) {
#if KPFUSED_AVX512 || KPFUSED_AVX2 || KPFUSED_SSE2
  asm("" : "+v"(v));
#endif
  return v;
}

// 0, 1, 2, ...
template <class A>
KPFUSED_INLINE Vec<A> iota() {
  A values[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) values[i] = A(i);
  return load_vector(values);
}

// All bits set in the last `count` lanes.
template <class A>
KPFUSED_INLINE Mask<A> last_lanes(int64_t count) {
  return iota<A>() >= splat(A(kLanes<A> - count));
}

// The larger; where either is NaN, b. Compilers do not see through a comparison with a constant, hence the intrinsics.
#if KPFUSED_AVX512
KPFUSED_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
KPFUSED_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
}
#elif KPFUSED_AVX2
KPFUSED_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
KPFUSED_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
}
#elif KPFUSED_SSE2
KPFUSED_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b); }
KPFUSED_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm_max_pd((__m128d)a, (__m128d)b);
}
#else
KPFUSED_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
KPFUSED_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
#endif

// An entry of a table of eight for every lane, chosen by the low three bits of its index.
#if KPFUSED_AVX2 || KPFUSED_AVX512
#define KPFUSED_PERMUTE 1
KPFUSED_INLINE Mask<float> lookup(const int32_t (&table)[8], Mask<float> index) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
#if KPFUSED_AVX512  // takes four bits of the index: both halves hold the table
  return (Mask<float>)_mm512_permutexvar_epi32((__m512i)index, _mm512_broadcast_i64x4(entries));
#else
  return (Mask<float>)_mm256_permutevar8x32_epi32(entries, (__m256i)index);
#endif
}
#else
#define KPFUSED_PERMUTE 0
#endif

// Lanes of a vector, chosen by their indices.
#if KPFUSED_AVX512
KPFUSED_INLINE Vec<float> permute(Vec<float> v, Mask<float> index) {
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
}
KPFUSED_INLINE Vec<double> permute(Vec<double> v, Mask<double> index) {
  return (Vec<double>)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
}
#elif KPFUSED_AVX2
KPFUSED_INLINE Vec<float> permute(Vec<float> v, Mask<float> index) {
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
}
KPFUSED_INLINE Vec<double> permute(Vec<double> v, Mask<double> index) {  // in halves of elements
  const Mask<double> halves = (index << 1) + (index << 33) + (int64_t(1) << 32);
  return (Vec<double>)_mm256_permutevar8x32_epi32((__m256i)v, (__m256i)halves);
}
#else
template <class V, class I>
KPFUSED_INLINE V permute(V v, I index) {
  V chosen;
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) chosen[i] = v[index[i]];
  return chosen;
}
#endif

// Zero where the mask is not set, whatever was there.
template <class A>
KPFUSED_INLINE Vec<A> keep(Vec<A> v, Mask<A> mask) {
  return (Vec<A>)((Mask<A>)v & mask);
}

// Whether a bit of any lane is set.
template <class A>
KPFUSED_INLINE bool any(Mask<A> mask) {
#if KPFUSED_AVX512
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif KPFUSED_AVX2
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
  const Words words = (Words)mask;
  uint64_t all = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) all |= words[i];
  return all != 0;
#endif
}

// A bit for every lane whose mask is set, the first lane's the lowest.
template <class A>
KPFUSED_INLINE uint32_t lane_bits(Mask<A> mask) {
#if KPFUSED_AVX512
  return sizeof(A) == 8 ? _mm512_movepi64_mask((__m512i)mask) : _mm512_movepi32_mask((__m512i)mask);
#elif KPFUSED_AVX2
  return sizeof(A) == 8 ? _mm256_movemask_pd((__m256d)mask) : _mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
#endif
}

// ---- Elements to vectors of their accumulator, and back, at any alignment -------------------------------------------

KPFUSED_INLINE Vec<float> load(const float* p) { return load_vector(p); }
KPFUSED_INLINE Vec<double> load(const double* p) { return load_vector(p); }
KPFUSED_INLINE void store(float* p, Vec<float> v) { store_vector(p, v); }
KPFUSED_INLINE void store(double* p, Vec<double> v) { store_vector(p, v); }

KPFUSED_INLINE VecU32 load_u16(const void* p) {
  VecU16 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, VecU32);
}

// The low halves of the lanes, which hold nothing above them.
KPFUSED_INLINE void store_u16(void* p, VecU32 v) {
#if KPFUSED_AVX2
  const __m256i wide = (__m256i)v;
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
#else
  const VecU16 narrow = __builtin_convertvector(v, VecU16);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
#endif
}

KPFUSED_INLINE Vec<float> load(const BFloat16* p) { return (Vec<float>)(load_u16(p) << 16); }

// Rounds to nearest even; a NaN stays one, quiet.
KPFUSED_INLINE void store(BFloat16* p, Vec<float> v) {
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  store_u16(p, ((VecU32)(v == v ? (Vec<float>)rounded : (Vec<float>)(bits | 0x400000))) >> 16);
}

#if KPFUSED_AVX2
KPFUSED_INLINE Vec<float> load(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KPFUSED_INLINE void store(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif KPFUSED_AVX512
KPFUSED_INLINE Vec<float> load(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KPFUSED_INLINE void store(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Shifts the fields into place and lets a multiplication correct the exponent, which serves subnormals as well.
KPFUSED_INLINE Vec<float> load(const Half* p) {
  const VecU32 bits = load_u16(p), magnitude = (bits & 0x7fff) << 13;
  const VecU32 number = (VecU32)((Vec<float>)magnitude * 0x1p112f), special = magnitude | 0x7f800000;
  return (Vec<float>)((magnitude < 0x0f800000 ? number : special) | (bits & 0x8000) << 16);
}
// Rounds to nearest even. For subnormals the addition of 0.5, whose last bit is their step, does the rounding.
KPFUSED_INLINE void store(Half* p, Vec<float> v) {
  const VecU32 bits = (VecU32)v, magnitude = bits & 0x7fffffff;
  const VecU32 normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const VecU32 subnormal = (VecU32)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  const VecU32 zero = {}, infinity = zero + 0x7c00, nan = zero + 0x7e00;
  VecU32 half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? infinity : half;
  half = magnitude > 0x7f800000 ? nan : half;
  store_u16(p, half | (bits & 0x80000000) >> 16);
}
#endif

// ---- The first lanes alone, as where a run ends -----------------------------------------------------------------------

// The first `count` elements, and `fill` in the lanes behind them. Nothing beyond is read.
template <class T>
KPFUSED_INLINE Vec<Acc<T>> load_first(const T* p, int64_t count, Vec<Acc<T>> fill) {
  constexpr int L = kLanes<Acc<T>>;
#if KPFUSED_AVX512
  const unsigned some = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_mask_loadu_ps((__m512)fill, __mmask16(some), p);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm512_mask_loadu_pd((__m512d)fill, __mmask8(some), p);
  if constexpr (sizeof(T) == 2) {
    T elements[L];
    _mm256_storeu_si256((__m256i*)elements, _mm256_maskz_loadu_epi16(__mmask16(some), p));
    return (Vec<float>)_mm512_mask_blend_ps(__mmask16(some), (__m512)fill, (__m512)load(elements));
  }
#endif
  T elements[L];
  store(elements, fill);
  for (int64_t i = 0; i < count; ++i) elements[i] = p[i];
  return load(elements);
}

template <class T>
KPFUSED_INLINE void store_first(T* p, int64_t count, Vec<Acc<T>> v) {
  constexpr int L = kLanes<Acc<T>>;
#if KPFUSED_AVX512
  const unsigned some = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, __mmask16(some), (__m512)v);
  if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(p, __mmask8(some), (__m512d)v);
#endif
  T elements[L];
  store(elements, v);
#if KPFUSED_AVX512
  if constexpr (sizeof(T) == 2) {
    return _mm256_mask_storeu_epi16(p, __mmask16(some), _mm256_loadu_si256((const __m256i*)elements));
  }
#endif
  for (int64_t i = 0; i < count; ++i) p[i] = elements[i];
}

// ---- Reductions over the lanes, in a fixed order --------------------------------------------------------------------

template <class A>
struct Triple {
  A sum, x, y;
};

template <class A>
KPFUSED_INLINE A reduce_sum(Vec<A> v) {
  A values[kLanes<A>];
  store_vector(values, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

template <class A>
KPFUSED_INLINE A reduce_max(Vec<A> v) {
  A values[kLanes<A>];
  store_vector(values, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] = values[i + half] > values[i] ? values[i + half] : values[i];
  }
  return values[0];
}

template <class A>
KPFUSED_INLINE Triple<A> reduce(Vec<A> sum, Vec<A> x, Vec<A> y) {
  return {reduce_sum<A>(sum), reduce_sum<A>(x), reduce_sum<A>(y)};
}

#if KPFUSED_AVX2 || KPFUSED_AVX512
#if KPFUSED_AVX512
KPFUSED_INLINE __m256 half_sum(Vec<float> v) {
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
}
KPFUSED_INLINE __m256 half_max(Vec<float> v) {
  return _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
}
#else
KPFUSED_INLINE __m256 half_sum(Vec<float> v) { return (__m256)v; }
KPFUSED_INLINE __m256 half_max(Vec<float> v) { return (__m256)v; }
#endif

// Small maps spend as much on the reductions as on their elements: three horizontal additions serve all three sums.
template <>
KPFUSED_INLINE Triple<float> reduce<float>(Vec<float> sum, Vec<float> x, Vec<float> y) {
  const __m256 s = half_sum(sum), b = half_sum(y);
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(s, half_sum(x)), _mm256_hadd_ps(b, b));
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  return {all[0], all[1], all[2]};
}

template <>
KPFUSED_INLINE float reduce_sum<float>(Vec<float> v) {
  const __m256 a = half_sum(v);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_add_ss(s, _mm_movehdup_ps(s))[0];
}

template <>
KPFUSED_INLINE float reduce_max<float>(Vec<float> v) {
  const __m256 a = half_max(v);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_max_ss(m, _mm_movehdup_ps(m))[0];
}
#endif

}  // namespace kpfused::cpu::KPFUSED_ISA
