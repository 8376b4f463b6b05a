// SPDX-License-Identifier: MIT
// The algebra of the fused soft-argmax, shared by the CPU and the CUDA kernels. No torch, no CUDA API.
//
// With logits h, inverse temperature beta and pixels r = (x, y) measured from the centre of the map:
//
//   key    k = h * sign(beta)                  so that the maximum of z = beta * h is always the maximum of the keys
//   peak   p = max k
//   weight w = exp2((k - p) * scale)           scale = |beta| * log2(e)
//   state  (p, sum w, sum w x, sum w y)        partial states merge associatively
//   mean   mu = (sum w x, sum w y) / sum w     soft-argmax, in centred pixels
//   dh     = beta * w / sum w * (g . (r - mu)) g: gradient with respect to mu
//   dbeta  = sum h * dh / beta = sign(beta) * sum (k - p) * w / sum w * (g . (r - mu)), because sum dh = 0
//
// The difference k - p is taken before it is scaled: it is exact near the peak, whatever the size of the logits, and no
// finite logit overflows. That is also why stats keep (peak, sum) and not their log-sum-exp, whose rounding at logits
// of 1e4 would already cost half a percent of P.
//
// With moments, the sums are about the pixel of the peak, near which the mass of a sharp map lies, and partial states
// move to the pixel of the higher peak when they merge: about the centre of the map, a covariance would lose all its
// digits to cancellation. The rest of the gradient is then a polynomial in the offset from the mean and in k - p.
//
// Degenerate maps: k = -inf has weight zero; a map without any weight gives 0 / 0 = NaN; NaN or k = +inf gives NaN.
#pragma once

#include "macros.h"

namespace kpfused {

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float lowest = -3.402823466e+38f;
  static constexpr float smallest_scale = 0x1p-121f;
};
template <>
struct Limits<double> {
  static constexpr double lowest = -1.7976931348623157e+308;
  static constexpr double smallest_scale = 0x1p-1013;
};

// beta split into what the element loop needs.
template <class T>
struct Sharpness {
  T sign;   // +1 or -1
  T scale;  // |beta| * log2(e), but never so small that the lowest number would not lie below weight zero
};

// With a scale of zero, -inf would weigh as much as any other logit. At the smallest scale, which is also that of
// beta = 0, it weighs nothing and finite logits up to 1e29 weigh the same.
template <class T>
KPFUSED_HD Sharpness<T> sharpness(T beta) {
  const T scale = (beta < T(0) ? -beta : beta) * T(1.4426950408889634074);
  // Written so that a NaN beta stays NaN.
  return {beta < T(0) ? T(-1) : T(1), scale < Limits<T>::smallest_scale ? Limits<T>::smallest_scale : scale};
}

template <class T>
struct State {
  T peak, sum, sum_x, sum_y;
};

// The state of no pixels. A finite peak keeps (peak - peak) * scale defined where every key of a part is -inf.
template <class T>
KPFUSED_HD State<T> empty_state() {
  return {Limits<T>::lowest, T(0), T(0), T(0)};
}

// Rescales a state to another peak. `exp2` is the caller's: the hardware instruction, libm's or a vector's.
template <class T, class Exp2>
KPFUSED_HD State<T> rebase(const State<T>& s, T peak, T scale, Exp2 exp2) {
  const T w = exp2((s.peak - peak) * scale);
  return {peak, s.sum * w, s.sum_x * w, s.sum_y * w};
}

// A NaN does not win over a number; it lives on in the sums.
template <class T>
KPFUSED_HD T larger(T a, T b) {
#if defined(__CUDA_ARCH__)
  return max(a, b);  // one instruction, where a comparison and a selection are two
#else
  return b > a ? b : a;
#endif
}

// Merges two partial states. Commutative in exact arithmetic; kernels call it in a fixed order.
template <class T, class Exp2>
KPFUSED_HD State<T> merge(const State<T>& a, const State<T>& b, T scale, Exp2 exp2) {
  const T peak = larger(a.peak, b.peak);
  const State<T> x = rebase(a, peak, scale, exp2), y = rebase(b, peak, scale, exp2);
  return {peak, x.sum + y.sum, x.sum_x + y.sum_x, x.sum_y + y.sum_y};
}

