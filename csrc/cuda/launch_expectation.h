// SPDX-License-Identifier: MIT
// From parameters of expectations to a launch, for one element type.
#pragma once

#include "expectation.h"
#include "expectation2d.h"
#include "expectation_heatmap.h"
#include "expectation_values.h"
#include "launch.h"

namespace kpfused::cuda {

// `maps`: those that get a result of their own. Of channels_last images they lie side by side.
inline Plan expectation_plan(Dtype dtype, const MapView& maps) {
  return choose_plan({dtype, maps.height, maps.width, maps.stride_x == 1 ? 0 : maps.inner, false, false});
}

inline Plan plan_of(const SoftmaxParams& p) { return expectation_plan(p.dtype, p.view); }

inline Plan plan_of(const ExpectationValuesParams& p, bool shared) {
  MapView own = own_values(p.softmax.view, p.value_view);
  // With one map left to an image, neighbours take neighbouring pixels, and each its pixel's channels one after another.
  if (own.inner < p.softmax.view.inner) own.stride_x = 1;
  Plan plan = expectation_plan(p.softmax.dtype, own);
  if (!shared) return plan;
  // Few values for many maps: a part is as small as keeps all threads at work.
  plan.rows_per_part = plan_detail::smaller(plan.rows_per_part, plan.ty);
  plan.parts_y = plan_detail::ceil_div(own.height, plan.rows_per_part);
  return plan;
}

inline dim3 expectation_grid(const Plan& plan, const MapView& maps, int64_t passes) {
  const int64_t items = in_channels(plan) ? maps.outer * plan.tiles * plan.parts() : maps.maps() * plan.parts();
  return grid_of(plan_detail::ceil_div(items, plan.teams()) * passes, 1);
}

template <class A>
void launch_add_parts(const void* workspace, void* sums, int64_t count, int64_t parts, A most, Stream stream) {
  const PartialSums<A> of{static_cast<const A*>(workspace), static_cast<A*>(sums), count, parts, most};
  KPFUSED_LAUNCH((add_parts<A>), grid_of(count, kMergeThreads / kWarp), kMergeThreads, 0, stream, of);
}

template <class T>
int expectation_step(const ExpectationParams& p, Stream stream) {
  using A = Acc<T>;
  const Plan plan = plan_of(p.softmax);
  const int64_t channels = p.values.view.channels;
  const size_t shared = shared_bytes<Tuple<A, kStepChannels>>(plan, in_channels(plan));
  const dim3 grid = expectation_grid(plan, p.softmax.view, channel_passes(channels));
  const Launch<ExpectationParams> launch{p, plan};
  KPFUSED_LAUNCH((expectation_sums<T>), grid, plan.threads, shared, stream, launch);
  if (plan.parts() > 1) {
    launch_add_parts<A>(p.workspace, p.expectation, p.softmax.view.maps() * channels, plan.parts(),
                        most_of<A>(p.values, p.softmax.pixels), stream);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int expectation_step(const ExpectationHeatmapParams& p, Stream stream) {
  using A = Acc<T>;
  const Plan plan = plan_of(p.softmax);
  const size_t shared = p.grad_beta ? shared_bytes<A>(plan, in_channels(plan)) : 0;
  const Launch<ExpectationHeatmapParams> launch{p, plan};
  KPFUSED_LAUNCH((expectation_gradient<T>), expectation_grid(plan, p.softmax.view, 1), plan.threads, shared, stream,
                 launch);
  if (p.grad_beta && plan.parts() > 1) {
    launch_add_parts<A>(p.workspace, p.grad_beta, p.softmax.view.maps(), plan.parts(), A(INFINITY), stream);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int expectation_step(const ExpectationValuesParams& p, Stream stream) {
  const MapView own = own_values(p.softmax.view, p.value_view);
  const bool shared = own.maps() < p.softmax.view.maps();
  const Plan plan = plan_of(p, shared);
  const dim3 grid = expectation_grid(plan, own, channel_passes(p.value_view.channels));
  const Launch<ExpectationValuesParams> launch{p, plan};
  if (shared) {
    KPFUSED_LAUNCH((values_gradient<T, true>), grid, plan.threads, 0, stream, launch);
  } else {
    KPFUSED_LAUNCH((values_gradient<T, false>), grid, plan.threads, 0, stream, launch);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace kpfused::cuda
