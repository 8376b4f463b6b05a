// SPDX-License-Identifier: MIT
// What an op around P asks for of one heatmap, step by step, from tensors to the parameters of kernels.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"

namespace kpfused {

using Pair = std::tuple<Tensor, Tensor>;

// What an expectation is of, as Values has it.
struct Averaged {
  ValueKind kind;
  std::optional<Tensor> tensor = std::nullopt;
  int64_t radius = 0;
  const int64_t* centre = nullptr;

  Tensor* values() { return tensor ? &*tensor : nullptr; }
};

// What an op asks for of one heatmap, step by step, and what it needs to be run.
template <class Backend>
class Steps {
 public:
  Steps(const Tensor& heatmap, Settings settings, Holds holds = Holds::logits)
      : input_(heatmap), readable_(heatmap), settings_(std::move(settings)), holds_(holds) {
    STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  }

  // `count` numbers of the accumulation dtype for every map.
  void check_of_maps(const Tensor& tensor, int64_t count, const char* name) const {
    int64_t maps = 1;
    for (int64_t d = 0; d < input_.dim() - 2; ++d) maps *= input_.size(d);
    check_device(tensor, input_, name);
    STD_TORCH_CHECK(tensor.scalar_type() == accumulator_of(dtype_of(input_)) && tensor.numel() == maps * count, name,
                    " must have the shape and dtype of what forward returned for this heatmap");
  }

  // Stats that forward left, `size` numbers for every map.
  void use_stats(const Tensor& stats, int64_t size = kStats) {
    check_of_maps(stats, size, "stats");
    STD_TORCH_CHECK(stats.is_contiguous(), "stats must be what forward returned for this heatmap");
    stats_ = stats;
    stats_stride_ = size;
  }

  // Stats as soft_argmax2d leaves them, for which its coordinates are the price.
  Tensor add_stats() {
    const Layout layout = layout_of(nullptr, nullptr);
    forward_ = common_params<ForwardParams>(readable_, layout, settings_);
    use_stats(empty(input_, leading_sizes(input_, {kStats}), accumulator_of(forward_.dtype)));
    forward_.coordinates = keep(empty(input_, leading_sizes(input_, {2}), accumulator_of(forward_.dtype)));
    forward_.stats = stats_->mutable_data_ptr();
    forward_.workspace = workspace(forward_);
    steps_.stats = &forward_;
    return *stats_;
  }

  // Stats of the moments, and the pixel of the peak, of which nothing else is wanted.
  Pair add_moments() {
    const Layout layout = layout_of(nullptr, nullptr);
    ForwardParams& p = forward_ = common_params<ForwardParams>(readable_, layout, settings_);
    const ScalarType dtype = accumulator_of(p.dtype);
    const auto of_maps = [&](std::initializer_list<int64_t> sizes) {
      return keep(empty(input_, leading_sizes(input_, sizes), dtype));
    };
    Tensor stats = empty(input_, leading_sizes(input_, {kMomentStats}), dtype);
    Tensor peak = empty(input_, leading_sizes(input_, {2}), ScalarType::Long);
    use_stats(stats, kMomentStats);
    p.coordinates = of_maps({2});
    p.stats = stats.mutable_data_ptr();
    p.with_moments = true;
    p.moments = {of_maps({2, 2}), of_maps({}), of_maps({}), of_maps({}), static_cast<int64_t*>(peak.mutable_data_ptr())};
    p.workspace = workspace(p);
    steps_.stats = &p;
    return {stats, peak};
  }

  // E, (..., channels).
  Tensor add_expectation(const Averaged& of) {
    Averaged readable = of;
    const Layout layout = layout_of(nullptr, readable.values());
    ExpectationParams& p = expectation_;
    set_common(p, layout);
    p.values = values_of(readable, layout);
    Tensor result = empty(input_, of.kind == ValueKind::window ? leading_sizes(input_)
                                                               : leading_sizes(input_, {p.values.view.channels}),
                          accumulator_of(p.softmax.dtype));
    p.expectation = result.mutable_data_ptr();
    p.workspace = workspace(p);
    if (p.values.view.channels > 0) steps_.expectation = &p;
    return result;
  }

