// SPDX-License-Identifier: MIT
// The ops around P itself: expectations of values under it, expected coordinates of a map that is a probability map
// already, the spatial softmax, the probability within a window, and their gradients.
#include <optional>
#include <tuple>

#include "backends.h"
#include "schemas.h"
#include "steps.h"

namespace kpfused {
namespace {

Averaged of(const Tensor& values) { return {ValueKind::tensor, values}; }
const Averaged kOfCoordinates{ValueKind::coordinates};

// (..., H, W) as values (..., 1, H, W).
Tensor one_channel(const Tensor& map) { return torch::stable::unsqueeze(map, map.dim() - 2); }

// ---- Expectation of values ------------------------------------------------------------------------------------------

template <class Backend>
Pair expectation_forward(Tensor heatmap, Tensor values, std::optional<Tensor> beta, double beta_value,
                         std::optional<Tensor> mask, std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  check_values(heatmap, values);
  Steps<Backend> steps(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value});
  Tensor stats = steps.add_stats(), result = steps.add_expectation(of(values));
  steps.run();
  return {result, stats};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> expectation_backward(
    Tensor grad, Tensor heatmap, Tensor values, Tensor expectation, Tensor stats, std::optional<Tensor> beta,
    double beta_value, bool needs_grad_heatmap, bool needs_grad_values, bool needs_grad_beta, std::optional<Tensor> mask,
    std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  check_values(heatmap, values);
  Steps<Backend> steps(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value});
  steps.use_stats(stats);
  const int64_t channels = values.size(values.dim() - 3);
  steps.check_of_maps(expectation, channels, "expectation");
  steps.check_of_maps(grad, channels, "grad");
  grad = torch::stable::contiguous(grad);
  expectation = torch::stable::contiguous(expectation);
  std::tuple<Tensor, Tensor, Tensor> result;
  if (needs_grad_heatmap || needs_grad_beta) {
    std::tie(std::get<0>(result), std::get<2>(result)) =
        steps.add_heatmap_gradient(of(values), &expectation, &grad, needs_grad_beta);
  }
  if (needs_grad_values) {
    Tensor& grad_values = std::get<1>(result) = kpfused::empty_like(values);
    steps.add_values_gradient(grad_values, &grad);
  }
  steps.run();
  return result;
}

// ---- Softmax --------------------------------------------------------------------------------------------------------

template <class Backend>
Pair softmax_forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                     std::optional<Tensor> mask, std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Steps<Backend> steps(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value});
  Tensor stats = steps.add_stats(), result = kpfused::empty_like(heatmap), as_values = one_channel(result);
  steps.add_values_gradient(as_values, nullptr);
  steps.run();
  return {result, stats};
}

// `of_result`: the result of forward takes the heatmap's place, for the gradient of the heatmap alone. It is checked as
// the setting of forward is, for which coordinates stand: both refuse the same.
template <class Backend>
Pair softmax_backward(Tensor grad, Tensor heatmap, Tensor stats, std::optional<Tensor> beta, double beta_value,
                      int64_t of_result, bool needs_grad_beta, std::optional<Tensor> mask,
                      std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  STD_TORCH_CHECK(grad.dim() == heatmap.dim(), "grad must be of the shape of heatmap");
  STD_TORCH_CHECK(!of_result || !needs_grad_beta, "the gradient of beta needs the heatmap, not the result");
  const Tensor values = one_channel(grad);
  check_values(heatmap, values);
  const Holds holds = of_result ? Holds::softmax : Holds::logits;
  Steps<Backend> steps(heatmap, {beta, beta_value, of_result, mask, valid_size, empty_value}, holds);
  steps.use_stats(stats);
  const Tensor mean = steps.add_expectation(of(values));
  Pair result = steps.add_heatmap_gradient(of(values), &mean, nullptr, needs_grad_beta);
  steps.run();
  return result;
}

// ---- Expected coordinates of a probability map ----------------------------------------------------------------------

// Takes the arguments of the other ops, of which beta means nothing here, and returns no stats.
template <class Backend>
Pair coordinates_forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                         std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                         std::optional<double> empty_value) {
  Steps<Backend> steps(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value}, Holds::probabilities);
  Tensor result = steps.add_expectation(kOfCoordinates);
  steps.run();
  return {result, empty(heatmap, leading_sizes(heatmap, {0}), accumulator_of(dtype_of(heatmap)))};
}

