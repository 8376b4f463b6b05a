// SPDX-License-Identifier: MIT
// The algebra of volumes as stacks of slices, shared by the CPU and the CUDA kernels. Each slice is a map whose moments
// are known; with slices d of weight pi_d, which sum to one, mean mu_d, covariance C_d and log-sum-exp lse_d:
//
//   mean        mu = sum pi_d mu_d
//   covariance  C = sum pi_d (C_d + (mu_d - mu) (mu_d - mu)^T)
//   distance    t = sum pi_d t_d                              t_d: mean of k - p over the slice, p: the volume's peak
//   entropy     log(sum) - |beta| t                           and the log-sum-exp and the peak's probability as of maps
//
// With G for the gradient with respect to C, g, g_S and g_L for those of mean, entropy and log-sum-exp, and o = mu_d - mu:
//
//   d / d mu_d   = pi_d (g + (G + G^T) o)
//   d / d C_d    = pi_d G,  d / d S_d = pi_d g_S
//   d / d lse_d  = pi_d (g . o + o^T G o + <G, C_d - C> + |beta| g_S (t - t_d) + g_L)
//
// The slices' own kernels turn these into gradients of their pixels. x and y of a slice's mean are those of its pixels, z
// is its depth; all are measured from the centre of the volume.
#pragma once

#include <cmath>

#include "fields.h"

namespace kpfused {

// A slice beside the peak of its volume.
template <class A>
struct Slice {
  A weight;  // of all its pixels
  A x, y, z;
  A xx, xy, yy;
  A distance;
};

// A slice in which nothing weighs adds nothing, whatever its stats.
template <class A, class Exp2>
KPFUSED_HD Slice<A> slice_of(const MomentStats<A>& s, A z, A peak, A scale, Exp2 exp2) {
  if (s.sum == A(0)) return {A(0), A(0), A(0), z, A(0), A(0), A(0), A(0)};
  const A down = finite_distance(s.peak - peak);
  return {s.sum * exp2(down * scale), s.mean_x, s.mean_y, z, s.xx, s.xy, s.yy, finite_distance(s.distance + down)};
}

template <class A>
KPFUSED_HD A depth_centred(const SliceView& view, int64_t d) {
  return static_cast<A>(d) - static_cast<A>(view.depth - 1) / 2;
}

// What forward leaves for backward: kVolumeStats values, in this order. Pixels, from the centre of the volume.
template <class A>
struct VolumeStats {
  A peak, sum, x, y, z;
  A xx, xy, xz, yy, yz, zz;
  A distance;
  A at;  // depth of the slice that has the peak, the first of several
};

// Sums over slices, of their weight times these.
constexpr int kVolumeSums = 11;
template <class A>
struct VolumeSums {
  A at[kVolumeSums];  // 1, x, y, z, xx, xy, xz, yy, yz, zz, distance

