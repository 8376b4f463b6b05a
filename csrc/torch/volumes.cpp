// SPDX-License-Identifier: MIT
// The op of volumes and its gradient: moments of every slice, merged along the depth.
#include <optional>
#include <tuple>
#include <utility>

#include "backends.h"
#include "gradient.h"
#include "schemas.h"

namespace kpfused {
namespace {

// What `setting` tells: the coordinates, and where the depth is. Not negative: heatmap is (..., D, H, W). Negative, of
// ~coordinates: (..., D, K, H, W), the order in which slices lie in channels_last_3d tensors.
struct Volumes {
  int64_t coordinates;
  SliceView view;
  std::vector<int64_t> sizes;  // leading dimensions, without depth

  Volumes(const Tensor& heatmap, int64_t setting) : coordinates(setting < 0 ? ~setting : setting), sizes(leading_sizes(heatmap)) {
    const size_t behind = setting < 0 ? 2 : 1;
    STD_TORCH_CHECK(sizes.size() >= behind, "heatmap must be (..., D, H, W)");
    const size_t at = sizes.size() - behind;
    view.inner = setting < 0 ? sizes.back() : 1;
    view.depth = sizes[at];
    STD_TORCH_CHECK(view.depth > 0, "heatmap must have at least one slice");
    sizes.erase(sizes.begin() + static_cast<std::ptrdiff_t>(at));
    view.volumes = 1;
    for (const int64_t size : sizes) view.volumes *= size;
  }

  Tensor empty(const Tensor& heatmap, std::initializer_list<int64_t> last, ScalarType dtype) const {
    return kpfused::empty(heatmap, sizes_before(sizes.data(), sizes.size(), last), dtype);
  }

