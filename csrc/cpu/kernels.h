// SPDX-License-Identifier: MIT
// Means and moments, from parameters to kernels on one instruction set: dtype, layout and whether dbeta is wanted become
// template arguments here, and work is handed to threads. Expectations have files of their own, since compiling takes long.
#pragma once

#include "backward_lanes.h"
#include "backward_rows.h"
#include "byte_squares.h"
#include "forward_lanes.h"
#include "forward_rows.h"
#include "parallel.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class Kernel, class Params>
void run(const Params& params) {
  const MapView& view = params.view;
  const int64_t items = count_items(view);
  const int64_t elements = view.maps() * view.height * view.width / items;
  const auto body = [&](int64_t begin, int64_t end) { Kernel(params).run(begin, end); };
  parallel_for(items, at_least(kGrainElements / at_least(elements, 1), 1), body);
}

// Split maps: the states of their parts, in order.
template <class S>
void merge_parts(const ForwardParams& params, int64_t parts) {
  using A = decltype(S::peak);
  const S* states = static_cast<const S*>(params.workspace);
  for (int64_t map = 0; map < params.view.maps(); ++map, states += parts) {
    const A scale = sharpness(beta_of<A>(params.beta, map)).scale;
    S total = states[0];
    for (int64_t i = 1; i < parts; ++i) total = merge(total, states[i], scale, ScalarExp2{});
    write_result(params, map, total);
  }
}

template <class A>
void add_parts(const BackwardParams& params, int64_t parts) {
  const A* partial = static_cast<const A*>(params.workspace);
  for (int64_t map = 0; map < params.view.maps(); ++map) {
    A total = A(0);
    for (int64_t i = 0; i < parts; ++i) total += *partial++;
    static_cast<A*>(params.grad_beta)[map] = total;
  }
}

template <class T, bool kMoments>
void forward_of(const ForwardParams& params) {
  is_channels_last(params.view) ? run<ForwardLanes<T, kMoments>>(params) : run<ForwardRows<T, kMoments>>(params);
  const int64_t parts = part_tiling(params.view).count();
  if (parts > 1) merge_parts<typename ForwardRows<T, kMoments>::S>(params, parts);
}

template <class T, bool kBeta, bool kMoments>
void backward_of(const BackwardParams& params) {
  is_channels_last(params.view) ? run<BackwardLanes<T, kBeta, kMoments>>(params)
                                : run<BackwardRows<T, kBeta, kMoments>>(params);
  const int64_t parts = part_tiling(params.view).count();
  if (kBeta && params.grad_beta && parts > 1) add_parts<Acc<T>>(params, parts);
}

template <class T>
void forward_of(const ForwardParams& params) {
  params.with_moments ? forward_of<T, true>(params) : forward_of<T, false>(params);
}

template <class T>
void backward_of(const BackwardParams& params) {
  // Moments sum dbeta, wanted or not: a product a pixel, and half the code.
  if (params.with_moments) return backward_of<T, true, true>(params);
  params.grad_beta ? backward_of<T, true, false>(params) : backward_of<T, false, false>(params);
}

void forward(const ForwardParams& params) {
  switch (params.dtype) {
    case Dtype::float32: return forward_of<float>(params);
    case Dtype::float64: return forward_of<double>(params);
    case Dtype::float16: return forward_of<Half>(params);
    case Dtype::bfloat16: return forward_of<BFloat16>(params);
  }
}

void backward(const BackwardParams& params) {
  switch (params.dtype) {
    case Dtype::float32: return backward_of<float>(params);
    case Dtype::float64: return backward_of<double>(params);
    case Dtype::float16: return backward_of<Half>(params);
    case Dtype::bfloat16: return backward_of<BFloat16>(params);
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
