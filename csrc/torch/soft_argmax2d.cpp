// SPDX-License-Identifier: MIT
// The ops kpfused::soft_argmax2d and kpfused::soft_argmax2d_backward: from tensors to a kernel's parameters.
//
// Users reach the ops through kpfused/functional.py, whose checks name the argument at fault. What is checked here is
// what would otherwise touch memory that is not there.
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "../cpu/pages.h"
#include "../cpu/soft_argmax2d.h"
#include "../cuda/soft_argmax2d.h"
#include "../units.h"
#include "tensors.h"

namespace kpfused {
namespace {

struct Cpu {
  static int64_t workspace(const ForwardParams& p) {
    return cpu::soft_argmax2d_forward_workspace(p.view, p.dtype, p.with_moments);
  }
  static int64_t workspace(const BackwardParams& p) {
    return cpu::soft_argmax2d_backward_workspace(p.view, p.dtype, p.grad_beta != nullptr);
  }
  static void run(const ForwardParams& p, const Tensor&) { cpu::soft_argmax2d_forward(p); }
  static void run(const BackwardParams& p, const Tensor&) {
    const MapView& v = p.grad_view;  // dense
    const int64_t pixels = v.maps() * v.height * v.width;
    cpu::prefer_huge_pages(p.grad_heatmap, static_cast<size_t>(pixels * element_size(p.dtype)));
    cpu::soft_argmax2d_backward(p);
  }
};

#if KPFUSED_CUDA
// Weak, so that the library loads where torch has no CUDA; the ops that call it are then out of reach.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

struct Cuda {
  static int64_t workspace(const ForwardParams& p) { return cuda::soft_argmax2d_forward_workspace(p); }
  static int64_t workspace(const BackwardParams& p) { return cuda::soft_argmax2d_backward_workspace(p); }
  template <class Params>
  static void run(const Params& p, const Tensor& heatmap) {
    const torch::stable::accelerator::DeviceGuard guard(heatmap.get_device_index());
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(heatmap.get_device_index(), &stream));
    check(launch(p, static_cast<cuda::Stream>(stream)));
  }
  static int launch(const ForwardParams& p, cuda::Stream stream) { return cuda::soft_argmax2d_forward(p, stream); }
  static int launch(const BackwardParams& p, cuda::Stream stream) { return cuda::soft_argmax2d_backward(p, stream); }
  static void check(int error) {
    STD_TORCH_CHECK(error == 0, "kpfused: a CUDA kernel could not be launched: ", cuda::error_string(error));
  }
};
#endif

void check_device(const Tensor& tensor, const Tensor& heatmap, const char* name) {
  int32_t own = 0, wanted = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &own));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(heatmap.get(), &wanted));
  STD_TORCH_CHECK(own == wanted && tensor.get_device_index() == heatmap.get_device_index(), name,
                  " must be on the device of heatmap");
}

// The first `dims` sizes of a tensor against the leading dimensions of heatmap.
void check_broadcast(const Tensor& heatmap, const Tensor& tensor, int64_t dims, const char* name) {
  const int64_t leading = heatmap.dim() - 2;
  bool fits = dims <= leading;
  for (int64_t d = 0; fits && d < dims; ++d) {
    fits = tensor.size(d) == 1 || tensor.size(d) == heatmap.size(leading - dims + d);
  }
  STD_TORCH_CHECK(fits, name, " must broadcast against the leading dimensions of heatmap");
}

BetaView beta_view(const Tensor& heatmap, const std::optional<Tensor>& beta, double value) {
  BetaView view{nullptr, value, 1, 1};
  if (!beta) return view;
  check_device(*beta, heatmap, "beta");
  STD_TORCH_CHECK(beta->scalar_type() == accumulator_of(dtype_of(heatmap)) && beta->is_contiguous(),
                  "beta must be contiguous and of the dtype of the coordinates");
  check_broadcast(heatmap, *beta, beta->dim(), "beta");
  STD_TORCH_CHECK(fold_beta(heatmap.sizes().data(), heatmap.dim() - 2, beta->sizes().data(), beta->dim(), &view),
                  "beta broadcasts along separate dimensions; expand it");
  view.values = beta->const_data_ptr();
  return view;
}

