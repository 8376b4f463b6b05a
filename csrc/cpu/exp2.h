// SPDX-License-Identifier: MIT
// 2^(d * scale) for d <= 0: d * scale = k / 2^b + f with k the nearest integer, and
//
//   2^(d * scale) = 2^(k >> b) * table[k mod 2^b] * p(f),  p(0) = 1
//
// where table[i] = 2^(i / 2^b). With a permutation of vectors at hand b is 3 and the table one register; it shortens p
// by three terms of six. Elsewhere, and for float64, b is 0 and there is no table. Coefficients are the minimax fit of
// (2^f - 1) / f in relative error on |f| <= 2^-(b + 1): 3e-8 in degree 3 and 3e-9 in degree 6 for float32, 2e-17 in
// degree 11 for float64, so what remains is the rounding of the evaluation.
//
// Adding `kRound` rounds d * scale to a multiple of 2^-b and leaves k, with the exponent's bias, in the low bits: a
// shift makes 2^(k >> b) of it, and bits of k that fall into the mantissa are taken back by the table's entry. The
// caller keeps d * scale from falling below kLowest, where the result is exactly zero; a NaN stays a NaN. The last step
// multiplies by the power of two, as adding to the exponent could make a number of a NaN. -ffast-math would fold the
// rounding away.
#pragma once

#include "simd.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class A>
struct Exp2Constants;
#if KPFUSED_PERMUTE
template <>
struct Exp2Constants<float> {
  static constexpr float kLowest = -127.0f;  // its power of two has a zero exponent field, that is, it is zero
  static constexpr float kRound = 0x1.8p20f + 127.0f;
  static constexpr int kShift = 20;
  static constexpr int kDegree = 3;
  static constexpr float kPolynomial[kDegree] = {0x1.c6a004p-5f, 0x1.ec0c32p-3f, 0x1.62e432p-1f};
  // The bits of 2^(i / 8), less those of 1 and less i << kShift.
  static constexpr int32_t kTable[8] = {0x00000, -0x46a3e, -0x7c810, -0xa0129, -0xafb0d, -0xa98d6, -0x8bb03, -0x53f39};
};
#else
template <>
struct Exp2Constants<float> {
  static constexpr float kLowest = -127.0f;
  static constexpr float kRound = 0x1.8p23f + 127.0f;
  static constexpr int kShift = 23;
  static constexpr int kDegree = 6;
  static constexpr float kPolynomial[kDegree] = {0x1.470b48p-13f, 0x1.5f7276p-10f, 0x1.3b270ep-7f,
                                                 0x1.c6ae72p-5f,  0x1.ebfbe2p-3f,  0x1.62e432p-1f};
};
#endif
template <>
struct Exp2Constants<double> {
  static constexpr double kLowest = -1023.0;
  static constexpr double kRound = 0x1.8p52 + 1023.0;
  static constexpr int kShift = 52;
  static constexpr int kDegree = 11;
  static constexpr double kPolynomial[kDegree] = {
      4.0780717860908704154e-10, 7.0725703945407994337e-9,  1.0180647660573069343e-7,  1.3215442675455852182e-6,
      0.00001525272738518977478, 0.00015403530440827007145, 0.001333355815343996974,   0.0096181291076070026171,
      0.055504108664790394528,   0.24022650695910098006,    0.69314718055994569475};
};

// Keeps a product out of fused multiply-adds. The weight goes into two sums: as a product it is computed once and added
// on units of its own, fused it would be computed twice. GCC 12 takes vectors of 64 bytes apart, element by element, for its
// own word for it.
#if KPFUSED_AVX512
#define KPFUSED_PRODUCT(x) in_register(x)
#elif defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define KPFUSED_PRODUCT(x) __builtin_assoc_barrier(x)
#endif
#endif
#ifndef KPFUSED_PRODUCT
#define KPFUSED_PRODUCT(x) (x)
#endif

// 2^(k >> b) * table[k mod 2^b] from the bits that the addition of kRound left.
template <class A>
KPFUSED_INLINE Vec<A> power_of_two(Vec<A> shifted) {
  return (Vec<A>)((Mask<A>)shifted << Exp2Constants<A>::kShift);
}
#if KPFUSED_PERMUTE
template <>
KPFUSED_INLINE Vec<float> power_of_two<float>(Vec<float> shifted) {
  using K = Exp2Constants<float>;
  const Mask<float> k = (Mask<float>)shifted;
  return (Vec<float>)((k << K::kShift) + lookup(K::kTable, k));
}
#endif

// d * scale as k and f. The product goes into fused multiply-adds where there are any, so that f is rounded once.
template <class A, int N>
struct Exponents {
  Vec<A> shifted[N], f[N];
};
template <class A, int N>
KPFUSED_INLINE Exponents<A, N> split(const Vec<A> (&d)[N], Vec<A> scale) {
  const Vec<A> round = splat(Exp2Constants<A>::kRound);
  Exponents<A, N> e;
  for (int j = 0; j < N; ++j) e.shifted[j] = d[j] * scale + round;
  for (int j = 0; j < N; ++j) e.f[j] = d[j] * scale - (e.shifted[j] - round);
  return e;
}

// What becomes of vector j of the results: all of it is kept.
struct KeepAll {
  template <class V>
  KPFUSED_INLINE V operator()(int, V v) const {
    return v;
  }
};

// N vectors a step at a time: compilers keep the order, and a scheduler full of one vector's chain of dependent
// instructions would have nothing else to start. What `kept` leaves out costs nothing where products take a mask along.
template <class A, int N, class Kept = KeepAll>
KPFUSED_INLINE void join(const Exponents<A, N>& e, Vec<A> (&w)[N], const Kept& kept = {}) {
  using K = Exp2Constants<A>;
  Vec<A> p[N];
  for (int j = 0; j < N; ++j) p[j] = e.f[j] * K::kPolynomial[0] + K::kPolynomial[1];
  for (int i = 2; i < K::kDegree; ++i) {
    for (int j = 0; j < N; ++j) p[j] = p[j] * e.f[j] + K::kPolynomial[i];
  }
  for (int j = 0; j < N; ++j) p[j] = p[j] * e.f[j] + A(1);
  for (int j = 0; j < N; ++j) w[j] = KPFUSED_PRODUCT(kept(j, p[j] * power_of_two<A>(e.shifted[j])));
}

// In place.
template <class A, int N, class Kept = KeepAll>
KPFUSED_INLINE void exp2(Vec<A> (&d)[N], Vec<A> scale, const Kept& kept = {}) {
  join<A, N>(split<A, N>(d, scale), d, kept);
}

// 2^t for any t <= 0.
template <class A>
KPFUSED_INLINE Vec<A> exp2(Vec<A> t) {
  Vec<A> one[1] = {maximum(splat(Exp2Constants<A>::kLowest), t)};
  exp2<A, 1>(one, splat(A(1)));
  return one[0];
}

// For the few rescalings outside the element loops.
struct ScalarExp2 {
  template <class A>
  KPFUSED_INLINE A operator()(A t) const {
    return exp2<A>(splat(t))[0];
  }
};

struct VectorExp2 {
  template <class V>
  KPFUSED_INLINE V operator()(V t) const {
    return exp2<__typeof__(t[0] + t[0])>(t);
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