template <class Backend>
Pair coordinates_backward(Tensor grad, Tensor heatmap, Tensor, std::optional<Tensor> beta, double beta_value,
                          int64_t coordinates, bool needs_grad_beta, std::optional<Tensor> mask,
                          std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Steps<Backend> steps(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value}, Holds::probabilities);
  steps.check_of_maps(grad, 2, "grad");
  grad = torch::stable::contiguous(grad);
  Pair result = steps.add_heatmap_gradient(kOfCoordinates, nullptr, &grad, false);
  steps.run();
  if (needs_grad_beta) {
    Tensor& grad_beta = std::get<1>(result) = empty(heatmap, leading_sizes(heatmap), accumulator_of(dtype_of(heatmap)));
    torch::stable::zero_(grad_beta);
  }
  return result;
}

// ---- Probability within a window ------------------------------------------------------------------------------------

// `window`: pixels along its sides, around the mean; negative, around the peak. An odd number.
Averaged window_of(int64_t window, const Tensor& heatmap, const Tensor& stats, const Tensor& peak) {
  STD_TORCH_CHECK(window % 2 != 0, "window must be odd");
  check_device(peak, heatmap, "peak");
  STD_TORCH_CHECK(peak.scalar_type() == ScalarType::Long && peak.is_contiguous() &&
                      peak.numel() * kMomentStats == stats.numel() * 2,
                  "peak must be what forward returned for this heatmap");
  const bool around_peak = window < 0;
  const int64_t* const centre = static_cast<const int64_t*>(peak.const_data_ptr());
  return {ValueKind::window, std::nullopt, (around_peak ? -(window + 1) : window - 1) / 2, around_peak ? centre : nullptr};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> window_forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value,
                                                  int64_t window, std::optional<Tensor> mask,
                                                  std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Steps<Backend> steps(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value});
  const auto [stats, peak] = steps.add_moments();
  const Tensor mass = steps.add_expectation(window_of(window, heatmap, stats, peak));
  steps.run();
  return {mass, stats, peak};
}

// With stats and a pixel that are known: of a larger map of which this is a part, for one, which may lie beside it.
template <class Backend>
Tensor window_mass_at(Tensor heatmap, Tensor stats, Tensor pixel, std::optional<Tensor> beta, double beta_value,
                      int64_t window, std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                      std::optional<double> empty_value) {
  Steps<Backend> steps(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value});
  steps.use_stats(stats, kMomentStats);
  const Tensor mass = steps.add_expectation(window_of(window, heatmap, stats, pixel));
  steps.run();
  return mass;
}

template <class Backend>
Pair window_backward(Tensor grad, Tensor heatmap, Tensor mass, Tensor stats, Tensor peak, std::optional<Tensor> beta,
                     double beta_value, int64_t window, bool needs_grad_beta, std::optional<Tensor> mask,
                     std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Steps<Backend> steps(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value});
  steps.use_stats(stats, kMomentStats);
  steps.check_of_maps(mass, 1, "mass");
  steps.check_of_maps(grad, 1, "grad_mass");
  grad = torch::stable::contiguous(grad);
  mass = torch::stable::contiguous(mass);
  Pair result = steps.add_heatmap_gradient(window_of(window, heatmap, stats, peak), &mass, &grad, needs_grad_beta);
  steps.run();
  return result;
}

}  // namespace

#define KPFUSED_MAP_FORWARD(result)                                                                             \
  "(Tensor heatmap, Tensor? beta, float beta_value, int coordinates, " KPFUSED_PIXELS ") -> (Tensor " result \
  ", Tensor stats)"
#define KPFUSED_MAP_BACKWARD(grad, setting)                                                                      \
  "(Tensor " grad ", Tensor heatmap, Tensor stats, Tensor? beta, float beta_value, int " setting ", "            \
  "bool needs_grad_beta, " KPFUSED_PIXELS ") -> (Tensor grad_heatmap, Tensor grad_beta)"
#define KPFUSED_WINDOW                                                                                          \
  "(Tensor heatmap, Tensor? beta, float beta_value, int window, " KPFUSED_PIXELS ") -> (Tensor mass, Tensor stats, " \
  "Tensor peak)"
#define KPFUSED_WINDOW_AT                                                                                           \
  "(Tensor heatmap, Tensor stats, Tensor pixel, Tensor? beta, float beta_value, int window, " KPFUSED_PIXELS ") -> " \
  "Tensor mass"
#define KPFUSED_WINDOW_BACKWARD                                                                                     \
  "(Tensor grad_mass, Tensor heatmap, Tensor mass, Tensor stats, Tensor peak, Tensor? beta, float beta_value, int window, " \
  "bool needs_grad_beta, " KPFUSED_PIXELS ") -> (Tensor grad_heatmap, Tensor grad_beta)"
