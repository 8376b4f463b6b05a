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

}  // namespace kpfused
