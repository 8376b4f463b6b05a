// SPDX-License-Identifier: MIT
// The ops of means and moments and their gradients: soft_argmax2d and spatial_moments2d.
#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "backends.h"

namespace kpfused {
namespace {

template <class Backend>
std::tuple<Tensor, Tensor> forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                                   std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                                   std::optional<double> empty_value) {
  STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  Settings settings{beta, beta_value, coordinates, mask, valid_size, empty_value};
  auto p = common_params<ForwardParams>(heatmap, readable(heatmap, settings.mask), settings);
  Tensor result = empty(heatmap, leading_sizes(heatmap, {2}), accumulator_of(p.dtype));
  Tensor stats = empty(heatmap, leading_sizes(heatmap, {kStats}), accumulator_of(p.dtype));
  p.coordinates = result.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  run<Backend>(p, heatmap);
  return {result, stats};
}

using MomentTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
MomentTensors moments_forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                              std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                              std::optional<double> empty_value) {
  STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  Settings settings{beta, beta_value, coordinates, mask, valid_size, empty_value};
  auto p = common_params<ForwardParams>(heatmap, readable(heatmap, settings.mask), settings);
  const ScalarType dtype = accumulator_of(p.dtype);
  Tensor mean = empty(heatmap, leading_sizes(heatmap, {2}), dtype);
  Tensor covariance = empty(heatmap, leading_sizes(heatmap, {2, 2}), dtype);
  Tensor entropy = empty(heatmap, leading_sizes(heatmap), dtype), logsumexp = empty(heatmap, leading_sizes(heatmap), dtype);
  Tensor peak_probability = empty(heatmap, leading_sizes(heatmap), dtype);
  Tensor peak = empty(heatmap, leading_sizes(heatmap, {2}), ScalarType::Long);
  Tensor stats = empty(heatmap, leading_sizes(heatmap, {kMomentStats}), dtype);
  p.coordinates = mean.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  p.with_moments = true;
  p.moments = {covariance.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr(),
               peak_probability.mutable_data_ptr(), static_cast<int64_t*>(peak.mutable_data_ptr())};
  run<Backend>(p, heatmap);
  return {mean, covariance, entropy, logsumexp, peak, peak_probability, stats};
}

// The upstream gradient (..., 2) as strides per map and per coordinate. The gradient of a sum is one expanded element;
// it and contiguous tensors are read in place.
Tensor readable_grad(Tensor grad, BackwardParams* p) {
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
    const Layout layout = readable(heatmap, settings.mask, &grad_heatmap);
    params = common_params<BackwardParams>(heatmap, layout, settings);
    params.with_moments = with_moments;
    check_of_maps(stats, with_moments ? kMomentStats : kStats, "stats");
    params.stats = stats.const_data_ptr();
    STD_TORCH_CHECK(stats.is_contiguous(), "stats must be what forward returned for this heatmap");
    params.grad_view = layout.second;
    params.grad_heatmap = grad_heatmap.mutable_data_ptr();
    grad_beta = empty(heatmap, needs_grad_beta ? leading_sizes(heatmap) : std::vector<int64_t>{0},
                      accumulator_of(params.dtype));
    params.grad_beta = needs_grad_beta ? grad_beta.mutable_data_ptr() : nullptr;
  }

  // `values` numbers of the accumulation dtype for every map.
  void check_of_maps(const Tensor& tensor, int64_t values, const char* name) const {
    check_device(tensor, heatmap, name);
    STD_TORCH_CHECK(tensor.scalar_type() == accumulator_of(params.dtype) && tensor.numel() == params.view.maps() * values,
                    name, " must have the shape and dtype of what forward returned for this heatmap");
  }

  template <class Backend>
  std::tuple<Tensor, Tensor> run() {
    Backend::prepare(grad_heatmap);
    kpfused::run<Backend>(params, heatmap);
    if (grad_heatmap.get() != result.get()) torch::stable::copy_(result, grad_heatmap);
    return {result, grad_beta};
  }
};

template <class Backend>
std::tuple<Tensor, Tensor> backward(Tensor grad_coordinates, Tensor heatmap, Tensor stats, std::optional<Tensor> beta,
                                    double beta_value, int64_t coordinates, bool needs_grad_beta,
                                    std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                                    std::optional<double> empty_value) {
  Gradient gradient(heatmap, stats, {beta, beta_value, coordinates, mask, valid_size, empty_value}, needs_grad_beta,
                    false);
  gradient.check_of_maps(grad_coordinates, 2, "grad_coordinates");
  grad_coordinates = readable_grad(grad_coordinates, &gradient.params);
  return gradient.run<Backend>();
}