// What an op is told beside the heatmap.
struct Settings {
  std::optional<Tensor> beta;
  double beta_value;
  int64_t coordinates;
  std::optional<Tensor> mask;        // bool, of the heatmap's shape; strides may be zero
  std::optional<Tensor> valid_size;  // int64 (..., 2), (height, width), leading dimensions as those of beta
  std::optional<double> empty_value;
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A valid size broadcasts against the leading dimensions of heatmap as beta does.
PixelView pixel_view(const Tensor& heatmap, const Settings& settings, const MapView& mask_view) {
  PixelView view{nullptr, mask_view, nullptr, 1, 1, false, settings.empty_value.value_or(kNan)};
  view.fills_empty = settings.mask || settings.valid_size || settings.empty_value;
  if (settings.mask) view.mask = static_cast<const uint8_t*>(settings.mask->const_data_ptr());
  if (!settings.valid_size) return view;
  const Tensor& size = *settings.valid_size;
  check_device(size, heatmap, "valid_size");
  const int64_t dims = size.dim() - 1;
  STD_TORCH_CHECK(size.scalar_type() == ScalarType::Long && size.is_contiguous() && dims >= 0 && size.size(dims) == 2,
                  "valid_size must be a contiguous int64 tensor (..., 2)");
  BetaView run{};
  check_broadcast(heatmap, size, dims, "valid_size");
  STD_TORCH_CHECK(fold_beta(heatmap.sizes().data(), heatmap.dim() - 2, size.sizes().data(), dims, &run),
                  "valid_size broadcasts along separate dimensions; expand it");
  view.sizes = static_cast<const int64_t*>(size.const_data_ptr());
  view.divisor = run.divisor;
  view.modulus = run.modulus;
  return view;
}

// How a kernel reads the heatmap and writes `target`, where there is one. Copies the heatmap to contiguous where no
// kernel reads its layout, and then the target, and expands a mask in memory where its strides do not fold with theirs.
Layout readable(Tensor& heatmap, std::optional<Tensor>& mask, Tensor* target = nullptr) {
  const auto fold = [&] {
    return fold_layout(heatmap.sizes().data(), heatmap.dim(), heatmap.strides().data(),
                       target ? target->strides().data() : nullptr, mask ? mask->strides().data() : nullptr);
  };
  if (mask) {
    check_device(*mask, heatmap, "mask");
    bool same = mask->dim() == heatmap.dim() && mask->scalar_type() == ScalarType::Bool;
    for (int64_t d = 0; same && d < heatmap.dim(); ++d) same = mask->size(d) == heatmap.size(d);
    STD_TORCH_CHECK(same, "mask must be bool and of the shape of heatmap");
  }
  Layout layout = fold();
  if (layout.in_place) return layout;
  heatmap = torch::stable::contiguous(heatmap);
  if (target) {
    const auto sizes = heatmap.sizes();
    *target = empty(heatmap, {sizes.begin(), sizes.end()}, heatmap.scalar_type());
  }
  layout = fold();
  if (layout.in_place) return layout;
  mask = torch::stable::contiguous(*mask);
  return fold();
}

// What forward and backward share of their parameters.
template <class Params>
Params common_params(const Tensor& heatmap, const Layout& layout, const Settings& settings) {
  const MapView& view = layout.first;
  const int64_t coordinates = settings.coordinates;
  STD_TORCH_CHECK(0 <= coordinates && coordinates < kCoordinates, "unknown coordinates");
  STD_TORCH_CHECK(view.height > 0 && view.width > 0, "heatmap must have at least one pixel");
  Params p{};
  p.dtype = dtype_of(heatmap);
  p.heatmap = heatmap.const_data_ptr();
  p.view = view;
  p.pixels = pixel_view(heatmap, settings, layout.mask);
  p.beta = beta_view(heatmap, settings.beta, settings.beta_value);
  p.units = units_of(static_cast<Coordinates>(coordinates), view.height, view.width);
  return p;
}

template <class Backend, class Params>
void run(Params& p, const Tensor& heatmap) {
  if (p.view.maps() == 0) return;
  std::optional<Tensor> workspace;
  if (const int64_t bytes = Backend::workspace(p)) {
    workspace = empty(heatmap, {(bytes + 7) / 8}, ScalarType::Double);  // aligned for either accumulator
    p.workspace = workspace->mutable_data_ptr();
  }
  Backend::run(p, heatmap);
}

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
      : heatmap(std::move(input)), result(torch::stable::empty_like(heatmap)), grad_heatmap(result),
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

// Each kernel goes by two names. The one users and compilers see has an autograd formula (kpfused/ops.py); the one with
// an underscore has none, so that the eager path, which brings its own autograd.Function, passes no Python between the
// dispatcher and the kernel.
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
