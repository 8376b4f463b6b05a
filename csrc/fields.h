// SPDX-License-Identifier: MIT
// Between a map's moments and what the caller sees of them: results out, gradients in. A: the accumulation dtype, in
// which they lie in memory; W: that of the arithmetic, A or wider.
#pragma once

#include <cmath>

#include "moments.h"
#include "params.h"

namespace kpfused {

// The pixel of a centred coordinate; 0 where no pixel has the peak.
template <class W>
KPFUSED_HD int64_t pixel_at(W centred, int64_t extent) {
  return centred < kNowhere<W> ? static_cast<int64_t>(centred + W(0.5) * static_cast<W>(extent - 1)) : 0;
}

// Whether a map is to give `empty_value`.
template <class W>
KPFUSED_HD bool is_empty(const PixelView& pixels, W sum) {
  return pixels.fills_empty && sum == W(0);
}

// Pixels [left, right) by [top, bottom) of a map.
struct Box {
  int64_t left, right, top, bottom;

  KPFUSED_HD bool has(int64_t y, int64_t x) const { return top <= y && y < bottom && left <= x && x < right; }
};

// The window of map n, as far as it lies within the map: none of one around a pixel far beside it. A mean that is no number
// is that of a map without a probability, where any window will do.
template <class A>
KPFUSED_HD Box window_of(const Values& values, const MapView& view, const Stats<A>& stats, int64_t n) {
  const auto between = [](int64_t least, int64_t i, int64_t most) { return i < least ? least : i < most ? i : most; };
  const auto nearest = [](A mean, int64_t extent) {
    const A pixel = mean + A(0.5) * static_cast<A>(extent - 1);
    return pixel == pixel ? static_cast<int64_t>(std::rint(pixel)) : int64_t(0);
  };
  constexpr int64_t kFar = int64_t{1} << 61;  // so that no sum overflows
  const int64_t radius = between(0, values.radius, kFar);
  const auto pixel = [&](int axis, A mean, int64_t extent) {
    return values.centre ? between(-kFar, values.centre[2 * n + axis], kFar)
                         : between(0, nearest(mean, extent), extent - 1);
  };
  const int64_t x = pixel(0, stats.mean_x, view.width), y = pixel(1, stats.mean_y, view.height);
  return {between(0, x - radius, view.width), between(0, x + radius + 1, view.width), between(0, y - radius, view.height),
          between(0, y + radius + 1, view.height)};
}

// The most that sums over a map's parts can be: of the mass of a window 1, which their rounding may exceed, or what empty
// maps give; of all else there is no such bound.
template <class A>
KPFUSED_HD A most_of(const Values& values, const PixelView& pixels) {
  if (values.kind != ValueKind::window) return A(INFINITY);
  return pixels.fills_empty && pixels.empty_value > 1 ? static_cast<A>(pixels.empty_value) : A(1);
}

// Results and stats of map n. Without moments, what soft_argmax2d gives.
template <class A, class W>
KPFUSED_HD void write_fields(const ForwardParams& p, int64_t n, const Moments<W>& state, W beta) {
  const MomentStats<W> stats = finish(state);
  const bool empty = is_empty(p.pixels, state.sum);
  const auto real = [&](W value) { return static_cast<A>(empty ? static_cast<W>(p.pixels.empty_value) : value); };
  const W sx = static_cast<W>(p.units.scale_x), sy = static_cast<W>(p.units.scale_y);
  A* const mean = static_cast<A*>(p.coordinates) + 2 * n;
  mean[0] = real(sx * stats.mean_x + static_cast<W>(p.units.offset_x));
  mean[1] = real(sy * stats.mean_y + static_cast<W>(p.units.offset_y));
  if (!p.with_moments) {
    static_cast<Stats<A>*>(p.stats)[n] = {static_cast<A>(stats.peak), static_cast<A>(stats.sum),
                                          static_cast<A>(stats.mean_x), static_cast<A>(stats.mean_y)};
    return;
  }
  static_cast<MomentStats<A>*>(p.stats)[n] = {
      static_cast<A>(stats.peak), static_cast<A>(stats.sum), static_cast<A>(stats.mean_x), static_cast<A>(stats.mean_y),
      static_cast<A>(stats.xx),   static_cast<A>(stats.xy),  static_cast<A>(stats.yy),     static_cast<A>(stats.distance)};
  const MomentFields& fields = p.moments;
  A* const covariance = static_cast<A*>(fields.covariance) + 4 * n;
  covariance[0] = real(sx * sx * stats.xx);
  covariance[1] = covariance[2] = real(sx * sy * stats.xy);
  covariance[3] = real(sy * sy * stats.yy);
  const W magnitude = beta < W(0) ? -beta : beta, log_sum = std::log(stats.sum);
  static_cast<A*>(fields.entropy)[n] = real(log_sum - magnitude * stats.distance);
  static_cast<A*>(fields.logsumexp)[n] = real(magnitude * stats.peak + log_sum);
  static_cast<A*>(fields.peak_probability)[n] = real(peak_probability(stats.sum));
  fields.peak[2 * n] = pixel_at(state.at_x, p.view.width);
  fields.peak[2 * n + 1] = pixel_at(state.at_y, p.view.height);
}

// What forward left of map n. Without moments, those that soft_argmax2d's gradient has no use for are zero.
template <class A>
KPFUSED_HD MomentStats<A> moment_stats(const BackwardParams& p, int64_t n) {
  if (p.with_moments) return static_cast<const MomentStats<A>*>(p.stats)[n];
  const Stats<A> s = static_cast<const Stats<A>*>(p.stats)[n];
  return {s.peak, s.sum, s.mean_x, s.mean_y, A(0), A(0), A(0), A(0)};
}

template <class A>
KPFUSED_HD FieldGradients<A> field_gradients(const BackwardParams& p, int64_t n) {
  const A sx = static_cast<A>(p.units.scale_x), sy = static_cast<A>(p.units.scale_y);
  const auto at = [](const void* values, int64_t i) { return values ? static_cast<const A*>(values)[i] : A(0); };
  const int64_t mean = n * p.grad_stride_map;
  const MomentGradients& m = p.moments;
  return {sx * at(p.grad_coordinates, mean),
          sy * at(p.grad_coordinates, mean + p.grad_stride_xy),
          sx * sx * at(m.covariance, n * 4),
          sx * sy * (at(m.covariance, n * 4 + 1) + at(m.covariance, n * 4 + 2)),
          sy * sy * at(m.covariance, n * 4 + 3),
          at(m.entropy, n),
          at(m.logsumexp, n),
          at(m.peak_probability, n)};
}

// What dbeta needs once a map beside the sum over its elements, likewise without its sign: only the log-sum-exp changes
// where all logits do.
template <class A>
KPFUSED_HD A grad_beta_of_peak(const BackwardParams& p, int64_t n) {
  const void* const g = p.moments.logsumexp;
  if (!g) return A(0);
  const MomentStats<A> stats = static_cast<const MomentStats<A>*>(p.stats)[n];
  return is_empty(p.pixels, stats.sum) ? A(0) : static_cast<const A*>(g)[n] * stats.peak;
}

}  // namespace kpfused
