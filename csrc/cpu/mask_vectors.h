// SPDX-License-Identifier: MIT
// Masks as vectors see them: bytes and bits of pixels, one from the other, and vectors of which some lanes count.
#pragma once

#include <type_traits>

#include "simd.h"

namespace kpfused::cpu::KPFUSED_ISA {

// An element's bits.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
constexpr int kElements = kVectorBytes / int(sizeof(T));
template <class T>
using BitsVector = typename VectorOf<Bits<T>>::type;
template <class T>
using SignedVector = typename VectorOf<std::make_signed_t<Bits<T>>>::type;

// As many bytes as a vector has elements, each as wide as an element, its first bit repeated. GCC takes
// __builtin_convertvector apart.
template <class T>
KPFUSED_INLINE BitsVector<T> load_bytes(const uint8_t* p) {
#if KPFUSED_AVX2
  if constexpr (sizeof(T) == 8) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return (BitsVector<T>)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(bits));
  }
  if constexpr (sizeof(T) == 4) return (BitsVector<T>)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (sizeof(T) == 2) return (BitsVector<T>)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif KPFUSED_SSE2
  // Doubling a byte fills what is above it with it; masks are all zeros or ones, and elsewhere only zero matters.
  int64_t bits = 0;
  __builtin_memcpy(&bits, p, kElements<T>);
  __m128i v = _mm_cvtsi64_si128(bits);
  v = _mm_unpacklo_epi8(v, v);
  if constexpr (sizeof(T) >= 4) v = _mm_unpacklo_epi16(v, v);
  if constexpr (sizeof(T) == 8) v = _mm_unpacklo_epi32(v, v);
  return (BitsVector<T>)v;
#else
  typedef int8_t Bytes __attribute__((vector_size(kElements<T>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return (BitsVector<T>)__builtin_convertvector(bytes, SignedVector<T>);
#endif
}

// As many bytes of a mask as fill a vector.
typedef uint8_t ByteVector __attribute__((vector_size(kVectorBytes)));
KPFUSED_INLINE ByteVector load_mask(const uint8_t* p) {
  ByteVector bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}
// One in place of each byte that is not zero.
template <class V>
KPFUSED_INLINE V ones(V bytes) {
  static_assert(sizeof(V{}[0]) == 1);
  const V one = V{} + 1;
#if KPFUSED_AVX512
  if constexpr (sizeof(V) == 64) return (V)_mm512_min_epu8((__m512i)bytes, (__m512i)one);
#endif
#if KPFUSED_AVX512 || KPFUSED_AVX2
  if constexpr (sizeof(V) == 32) return (V)_mm256_min_epu8((__m256i)bytes, (__m256i)one);
  if constexpr (sizeof(V) == 16) return (V)_mm_min_epu8((__m128i)bytes, (__m128i)one);
#endif
  return (V)(bytes != 0) & one;
}

#if KPFUSED_AVX512
// A bit for each byte of a mask.
KPFUSED_INLINE __mmask64 set_bits(__m512i bytes) { return _mm512_test_epi8_mask(bytes, bytes); }
#endif

// v where the byte is not zero, else `otherwise`.
template <class T>
KPFUSED_INLINE BitsVector<T> choose(const uint8_t* mask, BitsVector<T> v, BitsVector<T> otherwise) {
#if KPFUSED_AVX512
  // From bytes to mask registers, without vectors in between.
  const __m512i yes = (__m512i)v, no = (__m512i)otherwise;
  if constexpr (sizeof(T) == 2) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)mask);
    return (BitsVector<T>)_mm512_mask_blend_epi16(_mm256_test_epi8_mask(bytes, bytes), no, yes);
  } else {
    const __m128i bytes = sizeof(T) == 4 ? _mm_loadu_si128((const __m128i*)mask) : _mm_loadl_epi64((const __m128i*)mask);
    const __mmask16 chosen = _mm_test_epi8_mask(bytes, bytes);
    return (BitsVector<T>)(sizeof(T) == 4 ? _mm512_mask_blend_epi32(chosen, no, yes)
                                          : _mm512_mask_blend_epi64(__mmask8(chosen), no, yes));
  }
#else
  return load_bytes<T>(mask) != 0 ? v : otherwise;
