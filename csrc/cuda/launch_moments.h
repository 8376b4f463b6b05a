// SPDX-License-Identifier: MIT
// As launch.h, for the kernels of moments and masks, which are compiled in files of their own.
#pragma once

#include "launch.h"
#include "moments_channels.h"

namespace kpfused::cuda {

template <class T, int V>
void launch_rows_moments(const ForwardParams& p, const Plan& plan, Stream stream) {
  const size_t shared = shared_bytes<Moments<Acc<T>>>(plan, false);
  const Launch<ForwardParams> launch{p, plan};
  KPFUSED_LAUNCH((rows_moments<T, V>), grid_of(plan, p.view), plan.threads, shared, stream, launch);
}
template <class T, int V>
void launch_rows_moments(const BackwardParams& p, const Plan& plan, Stream stream) {
  const size_t shared = p.grad_beta ? shared_bytes<Acc<T>>(plan, false) : 0;
  const Launch<BackwardParams> launch{p, plan};
  KPFUSED_LAUNCH((rows_moments_backward<T, V>), grid_of(plan, p.view), plan.threads, shared, stream, launch);
}

template <class T, int V>
void launch_channels_moments(const ForwardParams& p, const Plan& plan, Stream stream) {
  const size_t shared = shared_bytes<Moments<Acc<T>>>(plan, true);
  const Launch<ForwardParams> launch{p, plan};
  KPFUSED_LAUNCH((channels_moments<T, V>), grid_of(plan, p.view), plan.threads, shared, stream, launch);
}
template <class T, int V>
void launch_channels_moments(const BackwardParams& p, const Plan& plan, Stream stream) {
  const size_t shared = p.grad_beta ? shared_bytes<Acc<T>>(plan, true) : 0;
  const Launch<BackwardParams> launch{p, plan};
  KPFUSED_LAUNCH((channels_moments_backward<T, V>), grid_of(plan, p.view), plan.threads, shared, stream, launch);
}

// The second launch of split maps.
template <class A>
void launch_merge(const ForwardParams& p, const Plan& plan, Stream stream) {
  const Launch<ForwardParams> launch{p, plan};
  KPFUSED_LAUNCH((merge_states<Moments<A>>), merge_grid(p.view), kMergeThreads, 0, stream, launch);
}
template <class A>
void launch_merge(const BackwardParams& p, const Plan& plan, Stream stream) {
  if (!p.grad_beta) return;
  const Launch<BackwardParams> launch{p, plan};
  KPFUSED_LAUNCH((add_grad_beta<A>), merge_grid(p.view), kMergeThreads, 0, stream, launch);
}

template <class T, class Params>
int moments(const Params& p, Stream stream) {
  constexpr int kRows = widest(sizeof(T), false, true), kChannels = widest(sizeof(T), true, true);
  const Plan plan = plan_of(p);
  if (p.view.stride_x == 1) {
    plan.vector == 1 ? launch_rows_moments<T, 1>(p, plan, stream) : launch_rows_moments<T, kRows>(p, plan, stream);
  } else {
    plan.vector == 1 ? launch_channels_moments<T, 1>(p, plan, stream)
                     : launch_channels_moments<T, kChannels>(p, plan, stream);
  }
  if (plan.parts() > 1) launch_merge<Acc<T>>(p, plan, stream);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace kpfused::cuda