// What forward leaves for backward: kStats values, in this order.
template <class T>
struct Stats {
  T peak, sum, mean_x, mean_y;
};

template <class T>
KPFUSED_HD Stats<T> finish(const State<T>& s) {
  return {s.peak, s.sum, s.sum_x / s.sum, s.sum_y / s.sum};
}

// The backward polynomial q = X (x - mean x) + Y (y - mean y), with the map's 1 / sum folded into X and Y:
// dh = beta * w * q and dbeta = sign(beta) * sum (k - p) * w * q. Kept as two terms, each zero where the pixel is the
// mean: for a map of one certain pixel the gradient is zero to the bit.
template <class T>
struct Slope {
  T x, y, mean_x, mean_y;
  KPFUSED_HD T along_x(T at) const { return x * (at - mean_x); }
  KPFUSED_HD T along_y(T at) const { return y * (at - mean_y); }
};

// grad_x, grad_y: gradient with respect to the mean in centred pixels, i.e. upstream times Units::scale.
// factor: beta, or 1 for kernels that need q itself for dbeta.
template <class T>
KPFUSED_HD Slope<T> backward_slope(const Stats<T>& s, T grad_x, T grad_y, T factor) {
  return {grad_x / s.sum * factor, grad_y / s.sum * factor, s.mean_x, s.mean_y};
}

// The distance of a key below the peak as dbeta uses it: finite, so that weight zero times it is zero.
template <class T>
KPFUSED_HD T finite_distance(T d) {
  return d < Limits<T>::lowest ? Limits<T>::lowest : d;
}

// ---- Second moments, entropy and the peak's pixel -------------------------------------------------------------------

// V is A, or a vector of A where lanes hold different maps.
template <class A, class V = A>
struct Moments {
  V peak, sum;
  V at_x, at_y;         // the first pixel, in row order, whose key is the peak; centred
  V x, y, xx, xy, yy;   // sums of w times powers of the pixel's offset from it
  V distance;           // sum w (k - peak)
};

// The place of a peak that no pixel has: far behind all pixels, and finite when squared.
template <class A>
constexpr A kNowhere = A(0x1p40);

template <class A, class V = A>
KPFUSED_HD Moments<A, V> empty_moments() {
  const V zero{};
  return {zero + Limits<A>::lowest, zero, zero + kNowhere<A>, zero + kNowhere<A>, zero, zero, zero, zero, zero, zero};
}

// A state about another pixel and relative to a peak at least as high.
template <class A, class V, class Exp2>
KPFUSED_HD Moments<A, V> moved(const Moments<A, V>& s, V peak, V at_x, V at_y, V scale, Exp2 exp2) {
  const V down = s.peak - peak, w = exp2(down * scale), dx = s.at_x - at_x, dy = s.at_y - at_y;
  const V lowest = V{} + Limits<A>::lowest;
  Moments<A, V> m;
  m.peak = peak;
  m.at_x = at_x;
  m.at_y = at_y;
  m.sum = w * s.sum;
  m.x = w * (s.x + dx * s.sum);
  m.y = w * (s.y + dy * s.sum);
  m.xx = w * (s.xx + dx * (s.x + s.x + dx * s.sum));
  m.xy = w * (s.xy + dx * (s.y + dy * s.sum) + dy * s.x);
  m.yy = w * (s.yy + dy * (s.y + s.y + dy * s.sum));
  // Where there is no weight to lose, an infinite distance must not make a NaN.
  m.distance = w * s.distance + m.sum * (down > lowest ? down : lowest);
  return m;
}

// A peak and where it lies.
template <class A>
struct Place {
  A peak, at_x, at_y;
};

// Whether b's peak wins over a's: the higher one does; of equal ones, the first in row order.
template <class S>
KPFUSED_HD auto second_wins(const S& a, const S& b) {
  const auto sooner = (b.at_y < a.at_y) | ((b.at_y == a.at_y) & (b.at_x < a.at_x));
  return (b.peak > a.peak) | ((b.peak == a.peak) & sooner);
}