  template <class Params>
  VolumeParams params(const Params& maps) const {
    const AxisUnits z = axis_units(static_cast<Coordinates>(coordinates), view.depth);
    return {maps.dtype, view, maps.beta, maps.units, z.scale, z.offset, maps.stats};
  }
};

// Slices in which nothing weighs are finite, whatever becomes of their volume.
Settings of_slices(Settings settings, const Volumes& volumes) {
  STD_TORCH_CHECK(!settings.valid_size, "volumes have no valid_size");
  settings.coordinates = volumes.coordinates;
  settings.empty_value = 0;
  return settings;
}

// `counts`, each so many numbers a slice: one tensor that holds them, and where in it each begins.
template <size_t n>
std::pair<Tensor, std::array<void*, n>> numbers_of_slices(const Tensor& heatmap, int64_t slices, ScalarType dtype,
                                                          const std::array<int64_t, n>& counts) {
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  Tensor all = empty(heatmap, {slices * total}, dtype);
  std::array<void*, n> begins{};
  char* at = static_cast<char*>(all.mutable_data_ptr());
  for (size_t i = 0; i < n; ++i) {
    if (counts[i] > 0) begins[i] = at;
    at += slices * counts[i] * (dtype == ScalarType::Double ? 8 : 4);
  }
  return {all, begins};
}

using VolumeTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
VolumeTensors forward(Tensor heatmap, std::optional<Tensor> beta, double beta_value, int64_t setting,
                      std::optional<Tensor> mask, std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  const Volumes volumes(heatmap, setting);
  Settings settings = of_slices({beta, beta_value, setting, mask, valid_size, empty_value}, volumes);
  auto p = common_params<ForwardParams>(heatmap, readable(heatmap, settings), settings);
  const ScalarType dtype = accumulator_of(p.dtype);
  Tensor slice_stats = empty(heatmap, leading_sizes(heatmap, {kMomentStats}), dtype);
  Tensor slice_peaks = empty(heatmap, leading_sizes(heatmap, {2}), ScalarType::Long);
  const auto [fields, begins] = numbers_of_slices<5>(heatmap, p.view.maps(), dtype, {2, 4, 1, 1, 1});
  p.stats = slice_stats.mutable_data_ptr();
  p.coordinates = begins[0];
  p.with_moments = true;
  p.moments = {begins[1], begins[2], begins[3], begins[4], static_cast<int64_t*>(slice_peaks.mutable_data_ptr())};
  run<Backend>(p, heatmap);

  Tensor mean = volumes.empty(heatmap, {3}, dtype), covariance = volumes.empty(heatmap, {3, 3}, dtype);
  Tensor entropy = volumes.empty(heatmap, {}, dtype), logsumexp = volumes.empty(heatmap, {}, dtype);
  Tensor peak = volumes.empty(heatmap, {3}, ScalarType::Long), chance = volumes.empty(heatmap, {}, dtype);
  Tensor stats = volumes.empty(heatmap, {kVolumeStats}, dtype);
  const VolumeForwardParams whole{volumes.params(p),
                                  p.moments.peak,
                                  mask || empty_value,
                                  empty_value.value_or(kNan),
                                  mean.mutable_data_ptr(),
                                  {covariance.mutable_data_ptr(), entropy.mutable_data_ptr(), logsumexp.mutable_data_ptr(),
                                   chance.mutable_data_ptr(), static_cast<int64_t*>(peak.mutable_data_ptr())},
                                  stats.mutable_data_ptr()};
  if (volumes.view.volumes > 0) Backend::run(whole, heatmap);
  return {mean, covariance, entropy, logsumexp, peak, chance, slice_stats, slice_peaks, stats};
}

template <class Backend>
std::tuple<Tensor, Tensor> backward(std::optional<Tensor> grad_mean, std::optional<Tensor> grad_covariance,
                                    std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_logsumexp,
                                    std::optional<Tensor> grad_peak_probability, Tensor heatmap, Tensor slice_stats,
                                    Tensor slice_peaks, Tensor stats, std::optional<Tensor> beta, double beta_value,
                                    int64_t setting, bool needs_grad_beta, std::optional<Tensor> mask,
                                    std::optional<Tensor> valid_size, std::optional<double> empty_value) {
  STD_TORCH_CHECK(heatmap.dim() >= 2, "heatmap must be (..., H, W)");
  const Volumes volumes(heatmap, setting);
  const Settings settings = of_slices({beta, beta_value, setting, mask, valid_size, empty_value}, volumes);
  Gradient gradient(heatmap, slice_stats, settings, needs_grad_beta, true);
  BackwardParams& p = gradient.params;
  const auto dense = [&](std::optional<Tensor>& tensor, int64_t values, const char* name) {
    return gradient.dense(tensor, volumes.view.volumes * values, name);
  };
  std::optional<Tensor> saved = stats;
  gradient.check_peaks(slice_peaks);
  const auto [gradients, begins] = numbers_of_slices<5>(
      heatmap, p.view.maps(), accumulator_of(p.dtype),
      {2, grad_covariance ? 4 : 0, grad_entropy ? 1 : 0, 1, grad_peak_probability ? 1 : 0});
  const VolumeBackwardParams whole{volumes.params(p),
                                   dense(saved, kVolumeStats, "stats"),
                                   dense(grad_mean, 3, "grad_mean"),
                                   dense(grad_covariance, 9, "grad_covariance"),
                                   dense(grad_entropy, 1, "grad_entropy"),
                                   dense(grad_logsumexp, 1, "grad_logsumexp"),
                                   dense(grad_peak_probability, 1, "grad_peak_probability"),
                                   begins[0],
                                   begins[1],
                                   begins[2],
                                   begins[3],
                                   begins[4]};
  if (volumes.view.volumes > 0) Backend::run(whole, heatmap);
  p.grad_coordinates = begins[0];
  p.grad_stride_map = 2;
  p.grad_stride_xy = 1;
  p.moments = {begins[1], begins[2], begins[3], begins[4], static_cast<const int64_t*>(slice_peaks.const_data_ptr())};
  return gradient.run<Backend>();
}

}  // namespace

#define KPFUSED_MOMENTS3D KPFUSED_FORWARD(KPFUSED_MOMENTS ", Tensor slice_stats, Tensor slice_peaks, Tensor stats")
#define KPFUSED_MOMENTS3D_BACKWARD \
  KPFUSED_BACKWARD(KPFUSED_MOMENT_GRADIENTS, "Tensor slice_stats, Tensor slice_peaks, Tensor stats")

STABLE_TORCH_LIBRARY_FRAGMENT(kpfused, m) {
  m.def("spatial_moments3d" KPFUSED_MOMENTS3D);
  m.def("_spatial_moments3d" KPFUSED_MOMENTS3D);
  m.def("spatial_moments3d_backward" KPFUSED_MOMENTS3D_BACKWARD);
  m.def("_spatial_moments3d_backward" KPFUSED_MOMENTS3D_BACKWARD);
}

#define KPFUSED_IMPLEMENT(m, Backend)                                    \
  m.impl("spatial_moments3d", TORCH_BOX(&forward<Backend>));             \
  m.impl("_spatial_moments3d", TORCH_BOX(&forward<Backend>));            \
  m.impl("spatial_moments3d_backward", TORCH_BOX(&backward<Backend>));   \
  m.impl("_spatial_moments3d_backward", TORCH_BOX(&backward<Backend>))

STABLE_TORCH_LIBRARY_IMPL(kpfused, CPU, m) { KPFUSED_IMPLEMENT(m, Cpu); }

#if KPFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(kpfused, CUDA, m) { KPFUSED_IMPLEMENT(m, Cuda); }
#endif

}  // namespace kpfused
