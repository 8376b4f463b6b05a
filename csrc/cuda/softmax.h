// SPDX-License-Identifier: MIT
// P, the softmax of one map, an element at a time.
#pragma once

#include "../fields.h"
#include "element.h"

namespace kpfused::cuda {

// What P needs of one map; nothing of one that holds it.
template <class A>
struct Softmax {
  A sign, scale, peak, inverse;  // 1 / sum
  bool is_held, empty;

  KPFUSED_DEVICE A distance(A logit) const { return logit * sign - peak; }
  KPFUSED_DEVICE A operator()(A logit) const {
    return is_held ? logit : Exp2{}(distance(logit) * scale) * inverse;
  }
};

template <class A>
KPFUSED_DEVICE Stats<A> stats_of(const SoftmaxParams& p, int64_t n) {
  return *reinterpret_cast<const Stats<A>*>(static_cast<const A*>(p.stats) + n * p.stats_stride);
}

template <class A>
KPFUSED_DEVICE Softmax<A> softmax_of(const Stats<A>& stats, A beta) {
  const Sharpness<A> sharp = sharpness(beta);
  return {sharp.sign, sharp.scale, stats.peak, A(1) / stats.sum, false, false};
}

template <class A>
KPFUSED_DEVICE Softmax<A> softmax_of(const SoftmaxParams& p, int64_t n) {
  if (p.holds == Holds::probabilities) return {A(1), A(1), A(0), A(1), true, false};
  const Stats<A> stats = stats_of<A>(p, n);
  Softmax<A> softmax = softmax_of(stats, beta_of<A>(p.beta, n));
  softmax.is_held = p.holds == Holds::softmax;
  softmax.empty = is_empty(p.pixels, stats.sum);
  return softmax;
}

// N rows, ty apart, of which the first `rows` are read.
template <int N, class T>
KPFUSED_DEVICE void load_logits(const T* p, int64_t step, int rows, int ty, Acc<T> (&logit)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) logit[i] = i * ty < rows ? widen(p[i * step]) : Acc<T>(0);
}

}  // namespace kpfused::cuda
