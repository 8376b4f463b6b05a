// SPDX-License-Identifier: MIT
// From parameters to a launch, for one element type; each type is compiled in a file of its own.
#pragma once

#include "channels.h"
#include "soft_argmax2d.h"

namespace kpfused::cuda {

// Whether vectors of `bytes` along rows, or along channels, are aligned in every map of a view that begins at p.
inline bool vectors_aligned(const void* p, const MapView& v, int size, int bytes, bool channels) {
  const auto whole = [=](int64_t stride) { return stride * size % bytes == 0; };
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0 && whole(v.stride_y) &&
         (v.outer == 1 || whole(v.stride_outer)) && (channels ? whole(v.stride_x) : v.inner == 1 || whole(v.stride_inner));
}

// Whether the kernels of moments take it: they also know masks, for which the others have no registers to spare.
template <class Params>
bool takes_moments(const Params& p) {
  return p.with_moments || p.pixels.fills_empty;
}

// Vectors of channels take their masks to be stride_inner() apart. They are not where some channels of a vector share theirs with
// a group and others with the next.
template <class Params>
PlanKey plan_key(const Params& p, bool aligned) {
  const bool channels = p.view.stride_x != 1, moments = takes_moments(p);
  const bool vectors = aligned && (!channels || p.pixels.mask_view.even(widest(element_size(p.dtype), true, moments)));
  return {p.dtype, p.view.height, p.view.width, channels ? p.view.inner : 0, vectors, moments};
}

// Bytes of the widest load that its kernels have.
template <class Params>
int vector_bytes(const Params& p) {
  const int size = element_size(p.dtype);
  return widest(size, p.view.stride_x != 1, takes_moments(p)) * size;
}

inline Plan plan_of(const ForwardParams& p) {
  const int size = element_size(p.dtype);
  return choose_plan(plan_key(p, vectors_aligned(p.heatmap, p.view, size, vector_bytes(p), p.view.stride_x != 1)));
}

inline Plan plan_of(const BackwardParams& p) {
  const bool channels = p.view.stride_x != 1;
  const int size = element_size(p.dtype), bytes = vector_bytes(p);
  return choose_plan(plan_key(p, vectors_aligned(p.heatmap, p.view, size, bytes, channels) &&
                                     vectors_aligned(p.grad_heatmap, p.grad_view, size, bytes, channels)));
}

// What no grid can hold becomes the most that an unsigned holds, which the launch refuses.
inline dim3 grid_of(int64_t items, int64_t of_block) {
  const int64_t blocks = plan_detail::ceil_div(items, of_block), most = 0xffffffff;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

inline dim3 grid_of(const Plan& plan, const MapView& view) {
  const int64_t items =
      view.stride_x == 1 ? view.maps() * plan.parts() : view.outer * plan.tiles * plan.parts();
  return grid_of(items, plan.teams());
}

inline dim3 merge_grid(const MapView& view) { return grid_of(view.maps(), kMergeThreads / kWarp); }

// Shared memory to reduce one S a thread and channel, or one a warp.
template <class S>
size_t shared_bytes(const Plan& plan, bool channels) {
  if (channels) return sizeof(S) * static_cast<size_t>(plan.threads * plan.vector);
  return plan.team > kWarp ? sizeof(S) * static_cast<size_t>(plan.threads / kWarp) : 0;
}

template <class T, int V>
int forward(const ForwardParams& p, const Plan& plan, Stream stream) {
  using A = Acc<T>;
  const bool channels = p.view.stride_x != 1;
  const size_t shared = shared_bytes<State<A>>(plan, channels);
  const dim3 grid = grid_of(plan, p.view);
  const Launch<ForwardParams> launch{p, plan};
  if (channels) {
    KPFUSED_LAUNCH((channels_forward<T, V>), grid, plan.threads, shared, stream, launch);
  } else {
    KPFUSED_LAUNCH((rows_forward<T, V>), grid, plan.threads, shared, stream, launch);
  }
  if (plan.parts() > 1) {
    KPFUSED_LAUNCH((merge_states<State<A>>), merge_grid(p.view), kMergeThreads, 0, stream, launch);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T, int V, bool kBeta>
int backward(const BackwardParams& p, const Plan& plan, Stream stream) {
  using A = Acc<T>;
  const bool channels = p.view.stride_x != 1;
  const size_t shared = kBeta ? shared_bytes<A>(plan, channels) : 0;
  const dim3 grid = grid_of(plan, p.view);
  const Launch<BackwardParams> launch{p, plan};
  if (channels) {
    KPFUSED_LAUNCH((channels_backward<T, V, kBeta>), grid, plan.threads, shared, stream, launch);
  } else {
    KPFUSED_LAUNCH((rows_backward<T, V, kBeta>), grid, plan.threads, shared, stream, launch);
  }
  if (kBeta && plan.parts() > 1) {
    KPFUSED_LAUNCH((add_grad_beta<A>), merge_grid(p.view), kMergeThreads, 0, stream, launch);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int forward(const ForwardParams& p, Stream stream) {
  const Plan plan = plan_of(p);
  return plan.vector == 1 ? forward<T, 1>(p, plan, stream) : forward<T, kVector<T>>(p, plan, stream);
}

template <class T>
int backward(const BackwardParams& p, Stream stream) {
  const Plan plan = plan_of(p);
  if (p.grad_beta) {
    return plan.vector == 1 ? backward<T, 1, true>(p, plan, stream) : backward<T, kVector<T>, true>(p, plan, stream);
  }
  return plan.vector == 1 ? backward<T, 1, false>(p, plan, stream) : backward<T, kVector<T>, false>(p, plan, stream);
}

}  // namespace kpfused::cuda
