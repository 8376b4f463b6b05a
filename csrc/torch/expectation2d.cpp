// SPDX-License-Identifier: MIT
// The ops around P itself: expectations of values under it, expected coordinates of a map that is a probability map
// already, the spatial softmax, and their gradients.
#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "backends.h"

namespace kpfused {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

// Stats of heatmap as forward leaves them, for which its coordinates are the price.
template <class Backend>
Tensor stats_of(const Tensor& heatmap, const Layout& layout, const Settings& settings) {
  auto p = common_params<ForwardParams>(heatmap, layout, settings);
  Tensor coordinates = empty(heatmap, leading_sizes(heatmap, {2}), accumulator_of(p.dtype));
  Tensor stats = empty(heatmap, leading_sizes(heatmap, {kStats}), accumulator_of(p.dtype));
  p.coordinates = coordinates.mutable_data_ptr();
  p.stats = stats.mutable_data_ptr();
  run<Backend>(p, heatmap);
  return stats;
}

// One heatmap, and the kernels that read it beside values or gradients of values.
template <class Backend>
class Softmax {
 public:
  Softmax(const Tensor& heatmap, const Settings& settings, bool is_probability)
      : input_(heatmap), settings_(settings), is_probability_(is_probability) {
    STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  }

  // Stats that forward left.
  void use(const Tensor& stats) {
    check_of_maps(stats, kStats, "stats");
    STD_TORCH_CHECK(stats.is_contiguous(), "stats must be what forward returned for this heatmap");
    stats_ = stats;
  }

  const Tensor& make_stats() {
    Tensor heatmap = input_;
    Settings settings = settings_;
    const Layout layout = readable(heatmap, settings.mask);
    stats_ = stats_of<Backend>(heatmap, layout, settings);
    return *stats_;
  }

  // `count` numbers of the accumulation dtype for every map.
  void check_of_maps(const Tensor& tensor, int64_t count, const char* name) const {
    int64_t maps = 1;
    for (int64_t d = 0; d < input_.dim() - 2; ++d) maps *= input_.size(d);
    check_device(tensor, input_, name);
    STD_TORCH_CHECK(tensor.scalar_type() == accumulator_of(dtype_of(input_)) && tensor.numel() == maps * count, name,
                    " must have the shape and dtype of what forward returned for this heatmap");
  }

  // E, [maps, channels]; of the coordinates where there are no values.
  Tensor expectation(const Tensor* values) const {
    Tensor heatmap = input_;
    Settings settings = settings_;
    const Layout layout = readable(heatmap, settings.mask, nullptr, values);
    check_folds(layout);
    ExpectationParams p{};
    p.softmax = params(heatmap, layout, settings, &p.units);
    p.value_view = values ? value_view(layout, *values) : ValueView{2, 0, 0, 0, 0, 0};
    p.values = values ? values->const_data_ptr() : nullptr;
    Tensor result = empty(heatmap, leading_sizes(heatmap, {p.value_view.channels}), accumulator_of(p.softmax.dtype));
    p.expectation = result.mutable_data_ptr();
    execute(p, heatmap);
    return result;
  }

  // Gradients of heatmap and beta. `grad` null: 1 for every channel.
  Pair heatmap_gradient(const Tensor* values, const Tensor* expectation, const Tensor* grad, bool needs_grad_beta) const {
    Tensor heatmap = input_, result = torch::stable::empty_like(heatmap), target = result;
    Settings settings = settings_;
    const Layout layout = readable(heatmap, settings.mask, &target, values);
    check_folds(layout);
    ExpectationHeatmapParams p{};
    p.softmax = params(heatmap, layout, settings, &p.units);
    p.value_view = values ? value_view(layout, *values) : ValueView{2, 0, 0, 0, 0, 0};
    p.values = values ? values->const_data_ptr() : nullptr;
    p.expectation = expectation ? expectation->const_data_ptr() : nullptr;
    p.grad = grad ? grad->const_data_ptr() : nullptr;
    p.grad_heatmap = target.mutable_data_ptr();
    p.grad_view = layout.second;
    Tensor grad_beta = empty(heatmap, needs_grad_beta ? leading_sizes(heatmap) : std::vector<int64_t>{0},
                             accumulator_of(p.softmax.dtype));
    p.grad_beta = needs_grad_beta ? grad_beta.mutable_data_ptr() : nullptr;
    execute(p, heatmap);
    if (target.get() != result.get()) torch::stable::copy_(result, target);
    return {result, grad_beta};
  }

