// SPDX-License-Identifier: MIT
// The gradient of one heatmap through its mean or its moments, from tensors to the parameters of a kernel.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"

namespace kpfused {

// The upstream gradient (..., 2) as strides per map and per coordinate. The gradient of a sum is one expanded element;
// it and contiguous tensors are read in place.
inline Tensor readable_grad(Tensor grad, BackwardParams* p) {
  bool expanded = true;
  for (const int64_t stride : grad.strides()) expanded &= stride == 0;
  if (!expanded && !grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  p->grad_coordinates = grad.const_data_ptr();
  p->grad_stride_map = expanded ? 0 : 2;
  p->grad_stride_xy = expanded ? 0 : 1;
  return grad;
}

// One gradient: the heatmap as a kernel reads it, and what the kernel writes to. `result` is what the caller gets.
struct Gradient {
  Tensor heatmap, result, grad_heatmap, grad_beta;
  Settings settings;
  BackwardParams params;

  Gradient(Tensor input, const Tensor& stats, Settings given, bool needs_grad_beta, bool with_moments)
      : heatmap(std::move(input)), result(kpfused::empty_like(heatmap)), grad_heatmap(result),
        settings(std::move(given)) {
    STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
    const Layout layout = readable(heatmap, settings, &grad_heatmap);
    params = common_params<BackwardParams>(heatmap, layout, settings);
    params.with_moments = with_moments;
    check_of_maps(stats, with_moments ? kMomentStats : kStats, "stats");
    params.stats = stats.const_data_ptr();
    STD_TORCH_CHECK(stats.is_contiguous(), "stats must be what forward returned for this heatmap");
    params.grad_view = layout.second;
    params.grad_heatmap = grad_heatmap.mutable_data_ptr();
    if (needs_grad_beta) {
      grad_beta = empty(heatmap, leading_sizes(heatmap), accumulator_of(params.dtype));
      params.grad_beta = grad_beta.mutable_data_ptr();
    }
  }

  // `values` numbers of the accumulation dtype for every map.
  void check_of_maps(const Tensor& tensor, int64_t values, const char* name) const {
    check_numbers(tensor, params.view.maps() * values, name);
  }
  // `count` in all.
  void check_numbers(const Tensor& tensor, int64_t count, const char* name) const {
    check_device(tensor, heatmap, name);
    STD_TORCH_CHECK(tensor.scalar_type() == accumulator_of(params.dtype) && tensor.numel() == count, name,
                    " must have the shape and dtype of what forward returned for this heatmap");
  }

  // The numbers of a tensor that may be absent, dense: where it is not, a copy takes its place.
  const void* dense(std::optional<Tensor>& tensor, int64_t count, const char* name) const {
    if (!tensor) return nullptr;
    check_numbers(*tensor, count, name);
    tensor = torch::stable::contiguous(*tensor);
    return tensor->const_data_ptr();
  }

  // The pixel of every map's peak.
  void check_peaks(const Tensor& peaks) const {
    check_device(peaks, heatmap, "peak");
    STD_TORCH_CHECK(peaks.scalar_type() == ScalarType::Long && peaks.is_contiguous() &&
                        peaks.numel() == params.view.maps() * 2,
                    "peak must be what forward returned for this heatmap");
  }

  template <class Backend>
  std::tuple<Tensor, Tensor> run() {
    Backend::prepare(grad_heatmap);
    kpfused::run<Backend>(params, heatmap);
    if (grad_heatmap.get() != result.get()) torch::stable::copy_(result, grad_heatmap);
    return {result, grad_beta};
  }
};

}  // namespace kpfused
