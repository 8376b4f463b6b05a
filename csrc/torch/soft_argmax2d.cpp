// SPDX-License-Identifier: MIT
// The ops of means and moments and their gradients: soft_argmax2d and spatial_moments2d.
#include <optional>
#include <tuple>
#include <utility>

#include "backends.h"
#include "gradient.h"
#include "schemas.h"

namespace kpfused {
namespace {

template <class Backend>
std::tuple<Tensor, Tensor> forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                                   std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                                   std::optional<double> empty_value) {
  STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  Settings settings{beta, beta_value, coordinates, mask, valid_size, empty_value};
  auto p = common_params<ForwardParams>(heatmap, readable(heatmap, settings), settings);
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
  auto p = common_params<ForwardParams>(heatmap, readable(heatmap, settings), settings);
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
  const auto dense = [&](std::optional<Tensor>& grad, int64_t values, const char* name) {
    return gradient.dense(grad, p.view.maps() * values, name);
  };
  if (grad_mean) {
    gradient.check_of_maps(*grad_mean, 2, "grad_mean");
    grad_mean = readable_grad(*grad_mean, &p);
  }
  gradient.check_peaks(peak);
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
#define KPFUSED_SOFT_ARGMAX2D KPFUSED_FORWARD("Tensor coordinates, Tensor stats")
#define KPFUSED_SOFT_ARGMAX2D_BACKWARD KPFUSED_BACKWARD("Tensor grad_coordinates", "Tensor stats")
#define KPFUSED_MOMENTS2D KPFUSED_FORWARD(KPFUSED_MOMENTS ", Tensor stats")
#define KPFUSED_MOMENTS2D_BACKWARD KPFUSED_BACKWARD(KPFUSED_MOMENT_GRADIENTS, "Tensor stats, Tensor peak")

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
