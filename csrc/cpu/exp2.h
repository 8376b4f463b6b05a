// SPDX-License-Identifier: MIT
// 2^t for t <= 0, one polynomial a vector: t = n + f with n the nearest integer, 2^t = 2^n * p(f), p(0) = 1.
//
// Coefficients are the minimax fit of (2^f - 1) / f in relative error on [-1/2, 1/2]: 3e-9 in degree 6 for float32,
// 2e-17 in degree 11 for float64, so what remains is the rounding of the evaluation. Below the range of normal numbers
// the result is exactly zero, from -inf too, and a NaN stays a NaN. Adding `kRound` rounds t to an integer and leaves
// that integer, with the exponent's bias, in the low bits: a shift makes 2^n of it. The last step multiplies by it, as
// adding to the exponent could make a number of a NaN. -ffast-math would fold the rounding away.
#pragma once

#include "simd.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class A>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kLowest = -127.0f;  // 2^n has a zero exponent field, that is, it is zero
  static constexpr float kRound = 0x1.8p23f + 127.0f;
  static constexpr int kShift = 23;
  static constexpr int kDegree = 6;
  static constexpr float kPolynomial[kDegree] = {0x1.470b48p-13f, 0x1.5f7276p-10f, 0x1.3b270ep-7f,
                                                 0x1.c6ae72p-5f,  0x1.ebfbe2p-3f,  0x1.62e432p-1f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double kLowest = -1023.0;
  static constexpr double kRound = 0x1.8p52 + 1023.0;
  static constexpr int kShift = 52;
  static constexpr int kDegree = 11;
  static constexpr double kPolynomial[kDegree] = {
      4.0780717860928704154e-10, 7.0725703945407994337e-9,  1.0180647660573069343e-7,  1.3215442675452855182e-6,
      0.00001525272738518977478, 0.00015403530440827007145, 0.001333355815343996974,   0.0096181291076070026171,
      0.055504108664790394528,   0.24022650695910098006,    0.69314718055994569675};
};

// Keeps a product out of fused multiply-adds. The weight goes into two sums: as a product it is computed once and added
// on units of its own, fused it would be computed twice.
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define KPFUSED_PRODUCT(x) __builtin_assoc_barrier(x)
#endif
#endif
#ifndef KPFUSED_PRODUCT
#define KPFUSED_PRODUCT(x) (x)
#endif

// In place, N vectors a step at a time: compilers keep the order, and a scheduler full of one vector's chain of
// dependent instructions would have nothing else to start.
template <class A, int N>
KPFUSED_INLINE void exp2(Vec<A> (&t)[N]) {
  using K = Exp2Constants<A>;
  const Vec<A> lowest = splat(K::kLowest), round = splat(K::kRound);
  Vec<A> shifted[N], p[N];
  for (int j = 0; j < N; ++j) t[j] = maximum(lowest, t[j]);
  for (int j = 0; j < N; ++j) shifted[j] = t[j] + round;
  for (int j = 0; j < N; ++j) t[j] = t[j] - (shifted[j] - round);
  for (int j = 0; j < N; ++j) p[j] = t[j] * K::kPolynomial[0] + K::kPolynomial[1];
  for (int i = 2; i < K::kDegree; ++i) {
    for (int j = 0; j < N; ++j) p[j] = p[j] * t[j] + K::kPolynomial[i];
  }
  for (int j = 0; j < N; ++j) p[j] = p[j] * t[j] + A(1);
  for (int j = 0; j < N; ++j) t[j] = KPFUSED_PRODUCT(p[j] * (Vec<A>)((Mask<A>)shifted[j] << K::kShift));
}

template <class A>
KPFUSED_INLINE Vec<A> exp2(Vec<A> t) {
  Vec<A> one[1] = {t};
  exp2<A, 1>(one);
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