#endif
}

// Which lanes of a vector count, as one word: a bit for each where there are mask registers, elsewhere a byte of ones.
#if KPFUSED_AVX512
template <class A>
using LaneWord = std::conditional_t<sizeof(A) == 8, uint8_t, uint16_t>;
#else
__extension__ typedef unsigned __int128 Uint128;
template <class A>
using LaneWord = std::conditional_t<
    kLanes<A> == 16, Uint128,
    std::conditional_t<kLanes<A> == 8, uint64_t, std::conditional_t<kLanes<A> == 4, uint32_t, uint16_t>>>;
#endif
static_assert(8 * sizeof(LaneWord<float>) == kLanes<float> || sizeof(LaneWord<float>) == kLanes<float>);
static_assert(8 * sizeof(LaneWord<double>) == kLanes<double> || sizeof(LaneWord<double>) == kLanes<double>);

// Eight bits, each as a byte of its own, zero or one: the lowest first in memory.
KPFUSED_INLINE uint64_t spread_bits(uint32_t bits) {
  // All of them in each byte, of which its own is left, and carried to the byte's highest bit.
  const uint64_t own = (bits & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
  return (own + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

// A byte for each bit, zero or one.
KPFUSED_INLINE void unpack_bits(const uint8_t* bits, int64_t count, uint8_t* to) {
  int64_t i = 0;
#if KPFUSED_AVX512
  for (; i + 8 <= count; i += 8) {
    uint64_t set;
    __builtin_memcpy(&set, bits + i, sizeof(set));
    _mm512_storeu_si512(to + i * 8, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(1)));
  }
#elif KPFUSED_AVX2
  const __m256i index = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201u));
  for (; i + 4 <= count; i += 4) {
    int32_t set;
    __builtin_memcpy(&set, bits + i, sizeof(set));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(set), index), bit);
    _mm256_storeu_si256((__m256i*)(to + i * 8), _mm256_min_epu8(own, _mm256_set1_epi8(1)));
  }
#endif
  for (; i < count; ++i) {
    const uint64_t bytes = spread_bits(bits[i]);
    __builtin_memcpy(to + i * 8, &bytes, sizeof(bytes));
  }
}

// From a bit for each lane.
template <class A>
KPFUSED_INLINE LaneWord<A> lane_word(uint32_t bits) {
  const auto spread = [](uint32_t eight) { return LaneWord<A>(spread_bits(eight) * 0xff); };
  if constexpr (sizeof(LaneWord<A>) < kLanes<A>) {
    return LaneWord<A>(bits);
  } else if constexpr (kLanes<A> > 8) {
    return spread(bits) | spread(bits >> 8) << 64;
  } else {
    return spread(bits);
  }
}

// v in the lanes that count, elsewhere `otherwise`. `word` need not be aligned.
template <class A>
KPFUSED_INLINE Vec<A> choose_lanes(const void* word, Vec<A> v, Vec<A> otherwise) {
#if KPFUSED_AVX512
  LaneWord<A> lanes;
  __builtin_memcpy(&lanes, word, sizeof(lanes));
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_mask_mov_ps((__m512)otherwise, lanes, (__m512)v);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm512_mask_mov_pd((__m512d)otherwise, lanes, (__m512d)v);
#else
  const BitsVector<A> lanes = load_bytes<A>(static_cast<const uint8_t*>(word));
#if KPFUSED_AVX2
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_blendv_ps((__m256)otherwise, (__m256)v, (__m256)lanes);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm256_blendv_pd((__m256d)otherwise, (__m256d)v, (__m256d)lanes);
#endif
  return (Vec<A>)(((BitsVector<A>)v & lanes) | ((BitsVector<A>)otherwise & ~lanes));
#endif
}

// Likewise, zero elsewhere.
template <class A>
KPFUSED_INLINE Vec<A> keep_lanes(const void* word, Vec<A> v) {
#if KPFUSED_AVX512
  return choose_lanes<A>(word, v, Vec<A>{});
#else
  return (Vec<A>)((BitsVector<A>)v & load_bytes<A>(static_cast<const uint8_t*>(word)));
#endif
}

}  // namespace kpfused::cpu::KPFUSED_ISA