  // The gradient of values, or with `grad` null and values of the heatmap's own shape the softmax map.
  void values_gradient(Tensor& values, const Tensor* grad) const {
    Tensor heatmap = input_;
    Settings settings = settings_;
    const Layout layout = readable(heatmap, settings.mask, nullptr, &values);
    check_folds(layout);
    if (layout.first.maps() == 0) {
      torch::stable::zero_(values);
      return;
    }
    Units units;
    ExpectationValuesParams p{};
    p.softmax = params(heatmap, layout, settings, &units);
    p.value_view = value_view(layout, values);
    p.grad = grad ? grad->const_data_ptr() : nullptr;
    p.grad_values = values.mutable_data_ptr();
    Backend::run(p, heatmap);
  }

 private:
  static void check_folds(const Layout& layout) {
    STD_TORCH_CHECK(layout.in_place, "values broadcast along separate dimensions; expand them in memory");
  }

  SoftmaxParams params(const Tensor& heatmap, const Layout& layout, const Settings& settings, Units* units) const {
    const auto common = common_params<ForwardParams>(heatmap, layout, settings);
    *units = common.units;
    return {common.dtype,  common.heatmap, common.view, common.pixels,
            common.beta,   stats_ ? stats_->const_data_ptr() : nullptr, is_probability_};
  }

  template <class Params>
  static void execute(Params& p, const Tensor& heatmap) {
    if (p.softmax.view.maps() == 0) return;
    std::optional<Tensor> workspace;
    if (const int64_t bytes = Backend::workspace(p)) {
      workspace = empty(heatmap, {(bytes + 7) / 8}, ScalarType::Double);
      p.workspace = workspace->mutable_data_ptr();
    }
    Backend::run(p, heatmap);
  }

  Tensor input_;
  Settings settings_;
  bool is_probability_;
  std::optional<Tensor> stats_;
};

// (..., H, W) as values (..., 1, H, W).
Tensor one_channel(const Tensor& map) { return torch::stable::unsqueeze(map, map.dim() - 2); }

// ---- Expectation of values ------------------------------------------------------------------------------------------

template <class Backend>
Pair expectation_forward(Tensor heatmap, Tensor values, std::optional<Tensor> beta, double beta_value,
                         std::optional<Tensor> mask, std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  check_values(heatmap, values);
  Softmax<Backend> softmax(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value}, false);
  Tensor stats = softmax.make_stats();
  return {softmax.expectation(&values), stats};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> expectation_backward(
    Tensor grad, Tensor heatmap, Tensor values, Tensor expectation, Tensor stats, std::optional<Tensor> beta,
    double beta_value, bool needs_grad_heatmap, bool needs_grad_values, bool needs_grad_beta, std::optional<Tensor> mask,
    std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  check_values(heatmap, values);
  Softmax<Backend> softmax(heatmap, {beta, beta_value, 0, mask, valid_size, empty_value}, false);
  softmax.use(stats);
  const int64_t channels = values.size(values.dim() - 3);
  softmax.check_of_maps(expectation, channels, "expectation");
  softmax.check_of_maps(grad, channels, "grad");
  grad = torch::stable::contiguous(grad);
  expectation = torch::stable::contiguous(expectation);
  const auto none = [&] { return empty(heatmap, {0}, accumulator_of(dtype_of(heatmap))); };
  std::tuple<Tensor, Tensor, Tensor> result{none(), none(), none()};
  if (needs_grad_heatmap || needs_grad_beta) {
    std::tie(std::get<0>(result), std::get<2>(result)) =
        softmax.heatmap_gradient(&values, &expectation, &grad, needs_grad_beta);
  }
  if (needs_grad_values) {
    Tensor& grad_values = std::get<1>(result) = torch::stable::empty_like(values);
    softmax.values_gradient(grad_values, &grad);
  }
  return result;
}

// ---- Softmax --------------------------------------------------------------------------------------------------------

template <class Backend>
Pair softmax_forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                     std::optional<Tensor> mask, std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Softmax<Backend> softmax(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value}, false);
  Tensor stats = softmax.make_stats();
  Tensor result = torch::stable::empty_like(heatmap), as_values = one_channel(result);
  softmax.values_gradient(as_values, nullptr);
  return {result, stats};
}