template <class Backend>
std::tuple<Tensor, Tensor> moments_backward(std::optional<Tensor> grad_mean, std::optional<Tensor> grad_covariance,
                                            std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_logsumexp,
                                            std::optional<Tensor> grad_peak_probability, Tensor heatmap, Tensor stats,
                                            Tensor peak, std::optional<Tensor> beta, double beta_value,
                                            int64_t coordinates, bool needs_grad_beta, std::optional<Tensor> mask,
                                            std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Gradient gradient(heatmap, stats, {beta, beta_value, coordinates, mask, valid_size, empty_value}, needs_grad_beta,
                    true);
  BackwardParams& p = gradient.params;
  const auto dense = [&](std::optional<Tensor>& grad, int64_t values, const char* name) -> const void* {
    if (!grad) return nullptr;
    gradient.check_of_maps(*grad, values, name);
    grad = torch::stable::contiguous(*grad);
    return grad->const_data_ptr();
  };
  if (grad_mean) {
    gradient.check_of_maps(*grad_mean, 2, "grad_mean");
    grad_mean = readable_grad(*grad_mean, &p);
  }
  check_device(peak, heatmap, "peak");
  STD_TORCH_CHECK(peak.scalar_type() == ScalarType::Long && peak.is_contiguous() && peak.numel() == p.view.maps() * 2,
                  "peak must be what forward returned for this heatmap");
  p.moments = {dense(grad_covariance, 4, "grad_covariance"), dense(grad_entropy, 1, "grad_entropy"),
               dense(grad_logsumexp, 1, "grad_logsumexp"),
               dense(grad_peak_probability, 1, "grad_peak_probability"),
               static_cast<const int64_t*>(peak.const_data_ptr())};
  return gradient.run<Backend>();
}

}  // namespace

// Each kernel goes by two names. The one users and compilers see has an autograd formula (kpfused/autograd.py); the one
// with an underscore has none, so that the eager path, which brings its own autograd.Function, passes no Python between
// the dispatcher and the kernel.
// Arguments of every forward and of every backward, behind those of its own.
#define KPFUSED_SETTINGS "Tensor? beta, float beta_value, int coordinates"
#define KPFUSED_PIXELS "Tensor? mask=None, Tensor? valid_size=None, float? empty_value=None"
#define KPFUSED_FORWARD(returns) \
  "(Tensor heatmap, " KPFUSED_SETTINGS ", " KPFUSED_PIXELS ") -> (" returns ")"
#define KPFUSED_BACKWARD(gradients, kept)                                                                          \
  "(" gradients ", Tensor heatmap, " kept ", " KPFUSED_SETTINGS ", bool needs_grad_beta, " KPFUSED_PIXELS ") -> " \
  "(Tensor grad_heatmap, Tensor grad_beta)"

#define KPFUSED_SOFT_ARGMAX2D KPFUSED_FORWARD("Tensor coordinates, Tensor stats")
#define KPFUSED_SOFT_ARGMAX2D_BACKWARD KPFUSED_BACKWARD("Tensor grad_coordinates", "Tensor stats")
#define KPFUSED_MOMENTS2D                                                                                       \
  KPFUSED_FORWARD("Tensor mean, Tensor covariance, Tensor entropy, Tensor logsumexp, Tensor peak, " \
                  "Tensor peak_probability, Tensor stats")
#define KPFUSED_MOMENTS2D_BACKWARD                                                                                   \
  KPFUSED_BACKWARD("Tensor? grad_mean, Tensor? grad_covariance, Tensor? grad_entropy, Tensor? grad_logsumexp, " \
                   "Tensor? grad_peak_probability", "Tensor stats, Tensor peak")

STABLE_TORCH_LIBRARY(kpfused, m) {
  m.def("soft_argmax2d" KPFUSED_SOFT_ARGMAX2D);
  m.def("_soft_argmax2d" KPFUSED_SOFT_ARGMAX2D);
  m.def("soft_argmax2d_backward" KPFUSED_SOFT_ARGMAX2D_BACKWARD);
  m.def("_soft_argmax2d_backward" KPFUSED_SOFT_ARGMAX2D_BACKWARD);
  m.def("spatial_moments2d" KPFUSED_MOMENTS2D);
  m.def("_spatial_moments2d" KPFUSED_MOMENTS2D);
  m.def("spatial_moments2d_backward" KPFUSED_MOMENTS2D_BACKWARD);
  m.def("_spatial_moments2d_backward" KPFUSED_MOMENTS2D_BACKWARD);
}

#define KPFUSED_IMPLEMENT(m, Backend)                                                   \
  m.impl("soft_argmax2d", TORCH_BOX(&forward<Backend>));                                \
  m.impl("_soft_argmax2d", TORCH_BOX(&forward<Backend>));                               \
  m.impl("soft_argmax2d_backward", TORCH_BOX(&backward<Backend>));                      \
  m.impl("_soft_argmax2d_backward", TORCH_BOX(&backward<Backend>));                     \
  m.impl("spatial_moments2d", TORCH_BOX(&moments_forward<Backend>));                    \
  m.impl("_spatial_moments2d", TORCH_BOX(&moments_forward<Backend>));                   \
  m.impl("spatial_moments2d_backward", TORCH_BOX(&moments_backward<Backend>));          \
  m.impl("_spatial_moments2d_backward", TORCH_BOX(&moments_backward<Backend>))

STABLE_TORCH_LIBRARY_IMPL(kpfused, CPU, m) { KPFUSED_IMPLEMENT(m, Cpu); }

#if KPFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(kpfused, CUDA, m) { KPFUSED_IMPLEMENT(m, Cuda); }
#endif

}  // namespace kpfused