template <class A, class V, class Exp2>
KPFUSED_HD Moments<A, V> merge(const Moments<A, V>& a, const Moments<A, V>& b, V scale, Exp2 exp2) {
  const auto second = second_wins(a, b);
  const V peak = second ? b.peak : a.peak, at_x = second ? b.at_x : a.at_x, at_y = second ? b.at_y : a.at_y;
  const Moments<A, V> p = moved(a, peak, at_x, at_y, scale, exp2), q = moved(b, peak, at_x, at_y, scale, exp2);
  return {peak,        p.sum + q.sum, at_x,        at_y,        p.x + q.x,
          p.y + q.y,   p.xx + q.xx,   p.xy + q.xy, p.yy + q.yy, p.distance + q.distance};
}

// What forward leaves for backward: kMomentStats values, in this order. Pixels, from the centre of the map.
template <class A>
struct MomentStats {
  A peak, sum, mean_x, mean_y;
  A xx, xy, yy;  // covariance
  A distance;    // mean of k - peak
};

template <class A>
KPFUSED_HD MomentStats<A> finish(const Moments<A>& s) {
  const A x = s.x / s.sum, y = s.y / s.sum;
  const A xx = s.xx / s.sum - x * x, yy = s.yy / s.sum - y * y;
  // Rounding must not make a variance negative; a NaN stays one.
  return {s.peak, s.sum,
          s.at_x + x, s.at_y + y,
          xx < A(0) ? A(0) : xx, s.xy / s.sum - x * y, yy < A(0) ? A(0) : yy, s.distance / s.sum};
}

// P of the peak's pixel. The first quotient is 1, or NaN for a map without weight.
template <class A>
KPFUSED_HD A peak_probability(A sum) {
  return sum / sum / sum;
}

// Gradients with respect to the fields, in centred pixels and per map.
template <class A>
struct FieldGradients {
  A x, y, xx, xy, yy;  // xy: of both off-diagonal elements together
  A entropy, logsumexp, peak_probability;
};

// dz = w * q with q = constant + (x + xx dx + xy dy) dx + (y + yy dy) dy + distance (k - p), for the offset (dx, dy) from
// the mean and z = beta * h; and at the peak's pixel, where w is 1, q is greater by `at_peak`. All with 1 / sum folded in.
template <class A>
struct Polynomial {
  A constant, x, y, xx, xy, yy, distance, at_peak, mean_x, mean_y;

  KPFUSED_HD A along_x(A at) const {
    const A dx = at - mean_x;
    return constant + dx * (x + xx * dx);
  }
  KPFUSED_HD A along_y(A at) const {
    const A dy = at - mean_y;
    return dy * (y + yy * dy);
  }
  KPFUSED_HD A along_both(A at) const { return xy * (at - mean_x); }  // times dy
  // At a pixel whose key is the peak.
  KPFUSED_HD A value_at_peak(A at_x, A at_y) const {
    return along_x(at_x) + along_y(at_y) + along_both(at_x) * (at_y - mean_y) + at_peak;
  }
};

// The gradients of the table in the documentation of spatial_moments2d, summed and sorted by powers. entropy is
// log(sum) - |beta| * mean (k - p), logsumexp is |beta| p + log(sum), and the peak's probability 1 / sum.
template <class A>
KPFUSED_HD Polynomial<A> backward_polynomial(const MomentStats<A>& s, const FieldGradients<A>& g, A beta, A factor) {
  const A magnitude = beta < A(0) ? -beta : beta, f = factor / s.sum, chance = g.peak_probability / s.sum;
  const A constant = magnitude * g.entropy * s.distance + g.logsumexp - chance - g.xx * s.xx - g.xy * s.xy - g.yy * s.yy;
  return {f * constant, f * g.x,  f * g.y, f * g.xx, f * g.xy, f * g.yy, -f * magnitude * g.entropy, f * g.peak_probability,
          s.mean_x,     s.mean_y};
}

}  // namespace kpfused
