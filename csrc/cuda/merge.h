// SPDX-License-Identifier: MIT
// Partial states of one map across threads: through registers within a warp, through shared memory across warps, always
// in the same order. And the second launch of split maps, which does the same across blocks.
#pragma once

#include "../fields.h"
#include "../plan.h"
#include "element.h"

namespace kpfused::cuda {

// A kernel's arguments in one object.
template <class Params>
struct Launch {
  Params params;
  Plan plan;
};

// Numbers that are added each on its own.
template <class A, int n>
struct Tuple {
  A at[n];
};

KPFUSED_DEVICE float from_lane(float x, int lane_mask) { return __shfl_xor_sync(kAllLanes, x, lane_mask); }
KPFUSED_DEVICE double from_lane(double x, int lane_mask) { return __shfl_xor_sync(kAllLanes, x, lane_mask); }
template <class A, int n>
KPFUSED_DEVICE Tuple<A, n> from_lane(const Tuple<A, n>& x, int lane_mask) {
  Tuple<A, n> other;
#pragma unroll
  for (int i = 0; i < n; ++i) other.at[i] = from_lane(x.at[i], lane_mask);
  return other;
}
template <class A>
KPFUSED_DEVICE Place<A> from_lane(const Place<A>& x, int lane_mask) {
  return {from_lane(x.peak, lane_mask), from_lane(x.at_x, lane_mask), from_lane(x.at_y, lane_mask)};
}

// What is reduced: states merge, numbers add. Comparing is commutative to the bit, so that a butterfly of it leaves every
// lane with the same result, on which states agree before they are added. Adding and merging are not, where a product is
// contracted into a sum: of these only the first lane's result is used, to which all others come in order.
struct Add {
  template <class A>
  KPFUSED_DEVICE A operator()(A a, A b) const {
    return a + b;
  }
  template <class A, int n>
  KPFUSED_DEVICE Tuple<A, n> operator()(const Tuple<A, n>& a, const Tuple<A, n>& b) const {
    Tuple<A, n> sum;
#pragma unroll
    for (int i = 0; i < n; ++i) sum.at[i] = a.at[i] + b.at[i];
    return sum;
  }
  template <class A>
  KPFUSED_DEVICE static void clear(A& a) {
    a = A{};
  }
};

struct Higher {
  KPFUSED_DEVICE float operator()(float a, float b) const { return larger(a, b); }
  KPFUSED_DEVICE double operator()(double a, double b) const { return larger(a, b); }
  template <class A>
  KPFUSED_DEVICE Place<A> operator()(const Place<A>& a, const Place<A>& b) const {
    return second_wins(a, b) ? b : a;
  }
};

template <class A>
struct Merge {
  A scale;
  template <class S>
  KPFUSED_DEVICE S operator()(const S& a, const S& b) const {
    return merge(a, b, scale, Exp2{});
  }
  KPFUSED_DEVICE static void clear(State<A>& s) { s = empty_state<A>(); }
  KPFUSED_DEVICE static void clear(Moments<A>& s) { s = empty_moments<A>(); }
};

template <class S, class Op>
KPFUSED_DEVICE S butterfly(S s, int lanes, const Op& op) {
  for (int mask = 1; mask < lanes; mask *= 2) s = op(s, from_lane(s, mask));
  return s;
}

// Over the aligned group of `lanes` (a power of two up to 32) of every warp. The result is valid in its first lane. All
// lanes of the warp must call.
template <class A>
KPFUSED_DEVICE A reduce_lanes(A sum, int lanes, const Add& op) {
  return butterfly(sum, lanes, op);
}

// States agree on a peak first: so each is moved once, and what is left to merge is numbers.
template <class A>
KPFUSED_DEVICE State<A> reduce_lanes(const State<A>& s, int lanes, const Merge<A>& op) {
  const State<A> m = rebase(s, butterfly(s.peak, lanes, Higher{}), op.scale, Exp2{});
  const auto [sum] = butterfly(Tuple<A, 3>{{m.sum, m.sum_x, m.sum_y}}, lanes, Add{});
  return {m.peak, sum[0], sum[1], sum[2]};
}
template <class A>
KPFUSED_DEVICE Moments<A> reduce_lanes(const Moments<A>& s, int lanes, const Merge<A>& op) {
  const Place<A> place = butterfly(Place<A>{s.peak, s.at_x, s.at_y}, lanes, Higher{});
  const Moments<A> m = moved(s, place.peak, place.at_x, place.at_y, op.scale, Exp2{});
  const auto [sum] = butterfly(Tuple<A, 7>{{m.sum, m.x, m.y, m.xx, m.xy, m.yy, m.distance}}, lanes, Add{});
  return {place.peak, sum[0], place.at_x, place.at_y, sum[1], sum[2], sum[3], sum[4], sum[5], sum[6]};
}

// Over the team: lanes of a warp, or the block. The result is valid in the team's first thread. All threads must call.
// `shared` has room for one S a warp where the team is the block.
template <class S, class Op>
KPFUSED_DEVICE S reduce_team(S s, int team, S* shared, const Op& op) {
  if (team <= kWarp) return reduce_lanes(s, team, op);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  s = reduce_lanes(s, kWarp, op);
  if (lane == 0) shared[warp] = s;
  __syncthreads();
  if (warp == 0) {
    op.clear(s);
    if (lane < team / kWarp) s = shared[lane];
    s = reduce_lanes(s, kWarp, op);
  }
  return s;
}

// Stats and coordinates of map n from its state.
template <class A>
KPFUSED_DEVICE void write_map(const ForwardParams& p, int64_t n, const State<A>& state) {
  const Stats<A> stats = finish(state);
  static_cast<Stats<A>*>(p.stats)[n] = stats;
  A* const point = static_cast<A*>(p.coordinates) + 2 * n;
  if (is_empty(p.pixels, state.sum)) {
    point[0] = point[1] = static_cast<A>(p.pixels.empty_value);
    return;
  }
  point[0] = static_cast<A>(p.units.scale_x) * stats.mean_x + static_cast<A>(p.units.offset_x);
  point[1] = static_cast<A>(p.units.scale_y) * stats.mean_y + static_cast<A>(p.units.offset_y);
}

template <class A>
KPFUSED_DEVICE void write_map(const ForwardParams& p, int64_t n, const Moments<A>& state) {
  write_fields<A>(p, n, state, beta_of<A>(p.beta, n));
}

// sum: over the elements of map n, with the sign of beta.
template <class A>
KPFUSED_DEVICE void write_grad_beta(const BackwardParams& p, int64_t n, A sum) {
  if (p.with_moments) sum += sharpness(beta_of<A>(p.beta, n)).sign * grad_beta_of_peak<A>(p, n);
  static_cast<A*>(p.grad_beta)[n] = sum;
}

constexpr int kMergeThreads = 128;

// Second launch: one warp a map over its partial states, [maps, parts]. S: State or Moments.
template <class S>
__global__ void __launch_bounds__(kMergeThreads, 1) merge_states(Launch<ForwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = decltype(S::peak);
  const int64_t parts = plan.parts();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= p.view.maps()) return;  // a whole warp
  const Merge<A> op{sharpness(beta_of<A>(p.beta, n)).scale};
  const S* const partial = static_cast<const S*>(p.workspace) + n * parts;
  S state;
  op.clear(state);
  for (int64_t i = lane; i < parts; i += kWarp) state = op(state, partial[i]);
  state = reduce_lanes(state, kWarp, op);
  if (lane == 0) write_map(p, n, state);
}

// Likewise for the gradient with respect to beta: partial sums, [maps, parts].
template <class A>
__global__ void __launch_bounds__(kMergeThreads, 1) add_grad_beta(Launch<BackwardParams> launch) {
  const auto& [p, plan] = launch;
  const int64_t parts = plan.parts();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= p.view.maps()) return;
  const A* const partial = static_cast<const A*>(p.workspace) + n * parts;
  A sum = 0;
  for (int64_t i = lane; i < parts; i += kWarp) sum += partial[i];
  sum = reduce_lanes(sum, kWarp, Add{});
  if (lane == 0) write_grad_beta(p, n, sum);
}

}  // namespace kpfused::cuda
