// SPDX-License-Identifier: MIT
// The parameters of a call, with memory for what is in the accumulation dtype.
#pragma once

#include <memory>
#include <vector>

#include "cpu/soft_argmax2d.h"
#include "maps.h"

namespace native {

// How many share the work: main.cpp.
inline int threads = 1;

struct Accumulators {
  Dtype dtype;
  std::unique_ptr<char[]> bytes;

  Accumulators(Dtype d, int64_t n) : dtype(d), bytes(new char[size_t(n * accumulator_size(d))]) {}
  double operator[](int64_t i) const { return double(harness::load(harness::accumulator(dtype), bytes.get(), i)); }
  void set(int64_t i, double value) { harness::store(harness::accumulator(dtype), bytes.get(), i, value); }
};

// All pixels, no moments.
inline ForwardParams forward_params(Dtype dtype, const void* h, const MapView& view, const BetaView& beta,
                                    const Units& units, void* coordinates, void* stats, std::vector<char>& workspace) {
  ForwardParams p{};
  p.dtype = dtype, p.heatmap = h, p.view = view, p.beta = beta, p.units = units;
  p.coordinates = coordinates, p.stats = stats, p.workspace = workspace.empty() ? nullptr : workspace.data();
  return p;
}

inline BackwardParams backward_params(Dtype dtype, const void* h, const MapView& view, const BetaView& beta,
                                      const Units& units, const void* stats, const void* upstream, void* grad,
                                      void* grad_beta, std::vector<char>& workspace) {
  BackwardParams p{};
  p.dtype = dtype, p.heatmap = h, p.view = p.grad_view = view, p.beta = beta, p.units = units, p.stats = stats;
  p.grad_coordinates = upstream, p.grad_stride_map = 2, p.grad_stride_xy = 1;
  p.grad_heatmap = grad, p.grad_beta = grad_beta, p.workspace = workspace.empty() ? nullptr : workspace.data();
  return p;
}

}  // namespace native
