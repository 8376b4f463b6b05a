// SPDX-License-Identifier: MIT
// Backward of the softmax from P itself, dh_i = beta P_i (g_i - sum_j P_j g_j), of maps and gradients that are runs of pixels.
// Nothing is worked out but sums and products, so that memory sets the pace: two readings, the second of what is still near,
// and no buffers.
#pragma once

#include "expectation.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Where the last vector of a map begins, if it is not whole, and how many pixels it has. Taken out of an object ahead of
// loops that write: compilers would read it anew after every vector.
template <class T>
struct LastVector {
  using A = Acc<T>;
  int64_t begin, pixels;

  static KPFUSED_INLINE LastVector of(int64_t pixels) { return {pixels / kLanes<A> * kLanes<A>, pixels % kLanes<A>}; }

  // What there is of it, and zeros.
  KPFUSED_INLINE Vec<A> get(const T* from) const { return load_first(from + begin, pixels, Vec<A>{}); }
  // Vector i of a result.
  KPFUSED_INLINE void put(Vec<A> v, T* to, int64_t i) const {
    prefetch_for_write(to + i, kWriteAhead);
    i == begin ? store_first(to + i, pixels, v) : store(to + i, v);
  }
};

// Whether these steps are that: values of one channel, which are g, and ones for their upstream gradient.
KPFUSED_INLINE bool is_softmax_gradient(const ExpectationSteps& steps) {
  const ExpectationHeatmapParams* const h = steps.heatmap;
  return steps.expectation && h && !h->grad && h->softmax.holds == Holds::softmax && h->values.view.channels == 1;
}

// sum_j P_j g_j, with the sums of add_products(), tile by tile.
template <class T>
KPFUSED_INLINE Acc<T> mean_of_gradient(const T* p, const T* g, int64_t pixels) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const auto rest = LastVector<T>::of(pixels);
  A mean = A(0);
  for (int64_t first = 0; first < pixels; first += kTile<A>) {
    const int64_t end = first + kTile<A>, last = at_most(end, rest.begin);
    Vec<A> even = {}, odd = {};
    const auto add = [&](int64_t i, Vec<A>& sum) __attribute__((always_inline)) {
      prefetch(p + i, kReadAhead), prefetch(g + i, kReadAhead);
      sum += load(p + i) * load(g + i);
    };
    int64_t i = first;
    for (; i + 2 * L <= last; i += 2 * L) add(i, even), add(i + L, odd);
    const bool one_more = i < last;
    if (one_more) add(i, even);
    if (rest.pixels > 0 && rest.begin < end) {
      // Not by an index, which would send both through memory.
      if (one_more) {
        odd += rest.get(p) * rest.get(g);
      } else {
        even += rest.get(p) * rest.get(g);
      }
    }
    mean += reduce_sum<A>(even + odd);
  }
  return mean;
}

// Of one map, without a look at what counts: P is zero of what does not, and of rows beyond a valid size nothing is read.
// Returns whether that will do: g may be infinite or NaN there, and an empty map holds no P.
template <class T>
bool write_softmax_gradient(const ExpectationSteps& steps, int64_t n, const MapWalk& walk) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const ExpectationHeatmapParams& params = *steps.heatmap;
  const SoftmaxParams& softmax = softmax_of(steps);
  if (is_empty(softmax.pixels, stats_of<A>(softmax, n).sum)) return false;
  const int64_t all = softmax.view.height * softmax.view.width;
  const bool some = !softmax.pixels.all();  // may not count
  int64_t pixels = all;
  if (softmax.pixels.sizes) {
    const Counting counting = counting_of(softmax.pixels, softmax.view, n);
    pixels = counting.cols > 0 ? counting.rows * softmax.view.width : 0;
  }
  const T* const p = static_cast<const T*>(softmax.heatmap) + walk.offset();
  const T* const g = static_cast<const T*>(params.values.data) + walk.offset(params.values.view);
  T* const to = static_cast<T*>(params.grad_heatmap) + walk.offset(params.grad_view);
  const A mean = mean_of_gradient(p, g, pixels), beta = beta_of<A>(softmax.beta, n);
  if (some && !(is_finite(mean) && is_finite(beta))) return false;
  static_cast<A*>(steps.expectation->expectation)[n] = mean;
  const Vec<A> minus_mean = splat(-mean), times = splat(beta);
  const auto gradient = [&](Vec<A> of_p, Vec<A> of_g) __attribute__((always_inline)) {
    const Vec<A> dh = (minus_mean + of_g) * of_p * times;
    // Their difference may be infinite though neither is.
    return some ? keep<A>(dh, of_p != Vec<A>{}) : dh;
  };
  const auto rest = LastVector<T>::of(pixels);
  for (int64_t i = 0; i < rest.begin; i += L) {
    prefetch_for_write(to + i, kWriteAhead);
    store(to + i, gradient(load(p + i), load(g + i)));
  }
  if (rest.pixels > 0) store_first(to + rest.begin, rest.pixels, gradient(rest.get(p), rest.get(g)));
  if (pixels < all) clear_row(to + pixels, all - pixels);
  return true;
}

}  // namespace kpfused::cpu::KPFUSED_ISA
