// SPDX-License-Identifier: MIT
// Partial states of one map across threads: through registers within a warp, through shared memory across warps, always
// in the same order. And the second launch of split maps, which does the same across blocks.
#pragma once

#include "../moments.h"
#include "../plan.h"
#include "element.h"

namespace kpfused::cuda {

// A kernel's arguments in one object.
template <class Params>
struct Launch {
  Params params;
  Plan plan;
};

template <class A>
KPFUSED_DEVICE State<A> from_lane(const State<A>& s, int lane_mask) {
  return {__shfl_xor_sync(kAllLanes, s.peak, lane_mask), __shfl_xor_sync(kAllLanes, s.sum, lane_mask),
          __shfl_xor_sync(kAllLanes, s.sum_x, lane_mask), __shfl_xor_sync(kAllLanes, s.sum_y, lane_mask)};
}

// What is reduced: a State merges, a number adds. Both are commutative to the bit, so that a butterfly leaves every lane
// with the same result.
template <class A>
struct Merge {
  A scale;
  KPFUSED_DEVICE State<A> operator()(const State<A>& a, const State<A>& b) const { return merge(a, b, scale, Exp2{}); }
  KPFUSED_DEVICE static State<A> empty() { return empty_state<A>(); }
};
template <class A>
struct Add {
  KPFUSED_DEVICE A operator()(A a, A b) const { return a + b; }
  KPFUSED_DEVICE static A empty() { return A(0); }
};
KPFUSED_DEVICE float from_lane(float x, int lane_mask) { return __shfl_xor_sync(kAllLanes, x, lane_mask); }
KPFUSED_DEVICE double from_lane(double x, int lane_mask) { return __shfl_xor_sync(kAllLanes, x, lane_mask); }

// Over the aligned group of `lanes` (a power of two up to 32) of every warp. All lanes of the warp must call.
template <class S, class Op>
KPFUSED_DEVICE S reduce_lanes(S s, int lanes, const Op& op) {
  for (int mask = 1; mask < lanes; mask *= 2) s = op(s, from_lane(s, mask));
  return s;
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
    s = op.empty();
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
  point[0] = static_cast<A>(p.units.scale_x) * stats.mean_x + static_cast<A>(p.units.offset_x);
  point[1] = static_cast<A>(p.units.scale_y) * stats.mean_y + static_cast<A>(p.units.offset_y);
}

constexpr int kMergeThreads = 128;

// Second launch: one warp a map over its partial states, [maps, parts].
template <class A>
__global__ void __launch_bounds__(kMergeThreads, 1) merge_states(Launch<ForwardParams> launch) {
  const auto& [p, plan] = launch;
  const int64_t parts = plan.parts();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= p.view.maps()) return;  // a whole warp
  const Merge<A> op{sharpness(beta_of<A>(p.beta, n)).scale};
  const State<A>* const partial = static_cast<const State<A>*>(p.workspace) + n * parts;
  State<A> state = empty_state<A>();
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
  sum = reduce_lanes(sum, kWarp, Add<A>{});
  if (lane == 0) static_cast<A*>(p.grad_beta)[n] = sum;
}

}  // namespace kpfused::cuda