  // x, y, z: the slice's mean from where sums are about.
  KPFUSED_HD void add(const Slice<A>& s, A x, A y, A z) {
    const A w = s.weight;
    const A terms[kVolumeSums] = {A(1), x, y, z, s.xx + x * x, s.xy + x * y, x * z, s.yy + y * y, y * z, z * z, s.distance};
    for (int i = 0; i < kVolumeSums; ++i) at[i] += w * terms[i];
  }
};

// The stats of volume v, by a team whose members take every team.step-th slice. Sums are about the mean of the slice that has
// the peak, near which the mass of a sharp volume lies.
template <class A, class Team, class Exp2>
KPFUSED_HD VolumeStats<A> volume_stats(const VolumeParams& p, int64_t v, A scale, const Team& team, Exp2 exp2) {
  const auto* const stats = static_cast<const MomentStats<A>*>(p.slice_stats);
  Place<A> place{Limits<A>::lowest, A(0), kNowhere<A>};
  for (int64_t d = team.first(); d < p.view.depth; d += team.step()) {
    const Place<A> each{stats[p.view.slice(v, d)].peak, A(0), static_cast<A>(d)};
    if (second_wins(place, each)) place = each;
  }
  place = team.highest(place);
  const int64_t at = place.at_y < kNowhere<A> ? static_cast<int64_t>(place.at_y) : 0;
  const Slice<A> centre = slice_of(stats[p.view.slice(v, at)], depth_centred<A>(p.view, at), place.peak, scale, exp2);
  VolumeSums<A> sums{};
  for (int64_t d = team.first(); d < p.view.depth; d += team.step()) {
    const Slice<A> s = slice_of(stats[p.view.slice(v, d)], depth_centred<A>(p.view, d), place.peak, scale, exp2);
    if (s.weight == A(0)) continue;
    sums.add(s, s.x - centre.x, s.y - centre.y, s.z - centre.z);
  }
  sums = team.add(sums);
  const A(&m)[kVolumeSums] = sums.at;
  const A sum = m[0], x = m[1] / sum, y = m[2] / sum, z = m[3] / sum;
  // Rounding must not make a variance negative; a NaN stays one.
  const auto variance = [](A value) { return value < A(0) ? A(0) : value; };
  return {place.peak,
          sum,
          centre.x + x,
          centre.y + y,
          centre.z + z,
          variance(m[4] / sum - x * x),
          m[5] / sum - x * y,
          m[6] / sum - x * z,
          variance(m[7] / sum - y * y),
          m[8] / sum - y * z,
          variance(m[9] / sum - z * z),
          m[10] / sum,
          static_cast<A>(at)};
}

template <class A>
KPFUSED_HD void write_volume(const VolumeForwardParams& p, int64_t v, const VolumeStats<A>& s, A beta) {
  const VolumeParams& volume = p.volume;
  static_cast<VolumeStats<A>*>(p.stats)[v] = s;
  const bool empty = p.fills_empty && s.sum == A(0);
  const auto real = [&](A value) { return empty ? static_cast<A>(p.empty_value) : value; };
  const A sx = static_cast<A>(volume.units.scale_x), sy = static_cast<A>(volume.units.scale_y);
  const A sz = static_cast<A>(volume.scale_z);
  A* const mean = static_cast<A*>(p.mean) + 3 * v;
  mean[0] = real(sx * s.x + static_cast<A>(volume.units.offset_x));
  mean[1] = real(sy * s.y + static_cast<A>(volume.units.offset_y));
  mean[2] = real(sz * s.z + static_cast<A>(volume.offset_z));
  A* const covariance = static_cast<A*>(p.fields.covariance) + 9 * v;
  covariance[0] = real(sx * sx * s.xx);
  covariance[1] = covariance[3] = real(sx * sy * s.xy);
  covariance[2] = covariance[6] = real(sx * sz * s.xz);
  covariance[4] = real(sy * sy * s.yy);
  covariance[5] = covariance[7] = real(sy * sz * s.yz);
  covariance[8] = real(sz * sz * s.zz);
  const A magnitude = beta < A(0) ? -beta : beta, log_sum = std::log(s.sum);
  static_cast<A*>(p.fields.entropy)[v] = real(log_sum - magnitude * s.distance);
  static_cast<A*>(p.fields.logsumexp)[v] = real(magnitude * s.peak + log_sum);
  static_cast<A*>(p.fields.peak_probability)[v] = real(peak_probability(s.sum));
  const int64_t at = static_cast<int64_t>(s.at), slice = volume.view.slice(v, at);
  p.fields.peak[3 * v] = p.slice_peaks[2 * slice];
  p.fields.peak[3 * v + 1] = p.slice_peaks[2 * slice + 1];
  p.fields.peak[3 * v + 2] = at;
}

// The gradients with respect to slice n's fields. One in which nothing weighs has none, whatever its volume; of the others,
// those that weigh nothing beside the rest have one only where the volume is no number.
template <class A, class Exp2>
KPFUSED_HD void write_slice_gradients(const VolumeBackwardParams& p, int64_t n, A beta, Exp2 exp2) {
  const VolumeParams& volume = p.volume;
  const int64_t row = n / volume.view.inner, d = row % volume.view.depth;
  const int64_t v = row / volume.view.depth * volume.view.inner + n % volume.view.inner;
  const VolumeStats<A> whole = static_cast<const VolumeStats<A>*>(p.stats)[v];
  const MomentStats<A> own = static_cast<const MomentStats<A>*>(volume.slice_stats)[n];
  const Slice<A> s = slice_of(own, depth_centred<A>(volume.view, d), whole.peak, sharpness(beta).scale, exp2);
  const bool weighs = s.weight != A(0) || (own.sum != A(0) && whole.sum != whole.sum);
  const A share = weighs ? s.weight / whole.sum : A(0);
  const auto write = [&](void* to, int64_t i, A value) { static_cast<A*>(to)[i] = weighs ? value : A(0); };
  const auto upstream = [](const void* from, int64_t i) { return from ? static_cast<const A*>(from)[i] : A(0); };
  const A sx = static_cast<A>(volume.units.scale_x), sy = static_cast<A>(volume.units.scale_y);
  const A sz = static_cast<A>(volume.scale_z);
  const A x = sx * (s.x - whole.x), y = sy * (s.y - whole.y), z = sz * (s.z - whole.z);
  A along_x = upstream(p.grad_mean, 3 * v), along_y = upstream(p.grad_mean, 3 * v + 1);
  A of_weight = along_x * x + along_y * y + upstream(p.grad_mean, 3 * v + 2) * z + upstream(p.grad_logsumexp, v);
  if (p.grad_covariance) {
    const A* const g = static_cast<const A*>(p.grad_covariance) + 9 * v;
    const A xy = g[1] + g[3], xz = g[2] + g[6], yz = g[5] + g[7];
    along_x += g[0] * x * 2 + xy * y + xz * z;
    along_y += xy * x + g[4] * y * 2 + yz * z;
    of_weight += g[0] * (x * x + sx * sx * (s.xx - whole.xx)) + xy * (x * y + sx * sy * (s.xy - whole.xy)) +
                 g[4] * (y * y + sy * sy * (s.yy - whole.yy)) + xz * (x * z - sx * sz * whole.xz) +
                 yz * (y * z - sy * sz * whole.yz) + g[8] * (z * z - sz * sz * whole.zz);
    const A of_slice[] = {g[0], g[1], g[3], g[4]};
    for (int i = 0; i < 4; ++i) write(p.slice_covariance, 4 * n + i, share * of_slice[i]);
  }
  if (p.grad_entropy) {
    const A g = static_cast<const A*>(p.grad_entropy)[v];
    of_weight += g * (beta < A(0) ? -beta : beta) * (whole.distance - s.distance);
    write(p.slice_entropy, n, share * g);
  }
  A of_logsumexp = share * of_weight;
  if (p.grad_peak_probability) {
    const A g = static_cast<const A*>(p.grad_peak_probability)[v], has_peak = static_cast<A>(d) == whole.at ? A(1) : A(0);
    of_logsumexp += g / whole.sum * (has_peak - share);
    write(p.slice_peak_probability, n, share * g * has_peak);
  }
  write(p.slice_mean, 2 * n, share * along_x);
  write(p.slice_mean, 2 * n + 1, share * along_y);
  write(p.slice_logsumexp, n, of_logsumexp);
}

}  // namespace kpfused