template <class Backend>
Pair softmax_backward(Tensor grad, Tensor heatmap, Tensor stats, std::optional<Tensor> beta, double beta_value,
                      int64_t coordinates, bool needs_grad_beta, std::optional<Tensor> mask,
                      std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  Tensor values = one_channel(grad);
  check_values(heatmap, values);
  STD_TORCH_CHECK(grad.dim() == heatmap.dim(), "grad must be of the shape of heatmap");
  Softmax<Backend> softmax(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value}, false);
  softmax.use(stats);
  const Tensor mean = softmax.expectation(&values);
  return softmax.heatmap_gradient(&values, &mean, nullptr, needs_grad_beta);
}

// ---- Expected coordinates of a probability map ----------------------------------------------------------------------

// Takes the arguments of the other ops, of which beta means nothing here, and returns no stats.
template <class Backend>
Pair coordinates_forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t coordinates,
                         std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                         std::optional<double> empty_value) {
  const Softmax<Backend> map(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value}, true);
  return {map.expectation(nullptr), empty(heatmap, leading_sizes(heatmap, {0}), accumulator_of(dtype_of(heatmap)))};
}

template <class Backend>
Pair coordinates_backward(Tensor grad, Tensor heatmap, Tensor, std::optional<Tensor> beta, double beta_value,
                          int64_t coordinates, bool, std::optional<Tensor> mask, std::optional<Tensor> valid_size,
                          std::optional<double> empty_value) {
  const Softmax<Backend> map(heatmap, {beta, beta_value, coordinates, mask, valid_size, empty_value}, true);
  map.check_of_maps(grad, 2, "grad");
  grad = torch::stable::contiguous(grad);
  return map.heatmap_gradient(nullptr, nullptr, &grad, false);
}

}  // namespace

#define KPFUSED_PIXELS "Tensor? mask=None, Tensor? valid_size=None, float? empty_value=None"
#define KPFUSED_MAP_FORWARD(result)                                                                             \
  "(Tensor heatmap, Tensor? beta, float beta_value, int coordinates, " KPFUSED_PIXELS ") -> (Tensor " result \
  ", Tensor stats)"
#define KPFUSED_MAP_BACKWARD(grad)                                                                               \
  "(Tensor " grad ", Tensor heatmap, Tensor stats, Tensor? beta, float beta_value, int coordinates, "            \
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
  m.def("spatial_softmax2d_backward" KPFUSED_MAP_BACKWARD("grad_probabilities"));
  m.def("_spatial_softmax2d_backward" KPFUSED_MAP_BACKWARD("grad_probabilities"));
  m.def("expectation2d" KPFUSED_MAP_FORWARD("coordinates_"));
  m.def("_expectation2d" KPFUSED_MAP_FORWARD("coordinates_"));
  m.def("expectation2d_backward" KPFUSED_MAP_BACKWARD("grad_coordinates"));
  m.def("_expectation2d_backward" KPFUSED_MAP_BACKWARD("grad_coordinates"));
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
  m.impl("spatial_expectation2d", TORCH_BOX(&expectation_forward<Backend>));                     \
  m.impl("_spatial_expectation2d", TORCH_BOX(&expectation_forward<Backend>));                    \
  m.impl("spatial_expectation2d_backward", TORCH_BOX(&expectation_backward<Backend>));           \
  m.impl("_spatial_expectation2d_backward", TORCH_BOX(&expectation_backward<Backend>))

STABLE_TORCH_LIBRARY_IMPL(kpfused, CPU, m) { KPFUSED_IMPLEMENT(m, Cpu); }

#if KPFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(kpfused, CUDA, m) { KPFUSED_IMPLEMENT(m, Cuda); }
#endif

}  // namespace kpfused