  // Gradients of heatmap and beta. `grad` null: 1 for every channel.
  Pair add_heatmap_gradient(const Averaged& of, const Tensor* expectation, const Tensor* grad, bool needs_grad_beta) {
    result_ = kpfused::empty_like(input_);
    target_ = result_;
    Averaged readable = of;
    const Layout layout = layout_of(&*target_, readable.values());
    ExpectationHeatmapParams& p = heatmap_;
    set_common(p, layout);
    p.values = values_of(readable, layout);
    p.expectation = expectation ? expectation->const_data_ptr() : nullptr;
    p.grad = grad ? grad->const_data_ptr() : nullptr;
    p.grad_heatmap = target_->mutable_data_ptr();
    p.grad_view = layout.second;
    Tensor grad_beta;
    if (needs_grad_beta) {
      grad_beta = empty(input_, leading_sizes(input_), accumulator_of(p.softmax.dtype));
      p.grad_beta = grad_beta.mutable_data_ptr();
    }
    if (p.values.view.channels == 0) {
      torch::stable::zero_(*result_);
      if (needs_grad_beta) torch::stable::zero_(grad_beta);
      target_.reset();
      return {*result_, grad_beta};
    }
    p.workspace = workspace(p);
    Backend::prepare(*target_);
    steps_.heatmap = &p;
    return {*result_, grad_beta};
  }

  // The gradient of values, or with `grad` null and values of the heatmap's own shape the softmax map.
  void add_values_gradient(Tensor& result, const Tensor* grad) {
    Tensor values = result;
    const Layout layout = layout_of(nullptr, &values);
    if (layout.first.maps() == 0 || values.numel() == 0) {
      torch::stable::zero_(result);
      return;
    }
    values_result_ = result;
    values_target_ = values;
    ExpectationValuesParams& p = values_;
    set_common(p, layout);
    p.value_view = value_view(layout, values);
    p.grad = grad ? grad->const_data_ptr() : nullptr;
    p.grad_values = values.mutable_data_ptr();
    Backend::prepare(values);
    steps_.values = &p;
  }

  void run() {
    bool some = false;
    for (int64_t d = 0; d < input_.dim() - 2; ++d) some |= input_.size(d) == 0;
    if (some) return;
    if (steps_.expectation || steps_.heatmap || steps_.values) {
      Backend::run(steps_, input_);
    } else if (steps_.stats) {
      Backend::run(forward_, input_);  // of values without a channel
    }
    copy_back(result_, target_);
    copy_back(values_result_, values_target_);
  }

 private:
  static void copy_back(std::optional<Tensor>& result, const std::optional<Tensor>& target) {
    if (target && target->data_ptr() != result->data_ptr()) torch::stable::copy_(*result, *target);
  }

  // Of heatmap, mask, what is to be written and values; where they cannot be read together, of copies, which replace them.
  Layout layout_of(Tensor* target, Tensor* values) {
    Layout layout = readable(readable_, settings_, target, values);
    if (!layout.in_place && values) {
      *values = torch::stable::contiguous(*values);
      layout = readable(readable_, settings_, target, values);
    }
    if (values) kept_.push_back(*values);
    kept_.push_back(readable_);
    if (settings_.mask) kept_.push_back(*settings_.mask);
    STD_TORCH_CHECK(layout.in_place, "values broadcast along separate dimensions; expand them in memory");
    return layout;
  }

  template <class Params>
  void set_common(Params& p, const Layout& layout) const {
    const auto common = common_params<ForwardParams>(readable_, layout, settings_);
    const void* const stats = stats_ ? stats_->const_data_ptr() : nullptr;
    p.softmax = {common.dtype, holds_, common.heatmap, common.view, common.pixels, common.beta, stats, stats_stride_};
  }

  Values values_of(const Averaged& of, const Layout& layout) const {
    Values v{of.kind, nullptr, {}, {}, of.radius, of.centre};
    v.units = units_of(static_cast<Coordinates>(settings_.coordinates), layout.first.height, layout.first.width);
    v.view.channels = of.kind == ValueKind::coordinates ? 2 : 1;
    if (of.tensor) v.view = value_view(layout, *of.tensor), v.data = of.tensor->const_data_ptr();
    return v;
  }

  template <class Params>
  void* workspace(const Params& p) {
    const int64_t bytes = Backend::workspace(p);
    return bytes ? keep(empty(input_, {(bytes + 7) / 8}, ScalarType::Double)) : nullptr;
  }

  void* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.mutable_data_ptr();
  }

  Tensor input_, readable_;  // as given, and as kernels read it
  Settings settings_;
  Holds holds_;
  int64_t stats_stride_ = kStats;
  // What kernels write, where it is not what the caller gets.
  std::optional<Tensor> stats_, result_, target_, values_result_, values_target_;
  std::vector<Tensor> kept_;  // memory that the steps point to
  ForwardParams forward_{};
  ExpectationParams expectation_{};
  ExpectationHeatmapParams heatmap_{};
  ExpectationValuesParams values_{};
  ExpectationSteps steps_{};
};

}  // namespace kpfused