#define KPFUSED_EXPECTATION                                                                                   \
  "(Tensor heatmap, Tensor values, Tensor? beta, float beta_value, " KPFUSED_PIXELS ") -> (Tensor expectation, " \
  "Tensor stats)"
#define KPFUSED_EXPECTATION_BACKWARD                                                                           \
  "(Tensor grad, Tensor heatmap, Tensor values, Tensor expectation, Tensor stats, Tensor? beta, float beta_value, " \
  "bool needs_grad_heatmap, bool needs_grad_values, bool needs_grad_beta, " KPFUSED_PIXELS ") -> "             \
  "(Tensor grad_heatmap, Tensor grad_values, Tensor grad_beta)"

STABLE_TORCH_LIBRARY_FRAGMENT(kpfused, m) {
  m.def("spatial_softmax2d" KPFUSED_MAP_FORWARD("probabilities"));
  m.def("_spatial_softmax2d" KPFUSED_MAP_FORWARD("probabilities"));
  m.def("spatial_softmax2d_backward" KPFUSED_MAP_BACKWARD("grad_probabilities", "of_result"));
  m.def("_spatial_softmax2d_backward" KPFUSED_MAP_BACKWARD("grad_probabilities", "of_result"));
  m.def("expectation2d" KPFUSED_MAP_FORWARD("coordinates_"));
  m.def("_expectation2d" KPFUSED_MAP_FORWARD("coordinates_"));
  m.def("expectation2d_backward" KPFUSED_MAP_BACKWARD("grad_coordinates", "coordinates"));
  m.def("_expectation2d_backward" KPFUSED_MAP_BACKWARD("grad_coordinates", "coordinates"));
  m.def("window_mass2d" KPFUSED_WINDOW);
  m.def("_window_mass2d" KPFUSED_WINDOW);
  m.def("_window_mass2d_at" KPFUSED_WINDOW_AT);
  m.def("window_mass2d_backward" KPFUSED_WINDOW_BACKWARD);
  m.def("_window_mass2d_backward" KPFUSED_WINDOW_BACKWARD);
  m.def("spatial_expectation2d" KPFUSED_EXPECTATION);
  m.def("_spatial_expectation2d" KPFUSED_EXPECTATION);
  m.def("spatial_expectation2d_backward" KPFUSED_EXPECTATION_BACKWARD);
  m.def("_spatial_expectation2d_backward" KPFUSED_EXPECTATION_BACKWARD);
}

#define KPFUSED_IMPLEMENT(m, Backend)                                                            \
  m.impl("spatial_softmax2d", TORCH_BOX(&softmax_forward<Backend>));                             \
  m.impl("_spatial_softmax2d", TORCH_BOX(&softmax_forward<Backend>));                            \
  m.impl("spatial_softmax2d_backward", TORCH_BOX(&softmax_backward<Backend>));                   \
  m.impl("_spatial_softmax2d_backward", TORCH_BOX(&softmax_backward<Backend>));                  \
  m.impl("expectation2d", TORCH_BOX(&coordinates_forward<Backend>));                             \
  m.impl("_expectation2d", TORCH_BOX(&coordinates_forward<Backend>));                            \
  m.impl("expectation2d_backward", TORCH_BOX(&coordinates_backward<Backend>));                   \
  m.impl("_expectation2d_backward", TORCH_BOX(&coordinates_backward<Backend>));                  \
  m.impl("window_mass2d", TORCH_BOX(&window_forward<Backend>));                                  \
  m.impl("_window_mass2d", TORCH_BOX(&window_forward<Backend>));                                 \
  m.impl("_window_mass2d_at", TORCH_BOX(&window_mass_at<Backend>));                              \
  m.impl("window_mass2d_backward", TORCH_BOX(&window_backward<Backend>));                        \
  m.impl("_window_mass2d_backward", TORCH_BOX(&window_backward<Backend>));                       \
  m.impl("spatial_expectation2d", TORCH_BOX(&expectation_forward<Backend>));                     \
  m.impl("_spatial_expectation2d", TORCH_BOX(&expectation_forward<Backend>));                    \
  m.impl("spatial_expectation2d_backward", TORCH_BOX(&expectation_backward<Backend>));           \
  m.impl("_spatial_expectation2d_backward", TORCH_BOX(&expectation_backward<Backend>))

STABLE_TORCH_LIBRARY_IMPL(kpfused, CPU, m) { KPFUSED_IMPLEMENT(m, Cpu); }

#if KPFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(kpfused, CUDA, m) { KPFUSED_IMPLEMENT(m, Cuda); }
#endif

}  // namespace kpfused
